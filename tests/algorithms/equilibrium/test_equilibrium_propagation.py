"""Equilibrium propagation: the equations by loops, the gradient at equilibrium, and what homeostasis does for it."""

import cmath
from dataclasses import replace

import numpy as np
import pytest
import torch
from cases import CLASSES, SHAPE, assert_close, batch, copied, descent, double, leaves, network, nonuniform, step
from cases import weighted_cross_entropy as cross_entropy
from fedforward.algorithms import Batch, Network, RuleError, State
from fedforward.algorithms.equilibrium.equilibrium_propagation import EquilibriumPropagation
from fedforward.algorithms.models import cnn, mlp
from fedforward.client.memory import PeakMemory
from fedforward.client.plan import Planner
from fedforward.client.step import accumulators, residents, take_step
from sklearn.datasets import load_digits

OWN = EquilibriumPropagation(momentum=0.0, relaxation=3, nudged=2, homeostasis=5.0)
TIED = replace(OWN, feedback="tied")
SETTLED = replace(OWN, relaxation=80, nudged=80, homeostasis=0.0)
EVERY = (OWN, TIED, replace(OWN, phases=1), replace(OWN, phases=3), replace(OWN, phases=4), replace(TIED, phases=5))

DEEP = Network(lambda: mlp((6,), 4, hidden=(7, 5, 6), activation="tanh"), (6,), 4)


def matrices(rule, net, params):
    """Return W_l, b_l and B_l, of hidden layers and the output."""
    w = [params[f"{i}.linear.weight"] for i in range(len(net.blocks))]
    b = [params[f"{i}.linear.bias"] for i in range(len(net.blocks))]
    return w, b, [params.get(f"{i}.back", w[i]) for i in range(len(net.blocks))]


def swept(rule, net, params, x, y, s, beta, order):
    """Move the layers of one sample, vectors s that may be complex, in this order."""
    w, b, back = matrices(rule, net, params)
    f = {"ReLU": torch.relu, "Tanh": torch.tanh}[type(net.blocks[0][-1]).__name__]
    for i in order:
        u = w[i].to(s[i].dtype) @ (s[i - 1] if i else x.to(s[i].dtype)) + b[i]
        if i + 1 in net.hidden:
            u = u + rule.gain * (s[i + 1] @ back[i + 1].to(s[i].dtype))
        elif beta:
            z = torch.exp(w[-1].to(s[i].dtype) @ s[i] + b[-1])
            u = u - beta * ((z / z.sum() - torch.eye(net.classes)[y]) @ w[-1].to(s[i].dtype))
        s[i] = f(u)


def by_loops(rule, net, params, b):
    """Return the gradients of one step, sample by sample and phase by phase, without homeostasis."""
    grads = {key: torch.zeros_like(p) for key, p in params.items()}
    w, biases, _ = matrices(rule, net, params)
    for x, y, weight in zip(b.x.flatten(1), b.y, b.weight, strict=True):
        s = [torch.zeros(net.sizes[i], dtype=torch.float64) for i in net.hidden]
        for _ in range(rule.relaxation):
            swept(rule, net, params, x, y, s, 0.0, net.hidden)
        deltas = [torch.zeros_like(a) for a in s]
        for k in range(rule.phases):
            beta = rule.beta * cmath.exp(2j * cmath.pi * k / rule.phases)
            if rule.phases <= 2:
                beta = beta.real
            moved = [a + 0 * beta for a in s]
            for _ in range(rule.nudged):
                swept(rule, net, params, x, y, moved, beta, reversed(net.hidden))
            for i in net.hidden:
                answer = moved[i] - s[i] if rule.phases == 1 else moved[i]
                deltas[i] -= (answer / beta).real / rule.phases / rule.gain ** (len(s) - 1 - i)
        share = weight / b.weight.sum()
        error = share * (torch.softmax(w[-1] @ s[-1] + biases[-1], 0) - torch.eye(net.classes)[y])
        grads[f"{net.output}.linear.weight"] += torch.outer(error, s[-1])
        grads[f"{net.output}.linear.bias"] += error
        for i in net.hidden:
            grads[f"{i}.linear.weight"] += share * torch.outer(deltas[i], s[i - 1] if i else x)
            grads[f"{i}.linear.bias"] += share * deltas[i]
            if i:
                key = f"{i}.back" if rule.feedback == "own" else f"{i}.linear.weight"
                grads[key] += share * rule.gain * torch.outer(s[i], deltas[i - 1])
    return grads


