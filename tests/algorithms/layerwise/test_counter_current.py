"""Counter-current learning: local losses by loops, tensors clipped one by one, and memory that depth barely touches."""

from dataclasses import replace

import pytest
import torch
from cases import (
    CLASSES,
    SHAPE,
    assert_close,
    batch,
    copied,
    descent,
    double,
    leaves,
    network,
    nonuniform,
    run_block,
    step,
)
from cases import weighted_cross_entropy as cross_entropy
from fedforward.algorithms import Batch, Network, RuleError
from fedforward.algorithms.layerwise.counter_current import CounterCurrent
from fedforward.algorithms.models import lenet, mlp
from fedforward.client.plan import Planner
from fedforward.client.step import accumulators, take_step
from torch import nn

RULE = CounterCurrent(clip=0.0)
DENSE = {"mlp": torch.relu, "mlp-tanh": torch.tanh, "mlp-gelu": nn.functional.gelu, "flat": torch.relu}


def local_losses(net, params, b, f, scale=128.0):
    """Return the losses of every level and the output's, sample by sample and class by class, every arrow cut."""
    levels, last = {}, len(net.blocks)
    rows = torch.eye(CLASSES, dtype=b.x.dtype)
    for i in reversed(range(last)):
        rows = rows.detach() @ params[f"{i}.feedback"].T
        rows = f(rows) if i else rows  # an input is on both sides of 0
        levels[i] = rows
    losses, a = [], b.x
    for level in range(last):
        flat, width = a.flatten(1), levels[level].shape[1]
        total = 0.0
        for i in range(len(b.y)):
            for c in range(CLASSES):
                meets = flat[i] @ levels[level][c]
                total += b.weight[i] / b.weight.sum() * (meets - float(b.y[i] == c)) ** 2 / CLASSES
        losses.append(scale / width * total)
        a = run_block(net, level, params, a.detach())
    return [*losses, cross_entropy(a, b)]


def local_gradients(net, params, b, f):
    params = leaves(params)
    losses = local_losses(net, params, b, f)
    return dict(zip(params, torch.autograd.grad(sum(losses), list(params.values())), strict=True))


@pytest.mark.parametrize("name", DENSE)
def test_a_step_subtracts_the_gradient_of_the_local_losses(name):
    net = network(name)
    state, b = double(RULE.init(net, seed=1)), nonuniform(batch(RULE, 5))
    truth = local_gradients(net, state.params, b, DENSE[name])
    assert_close(descent(RULE, net, state, b), truth, atol=1e-9)
    assert all(g.abs().max() > 1e-6 for g in truth.values())


