"""PEPITA against the papers' products, written out; what each variant stores; and that it is feedback alignment."""

from dataclasses import replace

import pytest
import torch
from cases import (
    NETS,
    assert_close,
    batch,
    copied,
    descent,
    double,
    equal,
    leaves,
    network,
    nonuniform,
    run_block,
    step,
)
from cases import weighted_cross_entropy as cross_entropy
from fedforward.algorithms import Batch, Network, RuleError, State
from fedforward.algorithms.feedback.mirrors import through
from fedforward.algorithms.feedback.pepita import PEPITA
from fedforward.algorithms.models import lenet, mlp
from fedforward.algorithms.noise import normals
from fedforward.algorithms.seeds import Place
from fedforward.client.plan import Planner
from torch.func import functional_call
from torch.nn.functional import conv2d, max_pool2d, one_hot, unfold

ACTIVATIONS = (torch.nn.ReLU, torch.nn.Tanh, torch.nn.GELU)
PLAIN = PEPITA(momentum=0.0, scale=0.5, dropout=0.25)
LOCAL = replace(PLAIN, variant="time-local")


def problem(rule, net):
    return double(rule.init(net, seed=1)), nonuniform(batch(rule, shape=net.shape, classes=net.classes))


def masked(rule, a, b, i):
    """Return a with the units left out that the rule leaves out of ones."""
    return a * rule._thinned(torch.ones_like(a), b, i)


def opened(net, i, params, x):
    """Run block i by its modules, without its activation."""
    for name, layer in net.blocks[i].named_children():
        own = {key: params[f"{i}.{name}.{key}"] for key, _ in layer.named_parameters()}
        x = x if isinstance(layer, ACTIVATIONS) else functional_call(layer, own, (x,))
    return x


def product(net, i, params, x, signal, b):
    """Return the gradients of Σ signal · (block i without activation), weighted, the mean over positions."""
    params = leaves({key: params[key] for key in net.keys(i)})
    share = (b.weight / b.weight.sum()).view(-1, *[1] * (signal.dim() - 1))
    positions = signal[0, 0].numel() if signal.dim() > 2 else 1
    loss = (signal * share * opened(net, i, params, x)).sum() / positions
    return dict(zip(params, torch.autograd.grad(loss, list(params.values())), strict=True))


def activities(rule, net, params, x, b):
    """Return the inputs of all blocks, and the scores."""
    inputs = [x]
    for i in net.hidden:
        inputs.append(masked(rule, run_block(net, i, params, inputs[-1]), b, i))
    return inputs, run_block(net, net.output, params, inputs[-1])


def modulated(state, scores, b):
    """Return the error and the input with the error in it."""
    error = scores.softmax(1) - one_hot(b.y, scores.shape[1])
    return error, b.x - (error @ state.fixed["feedback"]).view_as(b.x)


def added(one, other, sign=1):
    return {key: one[key] + sign * other[key] for key in one}


def reference(rule, net, state, b):
    params, truth = state.params, {}
    first, scores = activities(rule, net, params, b.x, b)
    error, x = modulated(state, scores, b)
    second, _ = activities(rule, net, params, x, b)
    for i in net.hidden:
        a, m = first[i + 1], second[i + 1]
        if rule.variant == "hebbian":
            terms = product(net, i, params, first[i], a, b), product(net, i, params, second[i], m, b)
            truth |= added(*terms, -1)
        else:
            truth |= product(net, i, params, second[i], a - m, b)
    return truth | product(net, net.output, params, second[-1], error, b)


@pytest.mark.parametrize("variant", ["hidden", "mem", "hebbian"])
@pytest.mark.parametrize("name", NETS)
def test_one_step_subtracts_the_products_of_activities(name, variant):
    net, rule = network(name), replace(PLAIN, variant=variant)
    state, b = problem(rule, net)
    truth = reference(rule, net, state, b)
    assert_close(descent(rule, net, state, b), truth, atol=1e-9)
    assert all(g.abs().max() > 1e-6 for g in truth.values())


@pytest.mark.parametrize("name", NETS)
def test_time_local_steps_after_each_pass(name):
    net = network(name)
    state, b = problem(LOCAL, net)
    params, x, lr = copied(state).params, b.x, 0.1

    def descend(i, x, signal):
        for key, g in product(net, i, params, x, signal, b).items():
            params[key] -= lr * g

    for i in net.hidden:
        a = masked(LOCAL, run_block(net, i, params, x), b, i)
        descend(i, x, a)
        x = a
    error, x = modulated(state, run_block(net, net.output, params, x), b)
    for i in net.hidden:
        a = masked(LOCAL, run_block(net, i, params, x), b, i)
        descend(i, x, -a)
        x = a
    descend(net.output, x, error)
    step(LOCAL, net, state, b, lr)
    assert_close(state.params, params, atol=1e-9)