def jacobian(rule, net, params):
    """Return J of F in the activities s_l γ^{l/2}, at a point, by autograd; F(s) = W s + γ B s − f⁻¹(s)."""
    w, _, back = matrices(rule, net, params)
    sizes = [net.sizes[i][0] for i in net.hidden]
    units = [rule.gain ** (i / 2) for i in net.hidden]

    def force(stacked):
        s, out = [a / unit for a, unit in zip(stacked.split(sizes), units, strict=True)], []
        for i in net.hidden:
            u = -torch.atanh(s[i]) + (w[i] @ s[i - 1] if i else 0)
            out.append(units[i] * (u + (rule.gain * s[i + 1] @ back[i + 1] if i + 1 in net.hidden else 0)))
        return torch.cat(out)

    point = torch.linspace(-0.1, 0.1, sum(sizes), dtype=torch.float64)
    return torch.autograd.functional.jacobian(force, point, create_graph=True)


@pytest.mark.parametrize(
    "name, rule",
    [(name, rule) for name in ("mlp", "mlp-tanh", "deep") for rule in EVERY if name != "mlp" or rule.phases <= 2],
)
def test_a_step_is_the_equations_by_loops_and_the_gradient_of_homeostasis(name, rule):
    net = DEEP if name == "deep" else network(name)
    state = double(rule.init(net, seed=1))
    b = nonuniform(batch(rule, shape=net.shape, classes=net.classes))
    truth = by_loops(rule, net, state.params, b)
    if rule.feedback == "own" and name != "mlp":
        params = leaves(state.params)
        j = jacobian(rule, net, params)
        loss = rule.homeostasis * (j.square().sum() - (j @ j).trace()) / len(j)
        added = torch.autograd.grad(loss, list(params.values()), materialize_grads=True)
        truth = {key: truth[key] + g for key, g in zip(params, added, strict=True)}
    else:
        rule = replace(rule, homeostasis=0.0)
    assert_close(descent(rule, net, state, b), truth, atol=1e-9)
    assert all(g.abs().max() > 1e-9 for g in truth.values())


