"""Product feedback alignment: its equations, the law of its gap, and the alignment that follows from it."""

from dataclasses import replace

import pytest
import torch
from cases import CLASSES, NETS, SHAPE, assert_close, batch, descent, double, leaves, network, nonuniform, step
from cases import weighted_cross_entropy as cross_entropy
from fedforward.algorithms import Network, RuleError
from fedforward.algorithms.feedback.product_feedback_alignment import ProductFeedbackAlignment
from fedforward.algorithms.feedback.ways import ways
from fedforward.algorithms.models import mlp
from fedforward.algorithms.seeds import Place
from fedforward.client.plan import Planner
from test_transport import apply, assert_side_by_side_as_alone, pseudo_gradients
from torch import nn

RULE = ProductFeedbackAlignment(lr=0.1, momentum=0.0, weight_decay=0.0)
PLAIN = replace(RULE, strong_decay=0.0)
VARIANTS = {"orthogonal": PLAIN, "wide": replace(PLAIN, ratio=3, orthogonal=False)}


def joined(feedback, learned):
    """Return B R, shaped like the forward weights."""
    return torch.einsum("nk,k...->n...", feedback, learned)


def gap(net, state, i):
    """Return R − Bᵀ W of block i."""
    weight = state.params[ways(net)[i].weight]
    return state.params[f"{i}.return"] - joined(state.fixed[f"{i}.feedback"].T, weight)


def cosine(a, b):
    return float(torch.cosine_similarity(a.flatten(), b.flatten(), dim=0))


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_one_step_subtracts_the_gradient_of_the_way_back_through_two_matrices(variant, name):
    rule, net = VARIANTS[variant], network(name)
    state, b = double(rule.init(net, seed=1)), nonuniform(batch(rule))

    def stand_in(i, layer, x, params):
        inner, feedback = apply(layer, params[f"{i}.return"], x), state.fixed[f"{i}.feedback"]
        return inner @ feedback.T if isinstance(layer, nn.Linear) else torch.einsum("nk,bk...->bn...", feedback, inner)

    truth = pseudo_gradients(net, state.params, b, stand_in)
    assert_close(descent(rule, net, state, b), truth, atol=1e-9)
    assert all(g.abs().max() > 1e-8 for g in truth.values())


def test_two_steps_are_the_papers_equations_sample_by_sample():
    net, rule = network("mlp"), replace(RULE, ratio=2, momentum=0.5, weight_decay=0.01, strong_decay=0.2)
    state, b, lr = double(rule.init(net, seed=1)), nonuniform(batch(rule)), 0.1
    params = {key: p.clone() for key, p in state.params.items()}
    velocity = {key: torch.zeros_like(p) for key, p in params.items()}
    for _ in range(2):
        step(rule, net, state, b, lr)
        grads = {key: torch.zeros_like(p) for key, p in params.items()}
        for x, y, weight in zip(b.x, b.y, b.weight, strict=True):
            a = [x.flatten()]
            for i in range(3):
                z = params[f"{i}.linear.weight"] @ a[-1] + params[f"{i}.linear.bias"]
                a.append(z.clamp_min(0) if i < 2 else z.softmax(0))
            g = a[3].clone()
            g[y] -= 1
            g *= weight / b.weight.sum()
            for i in (2, 1, 0):
                grads[f"{i}.linear.weight"] += torch.outer(g, a[i])
                grads[f"{i}.linear.bias"] += g
                if i > 0:
                    m = g @ state.fixed[f"{i}.feedback"]
                    grads[f"{i}.return"] += torch.outer(m, a[i])
                    g = (m @ params[f"{i}.return"]) * (a[i] > 0)
        for key, p in params.items():
            p *= 1 - lr * 0.2 / 0.5  # strong decay, at the rate that it would have through the momentum
            velocity[key] = 0.5 * velocity[key] + grads[key] + 0.01 * p
            p -= lr * velocity[key]
    assert_close(state.params, params, atol=1e-9)
    assert_close({key: state.slots[f"{key}.velocity"] for key in params}, velocity, atol=1e-9)


@pytest.mark.parametrize("name", NETS)
def test_where_the_gap_is_closed_it_is_backpropagation(name):
    net = network(name)
    state, b = double(PLAIN.init(net, seed=1)), nonuniform(batch(PLAIN))
    for i in range(1, len(net.blocks)):
        feedback = torch.linalg.qr(state.fixed[f"{i}.feedback"])[0]  # orthogonal in float64 too
        state.fixed[f"{i}.feedback"].copy_(feedback)
        state.params[f"{i}.return"].sub_(gap(net, state, i))
    weights = {key: p for key, p in state.params.items() if not key.endswith("return")}
    params = leaves(weights)
    loss = cross_entropy(net.forward(params, b.x), b)
    truth = dict(zip(params, torch.autograd.grad(loss, list(params.values())), strict=True))
    found = descent(PLAIN, net, state, b)
    assert_close({key: found[key] for key in truth}, truth, atol=1e-9)


@pytest.mark.parametrize("name", ["mlp", "lenet", "cnn-group"])
@pytest.mark.parametrize("ratio, orthogonal, momentum", [(1, True, 0.0), (2, False, 0.9)])
def test_the_gap_shrinks_by_the_decay_alone(name, ratio, orthogonal, momentum):
    rule = replace(RULE, ratio=ratio, orthogonal=orthogonal, momentum=momentum, strong_decay=0.1)
    net = network(name)
    state = double(rule.init(net, seed=1))
    wanted, rates = {i: gap(net, state, i) for i in range(1, len(net.blocks))}, (0.1, 0.05, 0.02, 0.1)
    for s, lr in enumerate(rates):
        b = nonuniform(batch(rule, step=s))
        if s == 2:
            b = b._replace(draws=rule.draw(Place(0, 2, 0, s), 6, CLASSES))  # a round without strong decay
        step(rule, net, state, b, lr)
        left = 1 - (lr * 0.1 / (1 - momentum) if s != 2 else 0)
        wanted = {i: gap * left for i, gap in wanted.items()}
    assert_close({i: gap(net, state, i) for i in wanted}, wanted, atol=1e-9)