@pytest.mark.parametrize("name", ["mlp", "mlp-gelu"])
def test_each_tensor_is_clipped_to_its_own_norm(name):
    net = network(name)
    b = nonuniform(batch(RULE))
    truth = descent(RULE, net, double(RULE.init(net, seed=1)), b)
    norms = sorted(float(g.norm()) for g in truth.values())
    rule = replace(RULE, clip=norms[len(norms) // 2])
    clipped = descent(rule, net, double(rule.init(net, seed=1)), b)
    assert_close(clipped, {key: g * min(1.0, rule.clip / float(g.norm())) for key, g in truth.items()}, atol=1e-12)
    assert norms[0] < rule.clip < norms[-1]


def test_clients_side_by_side_are_clipped_each_by_itself():
    net = network("mlp-gelu")
    state = double(RULE.init(net, seed=1))
    batches = [nonuniform(batch(RULE, client=c)) for c in range(3)]
    batches[1] = batches[1]._replace(x=5 * batches[1].x)
    key = "1.linear.weight"
    norms = [float(descent(RULE, net, copied(state), b)[key].norm()) for b in batches]
    rule = replace(RULE, clip=max(norms) * 0.9)
    alone = []
    for b in batches:
        alone.append(copied(state))
        step(rule, net, alone[-1], b)
    stacked = {k: torch.stack([p] * 3) for k, p in state.params.items()}

    def run(params, x, y, weight):
        return step(rule, net, state._replace(params=params), Batch(x, y, weight))

    torch.func.vmap(run)(stacked, *(torch.stack([b[i] for b in batches]) for i in range(3)))
    for c in range(3):
        assert_close({k: p[c] for k, p in stacked.items()}, alone[c].params, atol=1e-12)
    assert min(norms) < rule.clip < max(norms)


@pytest.mark.parametrize("clip", [0.0, 0.05])
def test_the_parts_of_a_batch_add_up_and_are_clipped_together(clip):
    rule, net = replace(RULE, clip=clip), network("mlp")
    whole, split = (double(rule.init(net, seed=1)) for _ in range(2))
    start = copied(whole).params
    split = split._replace(gradients=accumulators(rule, split.params))
    b = batch(rule, 7)
    parts = [Batch(b.x[rows], b.y[rows], b.weight[rows], None, b.weight.sum()) for rows in (slice(0, 3), slice(3, 7))]
    a, _ = take_step(rule, net, whole, [b], 0.3)
    c, _ = take_step(rule, net, split, parts, 0.3)
    assert_close(split.params, whole.params, atol=1e-12)
    assert_close(c._asdict(), a._asdict(), atol=1e-12)
    longest = max(float((whole.params[key] - p).norm()) for key, p in start.items())
    free = descent(replace(rule, clip=0.0), net, copied(whole)._replace(params=start), b)
    norm = max(float(g.norm()) for g in free.values())
    assert norm > 2 * 0.05 and longest == pytest.approx(0.3 * (clip or norm))


@pytest.mark.parametrize("changed, unmoved", [("2.linear.weight", ("0.", "1.")), ("0.feedback", ("0.l", "1.", "2."))])
def test_nothing_passes_from_a_later_layer_of_either_network_to_an_earlier_one(changed, unmoved):
    net, b = network("mlp-tanh"), batch(RULE)
    state = double(RULE.init(net, seed=1))
    other = copied(state)
    other.params[changed].neg_()
    a, c = (descent(RULE, net, s, b) for s in (state, other))
    assert all(torch.equal(a[key], c[key]) for key in a if key.startswith(unmoved))
    assert not torch.allclose(a[changed], c[changed])


def test_feedback_mirrors_the_network_is_learned_and_travels():
    state = RULE.init(network("mlp"), seed=1)
    shapes = {key: tuple(p.shape) for key, p in state.params.items() if key.endswith("feedback")}
    assert shapes == {"2.feedback": (16, 10), "1.feedback": (24, 16), "0.feedback": (64, 24)} and not state.fixed
    for key, (_, above) in shapes.items():
        assert 0.95 / above**0.5 < state.params[key].abs().max() <= 1 / above**0.5
    other = RULE.init(network("mlp"), seed=2)
    assert not any(torch.equal(state.params[key], other.params[key]) for key in shapes)


@pytest.mark.parametrize("activation, graph", [("relu", 1), ("elu", 2)])
def test_a_level_more_stores_its_class_rows_alone(activation, graph):
    width, size, peaks = 64, 128, []
    for depth in (3, 6, 12):
        net = Network(lambda: mlp((width,), CLASSES, hidden=(width,) * depth, activation=activation), (width,), CLASSES)  # noqa: B023
        peaks.append(Planner(net).step(RULE, size).parts["activations"])
    rows = graph * 4 * CLASSES * width + 4  # bytes, with the graph's end; of an ELU its input is kept too
    assert peaks[1] - peaks[0] == 3 * rows and peaks[2] - peaks[1] == 6 * rows
    assert peaks[0] < 4 * 6 * size * width + 4 * 2 * width**2 + 8 * rows


def test_stats_are_of_the_output_before_the_update():
    net, b = network("mlp"), nonuniform(batch(RULE))
    state = double(RULE.init(net, seed=1))
    scores = net.forward(state.params, b.x)
    stats = step(RULE, net, state, b)
    torch.testing.assert_close(stats.loss, cross_entropy(scores, b) * b.weight.sum(), rtol=0, atol=1e-12)
    assert stats.correct == ((scores.argmax(1) == b.y) * b.weight).sum()


def test_training_pulls_the_two_networks_together():
    rule, net = CounterCurrent(lr=0.5), network("mlp-tanh")
    state, b = double(rule.init(net, seed=1)), batch(rule, 32)
    before = local_losses(net, state.params, b, torch.tanh)
    for _ in range(50):
        step(rule, net, state, b)
    after = local_losses(net, state.params, b, torch.tanh)
    assert all(float(a) < 0.8 * float(c) for a, c in zip(after, before, strict=True))


def test_refusals_name_the_remedy():
    with pytest.raises(RuleError, match="add a layer before the output"):
        RULE.check(Network(lambda: mlp(SHAPE, CLASSES, hidden=()), SHAPE, CLASSES))
    with pytest.raises(RuleError, match="block 0 is conv2d-maxpool2d-relu: use --model mlp"):
        RULE.check(Network(lambda: lenet(SHAPE, CLASSES), SHAPE, CLASSES))
    for odd, width in ((nn.PReLU(), 8), (nn.MaxPool1d(2), 4)):
        net = Network(nn.Sequential(nn.Linear(6, 8), odd, nn.Linear(width, 3)), (6,), 3)
        with pytest.raises(RuleError, match=f"block . is .*{type(odd).__name__.lower()}"):
            RULE.check(net)
    for setting in ({"clip": -1.0}, {"scale": 0.0}):
        with pytest.raises(RuleError, match="clip ≥ 0 and scale > 0"):
            CounterCurrent(**setting)
    for name in DENSE:
        RULE.check(network(name))