def test_homeostasis_is_the_mean_of_the_papers_estimator():
    state = double(OWN.init(DEEP, seed=1))
    j = jacobian(OWN, DEEP, state.params)
    draws = torch.randn(20_000, len(j), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    je = draws @ j.T
    found = (je.square().sum(1) - (draws * (je @ j.T)).sum(1)) / len(j)
    pairs = [state.params[f"{i}.linear.weight"] - state.params[f"{i}.back"] for i in (1, 2)]
    closed = OWN.gain * sum(p.square().sum() for p in pairs) / len(j)
    assert closed > 0.05
    assert abs(found.mean() - closed) < 4 * found.std() / 20_000**0.5 < 0.1 * closed


def test_what_it_settles_to_is_the_fixed_point_of_all_layers_moving_at_once():
    rule, net = SETTLED, DEEP
    state, b = double(rule.init(net, seed=1)), batch(rule, shape=net.shape, classes=net.classes)
    w, biases, back = matrices(rule, net, state.params)
    u = [torch.zeros(6, *net.sizes[i], dtype=torch.float64) for i in net.hidden]
    for _ in range(200):
        s, f = [b.x, *map(torch.tanh, u)], []
        for i in net.hidden:
            f.append(s[i] @ w[i].T + biases[i] - u[i])
            if i + 1 in net.hidden:
                f[i] += rule.gain * s[i + 2] @ back[i + 1]
        u = [a + df for a, df in zip(u, f, strict=True)]
    scores = torch.tanh(u[-1]) @ w[-1].T + biases[-1]
    torch.testing.assert_close(rule.logits(net, state, b.x), scores, rtol=0, atol=1e-12)
    assert (rule.logits(net, state, b.x) - net.forward(state.params, b.x)).abs().max() > 1e-3


def at_equilibrium(rule, net, params, b, sweeps=80):
    """Return the gradient of the cross-entropy at equilibrium, by autograd through a long relaxation."""
    params = leaves(params)
    w, biases, back = matrices(rule, net, params)
    f = {"ReLU": torch.relu, "Tanh": torch.tanh}[type(net.blocks[0][-1]).__name__]
    s = [torch.zeros(len(b.y), *net.sizes[i], dtype=torch.float64) for i in net.hidden]
    for _ in range(sweeps):
        for i in net.hidden:
            u = (s[i - 1] if i else b.x.flatten(1)) @ w[i].T + biases[i]
            s[i] = f(u + rule.gain * s[i + 1] @ back[i + 1] if i + 1 in net.hidden else u)
    loss = cross_entropy(s[-1] @ w[-1].T + biases[-1], b)
    return dict(zip(params, torch.autograd.grad(loss, list(params.values())), strict=True))


def cosines(rule, net, params, b):
    """Return the cosine of each block's step, without homeostasis, with the gradient at equilibrium."""
    rule = replace(rule, homeostasis=0.0, momentum=0.0)
    truth = at_equilibrium(rule, net, params, b)
    found = descent(rule, net, copied(State(params, {}, {})), b)
    return {key: float(torch.cosine_similarity(g.flatten(), truth[key].flatten(), 0)) for key, g in found.items()}


@pytest.mark.parametrize("phases, gain", [(1, 0.25), (2, 0.25), (3, 0.25), (4, 0.25), (6, 0.25), (4, 1.0)])
def test_with_tied_feedback_the_error_of_n_phases_falls_as_the_nth_power_of_the_nudge(phases, gain):
    sweeps = 40 if gain < 1 else 150
    rule = replace(SETTLED, feedback="tied", phases=phases, gain=gain, relaxation=sweeps, nudged=sweeps)
    state = double(rule.init(DEEP, seed=1))
    for p in state.params.values():
        p.mul_(1.3)  # far from linear, and settled yet
    b, errors = nonuniform(batch(rule, shape=(6,), classes=4)), []
    truth = at_equilibrium(rule, DEEP, state.params, b, sweeps)
    for beta in (1.0, 0.5):
        found = descent(replace(rule, beta=beta), DEEP, copied(state), b)
        errors.append(sum((found[key] - g).square().sum() for key, g in truth.items() if key[0] != "3") ** 0.5)
    scale = sum(g.square().sum() for g in truth.values()) ** 0.5
    assert errors[1] < {1: 0.3, 2: 0.05, 3: 0.03, 4: 0.005, 6: 5e-4}[phases] * scale
    assert errors[0] / errors[1] == pytest.approx(2**phases, rel=0.35)


@pytest.mark.parametrize("name", ["mlp", "mlp-tanh"])
def test_a_small_nudge_of_tied_feedback_gives_the_gradients_direction(name):
    net, rule = network(name), replace(SETTLED, feedback="tied", beta=1e-3)
    state = double(rule.init(net, seed=1))
    assert min(cosines(rule, net, state.params, nonuniform(batch(rule))).values()) > 1 - 1e-5


def test_with_feedback_of_its_own_the_estimate_is_biased_however_many_phases():
    net, rule = network("mlp-tanh"), replace(SETTLED, phases=6)
    state = double(rule.init(net, seed=1))
    found = cosines(rule, net, state.params, nonuniform(batch(rule)))
    assert abs(found["0.linear.weight"]) < 0.5 and abs(found["1.back"]) < 0.5
    assert found["2.linear.weight"] > 1 - 1e-9, "the read-out's own gradient has no bias"


def digits():
    x, y = (torch.from_numpy(a) for a in load_digits(return_X_y=True))
    return x.float().view(-1, *SHAPE) / 16, y


def trained(rule, net, epochs, size):
    """Return the replica after some epochs over 1,437 digits."""
    (x, y), rng, state = digits(), np.random.default_rng(0), rule.init(net, seed=0)
    train = torch.from_numpy(rng.permutation(len(y)))[:1437]
    for epoch in range(epochs):
        lr = rule.lr * min(1, 2 * (1 - epoch / epochs))
        for rows in train[torch.from_numpy(rng.permutation(len(train)))].split(size):
            step(rule, net, state, Batch(x[rows], y[rows], torch.ones(len(rows))), lr)
    return state


@pytest.mark.parametrize("activation", ["tanh", pytest.param("relu", marks=pytest.mark.slow)])
def test_homeostasis_aligns_every_block_with_the_gradient_at_equilibrium(activation):
    # The paper's claim. Without it blocks align too, by learning as B learns, but less.
    net = Network(lambda: mlp(SHAPE, CLASSES, hidden=(32, 32), activation=activation), SHAPE, CLASSES)
    x, y = digits()
    b = Batch(x[:64].double(), y[:64], torch.ones(64, dtype=torch.float64))
    phases, found = 2 if activation == "relu" else 4, []
    for homeostasis in (0.0, 10.0):
        rule = EquilibriumPropagation(lr=0.02, homeostasis=homeostasis)
        state = trained(rule, net, epochs=2, size=32)
        measured = replace(rule, phases=phases, relaxation=80, nudged=80)
        found.append(cosines(measured, net, double(state).params, b))
    without, aligned = found
    for key in ("0.linear.weight", "0.linear.bias", "1.linear.weight", "1.back"):
        assert aligned[key] > 0.95 and 1 - aligned[key] < (1 - without[key]) / 2, key
    assert without["0.linear.weight"] < 0.8


def test_homeostasis_alone_makes_the_feedback_the_weights():
    rule, net = replace(OWN, homeostasis=100.0), DEEP
    state = double(rule.init(net, seed=1))
    b = batch(rule, shape=(6,), classes=4)
    apart = [(state.params["1.linear.weight"] - state.params["1.back"]).norm()]
    for _ in range(20):
        step(rule, net, state, b, lr=0.02)
        apart.append((state.params["1.linear.weight"] - state.params["1.back"]).norm())
    factor = 1 - 0.02 * 4 * rule.homeostasis * rule.gain / 18  # both move
    assert apart[-1] / apart[0] == pytest.approx(factor**20, rel=0.1)


def test_a_nudge_reaches_the_first_layer_in_its_first_sweep():
    net = Network(lambda: mlp((6,), 4, hidden=(7, 5, 6, 5), activation="tanh"), (6,), 4)
    rule = replace(OWN, nudged=1, homeostasis=0.0)
    found = descent(rule, net, double(rule.init(net, seed=1)), batch(rule, shape=(6,), classes=4))
    assert all(g.abs().max() > 1e-9 for g in found.values())


MAPS = Network(lambda: cnn(SHAPE, CLASSES, channels=(4, 6), activation="tanh"), SHAPE, CLASSES)


@pytest.mark.parametrize("net", [network("mlp-tanh"), MAPS], ids=["mlp", "cnn"])
@pytest.mark.parametrize("rule", [OWN, TIED, replace(OWN, phases=4)], ids=repr)
def test_the_parts_of_a_batch_add_up(rule, net):
    whole, split = (double(rule.init(net, seed=1)) for _ in range(2))
    split = split._replace(gradients=accumulators(rule, split.params))
    b = nonuniform(batch(rule, 7))
    parts = [Batch(b.x[rows], b.y[rows], b.weight[rows], None, b.weight.sum()) for rows in (slice(0, 3), slice(3, 7))]
    a, _ = take_step(rule, net, whole, [b], 0.3)
    c, _ = take_step(rule, net, split, parts, 0.3)
    assert_close(split.params, whole.params, atol=1e-12)
    assert_close(c._asdict(), a._asdict(), atol=1e-12)


# What the contract's tests cannot run on a network of ReLU: complex phases.
HOLOMORPHIC = [replace(OWN, phases=4), replace(TIED, phases=3)]


@pytest.mark.parametrize("rule", HOLOMORPHIC, ids=repr)
def test_complex_phases_run_under_vmap_and_side_by_side(rule):
    net, states, batches = network("mlp-tanh"), [], [nonuniform(batch(OWN, 5, client=c)) for c in range(3)]
    alone = [double(rule.init(net, seed)) for seed in range(3)]
    stacked = [{key: torch.stack([s.params[key] for s in alone]) for key in alone[0].params} for _ in range(2)]
    x, y, weight = (torch.stack([b[i] for b in batches]) for i in range(3))

    def run(params, x, y, weight):
        return step(rule, net, alone[0]._replace(params=params), Batch(x, y, weight), 0.3)

    found = [torch.func.vmap(run)(stacked[0], x, y, weight)]
    assert rule.stackable(net)
    found.append(step(rule, net, alone[0]._replace(params=stacked[1]), Batch(x.flatten(2), y, weight), 0.3))
    states = [(state, step(rule, net, state, b, 0.3)) for state, b in zip(alone, batches, strict=True)]
    for params, stats in zip(stacked, found, strict=True):
        for c, (state, own) in enumerate(states):
            assert_close({k: p[c] for k, p in params.items()}, state.params, atol=1e-12)
            assert_close({k: v[c] for k, v in stats._asdict().items()}, own._asdict(), atol=1e-12)


@pytest.mark.parametrize("rule", HOLOMORPHIC, ids=repr)
def test_in_complex_phases_a_sample_of_weight_0_changes_nothing(rule):
    net, b = network("mlp-tanh"), nonuniform(batch(rule))
    kept = b.weight > 0
    state, other = (double(rule.init(net, seed=1)) for _ in range(2))
    step(rule, net, state, b._replace(x=torch.where(kept[:, None, None, None], b.x, 100.0)))
    step(rule, net, other, Batch(b.x[kept], b.y[kept], b.weight[kept]))
    assert_close(state.params, other.params, atol=1e-12)


@pytest.mark.parametrize("rule", HOLOMORPHIC, ids=repr)
def test_complex_phases_are_planned_as_they_run(rule):
    net = network("mlp-tanh")
    plan, state = Planner(net).step(rule, 6), rule.init(net, seed=1)
    meter = PeakMemory(residents(state, {}))
    take_step(rule, net, state, [batch(rule, dtype=torch.float32)], 0.01, meter)
    assert (plan.peak, plan.op, plan.parts, plan.flops) == (meter.peak, meter.op, meter.parts, meter.flops)


@pytest.mark.parametrize("phases, numbers", [(1, 2), (2, 3), (4, 4)])
def test_a_layer_more_stores_its_states_and_no_time(phases, numbers):
    peaks = []
    for depth in (3, 6):
        net = Network(lambda: mlp((40,), 10, hidden=(64,) * depth, activation="tanh"), (40,), 10)  # noqa: B023
        rule = EquilibriumPropagation(phases=phases, relaxation=2, nudged=2)
        plans = [Planner(net).step(replace(rule, **more), 128) for more in ({}, {"relaxation": 3}, {"nudged": 3})]
        assert len({plan.peak for plan in plans}) == 1
        peaks.append(plans[0].parts["activations"])
    assert peaks[1] - peaks[0] == 3 * numbers * 4 * 128 * 64


def test_a_sweep_costs_a_pass_forward_and_back_between_hidden_layers_and_a_nudged_one_the_output_block_too():
    net, size = Network(lambda: mlp((40,), 10, hidden=(30, 20)), (40,), 10), 16
    once, top = 2 * 2 * size * 30 * 20, 2 * 2 * size * 20 * 10

    def flops(**changes):
        return Planner(net).step(replace(OWN, **changes), size).flops

    assert flops(relaxation=9) - flops(relaxation=3) == 6 * once
    assert flops(nudged=9) - flops(nudged=2) == 2 * 7 * (once + top)
    assert Planner(net).inference(OWN, size).flops == 2 * size * (40 * 30 + 20 * 10 + 30 * 20) + 2 * once


def test_stats_are_of_the_equilibrium_without_a_nudge():
    net, b = network("mlp"), nonuniform(batch(OWN))
    state = double(OWN.init(net, seed=1))
    scores = OWN.logits(net, state, b.x)
    stats = step(OWN, net, state, b)
    torch.testing.assert_close(stats.loss, cross_entropy(scores, b) * b.weight.sum(), rtol=0, atol=1e-12)
    assert stats.correct == ((scores.argmax(1) == b.y) * b.weight).sum()


def test_learned_feedback_travels_and_tied_feedback_is_no_parameter():
    own, tied = (rule.init(network("mlp"), 0) for rule in (OWN, TIED))
    assert set(own.params) - set(tied.params) == {"1.back"} and not own.fixed
    assert own.params["1.back"].shape == own.params["1.linear.weight"].shape
    w, b = own.params["1.linear.weight"], own.params["1.back"]
    assert float(w.square().mean() / b.square().mean()) == pytest.approx(1, rel=0.3)
    assert abs(torch.cosine_similarity(w.flatten(), b.flatten(), 0)) < 4 / w.numel() ** 0.5


def test_a_layer_without_bias_learns():
    net = Network(
        torch.nn.Sequential(torch.nn.Linear(6, 5, bias=False), torch.nn.Tanh(), torch.nn.Linear(5, 3)), (6,), 3
    )
    for rule in (OWN, replace(OWN, phases=4)):
        state, b = double(rule.init(net, seed=1)), batch(rule, shape=(6,), classes=3)
        found = descent(rule, net, state, b)
        assert set(found) == {"0.linear.weight", "1.linear.weight", "1.linear.bias"}
        assert all(g.abs().max() > 1e-6 for g in found.values())


def test_refusals_name_the_remedy():
    for net in (
        Network(lambda: mlp(SHAPE, CLASSES, hidden=()), SHAPE, CLASSES),
        Network(torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Linear(5, 3), torch.nn.Tanh()), (6,), 3),
    ):
        with pytest.raises(RuleError, match="use mlp"):
            OWN.check(net)
    with pytest.raises(RuleError, match=r"block 0 \(flatten-linear-gelu\) is no such: use model\.activation=tanh"):
        OWN.check(network("mlp-gelu"))
    with pytest.raises(RuleError, match=r"use model\.activation=tanh or rule\.phases=2"):
        replace(OWN, phases=4).check(network("mlp"))
    with pytest.raises(RuleError, match="use own or tied"):
        EquilibriumPropagation(feedback="fixed")
    for setting in ({"phases": 0}, {"relaxation": 0}, {"nudged": 0}):
        with pytest.raises(RuleError, match="relaxation and nudged ≥ 1"):
            EquilibriumPropagation(**setting)
    for setting in ({"beta": 0.0}, {"gain": 0.0}, {"homeostasis": -1.0}):
        with pytest.raises(RuleError, match=r"beta ≥ 0.0001 .*, gain > 0 and homeostasis ≥ 0"):
            EquilibriumPropagation(**setting)