@pytest.mark.parametrize("activation, f", [("relu", torch.relu), ("tanh", torch.tanh)])
def test_of_dense_layers_it_is_the_papers_rule_sample_by_sample(activation, f):
    net = Network(lambda: mlp((6,), 3, hidden=(5, 4), activation=activation), (6,), 3)
    rule = replace(PLAIN, dropout=0.0)
    state, b = problem(rule, net)
    weights = [(state.params[f"{i}.linear.weight"], state.params[f"{i}.linear.bias"]) for i in range(3)]
    truth = {key: torch.zeros_like(p) for key, p in state.params.items()}
    for x, y, weight in zip(b.x, b.y, b.weight / b.weight.sum(), strict=True):
        a = [x]
        for w, bias in weights:
            a.append(f(w @ a[-1] + bias))
        e = (weights[-1][0] @ a[-2] + weights[-1][1]).softmax(0) - torch.eye(3)[y]
        m = [x - state.fixed["feedback"].T @ e]
        for w, bias in weights:
            m.append(f(w @ m[-1] + bias))
        for i, signal in enumerate([a[1] - m[1], a[2] - m[2], e]):
            truth[f"{i}.linear.weight"] += weight * torch.outer(signal, m[i])
            truth[f"{i}.linear.bias"] += weight * signal
    assert_close(descent(rule, net, state, b), truth, atol=1e-9)