def test_the_strong_decay_ends_with_its_rounds():
    net, lr = network("mlp"), 0.1
    for rounds in (0, 1, 3):
        rule = replace(RULE, strong_rounds=rounds)
        for r in (1, 2, 3, 4):
            state = double(rule.init(net, seed=1))
            start = {key: p.clone() for key, p in state.params.items()}
            b = batch(rule)._replace(weight=torch.zeros(6).double(), draws=rule.draw(Place(0, r, 0, 7), 6, CLASSES))
            step(rule, net, state, b, lr)  # of no sample, so that nothing but decay is seen
            left = 1 - lr * rule.strong_decay * (r <= rounds)
            assert_close(state.params, {key: p * left for key, p in start.items()}, atol=1e-12)


def test_a_short_run_aligns_the_way_back_with_the_weights():
    net, rule = Network(lambda: mlp(SHAPE, CLASSES, hidden=(24, 16)), SHAPE, CLASSES), ProductFeedbackAlignment()
    state = rule.init(net, seed=1)

    def cosines():
        weights = [state.params[ways(net)[i].weight] for i in (1, 2)]
        backs = [joined(state.fixed[f"{i}.feedback"], state.params[f"{i}.return"]) for i in (1, 2)]
        return [cosine(w, back) for w, back in zip(weights, backs, strict=True)]

    assert max(map(abs, cosines())) < 0.3
    for s in range(200):
        step(rule, net, state, batch(rule, 16, step=s % 4, dtype=torch.float32))
    assert min(cosines()) > 0.7


def test_feedback_is_orthogonal_or_so_in_the_mean():
    net = Network(lambda: mlp(SHAPE, CLASSES, hidden=(60, 60)), SHAPE, CLASSES)
    for ratio in (1, 2):
        feedback = replace(RULE, ratio=ratio).init(net, seed=1).fixed["1.feedback"]
        assert feedback.shape == (60, 60 * ratio)
        torch.testing.assert_close(feedback @ feedback.T, torch.eye(60), rtol=0, atol=1e-5)
        state = replace(RULE, ratio=ratio, orthogonal=False).init(net, seed=1)
        feedback, weight = state.fixed["1.feedback"], state.params["1.linear.weight"]
        assert float((feedback @ feedback.T).diagonal().mean()) == pytest.approx(1, rel=0.05)
        assert cosine(feedback @ feedback.T @ weight, weight) == pytest.approx((ratio / (ratio + 1)) ** 0.5, abs=0.03)


def test_learned_feedback_travels_and_fixed_feedback_does_not():
    net, rule = network("lenet"), replace(RULE, ratio=2)
    state = rule.init(net, seed=1)
    assert set(state.params) - set(net.init(1)) == {"1.return", "2.return"}
    assert set(state.fixed) == {"1.feedback", "2.feedback"}
    for i in (1, 2):
        units, *inputs = state.params[ways(net)[i].weight].shape
        assert state.params[f"{i}.return"].shape == (2 * units, *inputs)
        assert state.fixed[f"{i}.feedback"].shape == (units, 2 * units)


@pytest.mark.parametrize(
    "rule", [replace(RULE, momentum=0.5, weight_decay=0.1), replace(RULE, ratio=2, orthogonal=False)]
)
@pytest.mark.parametrize("net", ["mlp", "mlp-tanh", "flat"])
def test_replicas_side_by_side_learn_what_each_learns_alone(rule, net):
    assert rule.stackable(network(net)) and not rule.stackable(network("lenet"))
    assert_side_by_side_as_alone(rule, network(net))


def activations(rule, depth, size=64, width=32):
    net = Network(lambda: mlp(SHAPE, CLASSES, hidden=(width,) * depth), SHAPE, CLASSES)
    return Planner(net).step(rule, size).parts["activations"]


@pytest.mark.parametrize("ratio", [1, 3])
def test_every_layer_more_stores_its_activity_and_one_block_its_m(ratio):
    rule = replace(RULE, ratio=ratio)
    more = [activations(rule, depth) for depth in (4, 8, 16)]
    assert more[1] - more[0] == 4 * 4 * 64 * 32 and more[2] - more[1] == 8 * 4 * 64 * 32
    # Activities, dz, m, the error below, and of little things some bias's gradient, stats, and the decay.
    assert 0 <= more[0] - 4 * 64 * 32 * (4 - 1 + 2 + ratio) < 1000


def test_what_it_cannot_do_is_refused():
    with pytest.raises(RuleError, match="linear in the gradient: use optimizer=sgd"):
        ProductFeedbackAlignment(optimizer="adam")
    for wrong in ({"ratio": 0}, {"strong_decay": -1.0}, {"strong_rounds": -1}):
        with pytest.raises(RuleError, match="ratio ≥ 1, strong_decay ≥ 0 and strong_rounds ≥ 0"):
            ProductFeedbackAlignment(**wrong)
    grouped = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(64, 10)
    )
    with pytest.raises(RuleError, match="use convolutions of one group"):
        RULE.check(Network(grouped, SHAPE, CLASSES))


def test_a_decay_that_leaves_nothing_and_a_momentum_of_1_are_refused():
    with pytest.raises(RuleError, match="must leave something: lower it"):
        ProductFeedbackAlignment(strong_decay=3.0)
    with pytest.raises(RuleError, match="0 ≤ momentum < 1"):
        ProductFeedbackAlignment(momentum=1.0)