def test_a_convolution_correlates_what_wins_the_pool_with_patches_and_averages_over_positions():
    net, rule = network("lenet"), replace(PLAIN, dropout=0.0)
    state, b = problem(rule, net)
    kernel, bias = state.params["0.conv2d.weight"], state.params["0.conv2d.bias"]
    _, x = modulated(state, net.forward(state.params, b.x), b)
    winners, places = max_pool2d(conv2d(x, kernel, bias, padding=2), 2, return_indices=True)
    signal = (run_block(net, 0, state.params, b.x) - winners.relu()).flatten(2)  # (B, channels, 16)
    patches = unfold(x, 5, padding=2)  # (B, 25, 64)
    truth, share = torch.zeros_like(kernel), b.weight / b.weight.sum()
    for n in range(len(b.y)):
        for c in range(len(kernel)):
            for p, place in enumerate(places[n, c].flatten()):
                truth[c, 0] += share[n] / 16 * signal[n, c, p] * patches[n, :, place].view(5, 5)
    found = descent(rule, net, state, b)
    torch.testing.assert_close(found["0.conv2d.weight"], truth, rtol=0, atol=1e-9)
    torch.testing.assert_close(found["0.conv2d.bias"], (signal.mean(2) * share[:, None]).sum(0), rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", NETS)
def test_recomputing_the_first_pass_changes_nothing(name):
    net, rule = network(name), replace(PLAIN, momentum=0.9)
    kept = double(rule.init(net, seed=1))
    forgotten = copied(kept)
    for s in range(3):
        b = nonuniform(batch(rule, step=s))
        stats = step(rule, net, kept, b, 0.1)
        assert_close(step(replace(rule, variant="mem"), net, forgotten, b, 0.1)._asdict(), stats._asdict(), atol=1e-12)
    assert_close(forgotten.params, kept.params, atol=1e-12)
    assert_close(forgotten.slots, kept.slots, atol=1e-12)


@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_a_small_error_makes_it_feedback_alignment_through_the_first_weights(activation):
    net, cosines = Network(lambda: mlp((40,), 10, hidden=(64, 32), activation=activation), (40,), 10), []
    for scale in (0.05, 1e-4):
        rule = PEPITA(momentum=0.0, dropout=0.0, scale=scale)
        state, b = problem(rule, net)
        error = net.forward(state.params, b.x).softmax(1) - one_hot(b.y, 10)
        params, tangent, x, truth = leaves(state.params), error @ state.fixed["feedback"], b.x, {}
        matrix = state.params["0.linear.weight"] @ state.fixed["feedback"].T  # (64, 10): feedback of block 0
        a = run_block(net, 0, params, x)
        loss = (a * (error @ matrix.T) * (b.weight / b.weight.sum())[:, None]).sum()
        (truth[0],) = torch.autograd.grad(loss, params["0.linear.weight"])
        for i in net.hidden:  # and what is passed on, forward, to the blocks above
            x, tangent = net.block_jvp(i, state.params, {k: torch.zeros_like(p) for k, p in params.items()}, x, tangent)
            if i == 1:
                truth[1] = (tangent * (b.weight / b.weight.sum())[:, None]).T @ a.detach()
        found = descent(rule, net, state, b)
        cosines.append(
            [
                float(torch.cosine_similarity(found[f"{i}.linear.weight"].flatten(), truth[i].flatten(), dim=0))
                for i in truth
            ]
        )
    assert min(cosines[0]) > 0.95 and min(cosines[1]) > 1 - 1e-6


def test_the_feedback_is_uniform_the_same_for_all_and_never_sent():
    net, rule = network("mlp"), PEPITA(scale=0.25)
    state = rule.init(net, seed=1)
    assert set(state.fixed) == {"feedback"} and set(state.params) == set(net.init(1))
    assert equal(state.fixed, replace(rule, variant="mem", lr=1.0).init(net, seed=1).fixed)  # of the seed alone
    feedback = state.fixed["feedback"] / (0.25 * (6 / 64) ** 0.5)
    assert feedback.shape == (10, 64) and 0.99 < feedback.abs().max() <= 1 + 1e-6
    assert abs(feedback.mean()) < 4 / (3 * feedback.numel()) ** 0.5  # 4 standard errors
    assert abs(feedback.square().mean() - 1 / 3) < 4 * (4 / 45 / feedback.numel()) ** 0.5
    before = state.fixed["feedback"].clone()
    step(rule, net, state, batch(rule, dtype=torch.float32))
    assert torch.equal(state.fixed["feedback"], before)


def test_dropout_leaves_out_its_part_by_the_place_and_the_sample():
    rule, net = PEPITA(dropout=0.2), network("mlp")
    ones = torch.ones(500, 24)
    b = batch(rule, 500, dtype=torch.float32)
    kept = rule._thinned(ones, b, 0)
    assert kept.unique().tolist() == pytest.approx([0, 1.25], rel=1e-4)
    assert float((kept == 0).float().mean()) == pytest.approx(0.2, abs=4 * (0.16 / kept.numel()) ** 0.5)
    fewer = b._replace(y=b.y[:7], draws=rule.draw(Place(0, 1, 0, 0), 7, 10))
    assert torch.equal(rule._thinned(ones[:7], fewer, 0), kept[:7])  # whatever stands below
    for other in (rule._thinned(ones, b, 1), rule._thinned(ones, batch(rule, 500, step=1), 0)):
        assert float((other == kept).float().mean()) == pytest.approx(0.68, abs=0.02)
    assert PEPITA(dropout=0.0).draw(Place(0, 1, 0, 0), 7, 10) is None
    x = torch.rand(3, *net.shape)
    assert torch.equal(rule.logits(net, rule.init(net, 0), x), net.forward(net.init(0), x))  # none at inference


def test_mirrors_follow_noise_and_their_product_is_the_feedback():
    net, rule = network("mlp-tanh"), replace(PLAIN, mirror=0.25)
    state = double(rule.init(net, seed=1))
    assert not state.fixed and {key for key in state.params if key.endswith("mirror")} == {
        f"{i}.mirror" for i in range(3)
    }
    step(rule, net, state, batch(rule, step=5), lr=0.0)
    b, before = nonuniform(batch(rule)), copied(state).params
    wanted, share = [], b.weight / b.weight.sum()
    for i in range(3):
        w = before[f"{i}.linear.weight"]
        noise = normals(b.draws, 3 + i, w.shape[1], torch.float64)
        seen = sum(s * torch.outer(w @ n, n) for s, n in zip(share, noise, strict=True))
        wanted.append(0.75 * before[f"{i}.mirror"] + 0.25 * seen)
    feedback = wanted[2] @ wanted[1] @ wanted[0]
    feedback *= 0.5 * (2 / 64) ** 0.5 / feedback.square().mean().sqrt()  # the standard deviation of uniform ones
    truth = reference(rule, net, state._replace(params=before, fixed={"feedback": feedback}), b)
    found = descent(rule, net, state, b)
    assert_close({key: found[key] for key in truth}, truth, atol=1e-9)
    assert_close(
        {f"{i}.mirror": state.params[f"{i}.mirror"] for i in range(3)},
        {f"{i}.mirror": m for i, m in enumerate(wanted)},
        atol=1e-9,
    )


def test_mirrors_tell_the_weights_and_turn_the_feedback_towards_the_gradient_in_the_input():
    net, rule = network("mlp"), replace(PLAIN, mirror=0.02)
    state = double(rule.init(net, seed=1))
    for s in range(200):
        step(rule, net, state, batch(rule, 32, step=s), lr=0.0)
    weights = [state.params[f"{i}.linear.weight"] for i in range(3)]
    for i, w in enumerate(weights):
        assert torch.cosine_similarity(state.params[f"{i}.mirror"].flatten(), w.flatten(), dim=0) > 0.9
    b, cosines = batch(rule, 200), []
    x = b.x.clone().requires_grad_()
    (truth,) = torch.autograd.grad(cross_entropy(net.forward(state.params, x), b), x)
    for feedback in (through(net, state.params), PEPITA().init(net, seed=1).fixed["feedback"].double()):
        error = net.forward(state.params, b.x).softmax(1) - one_hot(b.y, 10)
        cosines.append(float(torch.cosine_similarity(error @ feedback, truth.flatten(1)).mean()))
    assert cosines[0] > 0.5 and abs(cosines[1]) < 0.15


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_what_a_layer_more_costs(dropout):
    size, width, peaks = 64, 32, {}
    for depth in (4, 5, 8):
        net = Network(lambda: mlp((width,), 10, hidden=(width,) * depth), (width,), 10)  # noqa: B023
        for variant in ("hidden", "hebbian", "mem", "time-local"):
            rule = PEPITA(variant=variant, dropout=dropout, momentum=0.0 if variant == "time-local" else 0.9)
            peaks[variant, depth] = Planner(net).step(rule, size).parts["activations"]
    for variant in ("hidden", "hebbian"):
        assert peaks[variant, 5] - peaks[variant, 4] == 4 * size * width  # its activity
        assert peaks[variant, 8] - peaks[variant, 4] == 4 * 4 * size * width
    for variant in ("mem", "time-local"):
        assert peaks[variant, 8] == peaks[variant, 4]
    assert peaks["time-local", 8] < peaks["mem", 8] < peaks["hidden", 4]


def test_recomputing_saves_the_maps_of_a_convolutional_network():
    net = Network(lambda: lenet((1, 28, 28), 10), (1, 28, 28), 10)
    plans = {v: Planner(net).step(PEPITA(variant=v), 64) for v in ("hidden", "mem")}
    assert plans["mem"].parts["activations"] < plans["hidden"].parts["activations"]
    # Forward twice and once for the products, or thrice and once: of the paper's 3 and 4.
    passes = {v: plan.flops / plan.forward_flops for v, plan in plans.items()}
    assert passes["hidden"] == pytest.approx(3, abs=0.05) and passes["mem"] == pytest.approx(4, abs=0.05)


def test_impossible_settings_are_refused():
    with pytest.raises(RuleError, match="unknown variant 'other': use one of hidden, hebbian, time-local, mem"):
        PEPITA(variant="other")
    with pytest.raises(RuleError, match=r"0 ≤ rule.dropout < 1"):
        PEPITA(dropout=1.0)
    with pytest.raises(RuleError, match=r"0 ≤ rule.mirror ≤ 1"):
        PEPITA(mirror=1.5)
    with pytest.raises(RuleError, match=r"rule.mirror is of dense layers .*: leave it out"):
        PEPITA(mirror=0.01).check(network("lenet"))
    PEPITA(mirror=0.01).check(network("mlp"))
    PEPITA().check(network("lenet"))
    for changes in ({"momentum": 0.9}, {"momentum": 0.0, "optimizer": "adam"}):
        with pytest.raises(RuleError, match=r"plain sgd alone: use --set rule.momentum=0.0"):
            PEPITA(variant="time-local", **changes).check(network("mlp"))
    LOCAL.check(network("lenet"))


@pytest.mark.parametrize("variant", ["hidden", "hebbian", "mem", "time-local"])
def test_replicas_side_by_side_have_masks_of_their_own(variant):
    net, rule = network("mlp-tanh"), replace(PLAIN, variant=variant)
    assert rule.stackable(net)
    alone = [double(rule.init(net, seed)) for seed in range(3)]
    stacked = {key: torch.stack([state.params[key] for state in alone]) for key in alone[0].params}
    batches = [nonuniform(batch(rule, seed=c, client=c)) for c in range(3)]
    whole = Batch(*(torch.stack(column) for column in zip(*(b[:4] for b in batches), strict=True)))
    step(rule, net, State(stacked, alone[0].fixed, {}), whole._replace(x=whole.x.flatten(2)), 0.1)
    for c, (state, b) in enumerate(zip(alone, batches, strict=True)):
        step(rule, net, state._replace(fixed=alone[0].fixed), b, 0.1)
        assert_close({key: p[c] for key, p in stacked.items()}, state.params, atol=1e-12)
