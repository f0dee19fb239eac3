"""Counter-current learning: local losses by loops, tensors clipped one by one, and memory that depth barely touches."""

from dataclasses import replace

import numpy as np
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
from fedforward.algorithms.models import cnn, mlp, resnet
from fedforward.client import plan as planning
from fedforward.client.memory import PeakMemory
from fedforward.client.plan import Planner
from fedforward.client.step import accumulators, residents, take_step
from sklearn.datasets import load_digits
from torch import nn

RULE = CounterCurrent(clip=0.0)
COSINE = replace(RULE, loss="cosine")
DENSE = {"mlp": torch.relu, "mlp-tanh": torch.tanh, "mlp-gelu": nn.functional.gelu, "flat": torch.relu}
MAPS = {"lenet": torch.relu, "cnn-group": torch.relu, "strided": torch.tanh}


def strided():
    """Maps of 1×8×8, 4×4×4 and 5×4×2, then a vector; what cnn and lenet are made of, in other ways."""
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, stride=2, padding=1), nn.Tanh(), nn.Conv2d(4, 5, (1, 3)), nn.Tanh(),
        nn.Linear(40, 12), nn.Tanh(), nn.Linear(12, CLASSES),
    )  # fmt: skip


def net_of(name):
    if name != "strided":
        return network(name)
    layers = [[*strided()[i : i + 2]] for i in range(0, 7, 2)]
    layers[2].insert(0, nn.Flatten())
    return Network(nn.Sequential(*(nn.Sequential(*block) for block in layers)), SHAPE, CLASSES)


def mirrored(net, i, weight, rows):
    """Return what comes below block i, as rows, of rows above it."""
    shape = net.sizes[i - 1] if i else net.shape
    if weight.dim() == 4:
        maps = rows.view(-1, *net.sizes[i])
        for dim in (2, 3):
            maps = maps.repeat_interleave(shape[dim - 1] // maps.shape[dim], dim)
        return nn.functional.conv2d(maps, weight, padding=tuple(k // 2 for k in weight.shape[2:])).flatten(1)
    below = rows @ weight.T
    return below.repeat_interleave(torch.Size(shape).numel() // below.shape[1], 1)  # a channel in all its places


def apart(rows, share):
    """Return how alike pairs of rows of length 1 are, each pair counting as the product of its shares."""
    total = 0.0
    for i in range(len(rows)):
        for j in range(len(rows)):
            total += share[i] * share[j] * (rows[i] @ rows[j] - float(i == j)) ** 2
    return total


def local_losses(net, params, b, f, rule=RULE):
    """Return the losses of every level and the output's, sample by sample and class by class, every arrow cut."""
    levels, last, share = {}, len(net.blocks), b.weight / b.weight.sum()
    rows = torch.eye(CLASSES, dtype=b.x.dtype)
    for i in reversed(range(last)):
        rows = mirrored(net, i, params[f"{i}.feedback"], rows.detach())
        rows = f(rows) if i else rows  # an input is on both sides of 0
        levels[i] = rows
    losses, a = [], b.x
    for level in range(last):
        flat, rows, scale = a.flatten(1), levels[level], rule.scale
        if rule.loss == "cosine":
            flat, rows = (r / r.norm(dim=1, keepdim=True) for r in (flat, rows))
        else:
            scale /= rows.shape[1]
        total = 0.0
        for i in range(len(b.y)):
            for c in range(CLASSES):
                total += scale * share[i] * (flat[i] @ rows[c] - float(b.y[i] == c)) ** 2 / CLASSES
        if rule.loss == "cosine":
            total += 0.5 * apart(flat, share) + 0.5 * apart(rows, [1 / CLASSES] * CLASSES)
        losses.append(total)
        a = run_block(net, level, params, a.detach())
    return [*losses, cross_entropy(a, b)]


def local_gradients(net, params, b, f, rule=RULE):
    params = leaves(params)
    losses = local_losses(net, params, b, f, rule)
    return dict(zip(params, torch.autograd.grad(sum(losses), list(params.values())), strict=True))


CASES = [(RULE, name) for name in DENSE] + [
    (replace(COSINE, scale=s), name) for name in DENSE | MAPS for s in (1.0, 128.0)
]


@pytest.mark.parametrize("rule, name", CASES)
def test_a_step_subtracts_the_gradient_of_the_local_losses(rule, name):
    net = net_of(name)
    state, b = double(rule.init(net, seed=1)), nonuniform(batch(rule, 5))
    truth = local_gradients(net, state.params, b, (DENSE | MAPS)[name], rule)
    assert_close(descent(rule, net, state, b), truth, atol=1e-9)
    assert all(g.abs().max() > 1e-6 for g in truth.values())


@pytest.mark.parametrize("free, name", [(RULE, "mlp"), (RULE, "mlp-gelu"), (COSINE, "lenet")])
def test_each_tensor_is_clipped_to_its_own_norm(free, name):
    net = network(name)
    b = nonuniform(batch(free))
    truth = descent(free, net, double(free.init(net, seed=1)), b)
    norms = sorted(float(g.norm()) for g in truth.values())
    rule = replace(free, clip=norms[len(norms) // 2])
    clipped = descent(rule, net, double(rule.init(net, seed=1)), b)
    assert_close(clipped, {key: g * min(1.0, rule.clip / float(g.norm())) for key, g in truth.items()}, atol=1e-12)
    assert norms[0] < rule.clip < norms[-1]


@pytest.mark.parametrize("free, name", [(RULE, "mlp"), (COSINE, "lenet")])
def test_a_unit_s_gradient_is_centralised_before_it_is_clipped(free, name):
    net, b = network(name), nonuniform(batch(free))
    truth = descent(free, net, double(free.init(net, seed=1)), b)
    for key, g in truth.items():
        if not key.endswith("bias"):
            for unit in g:
                unit -= unit.mean()
    assert all(g.abs().max() > 1e-6 for g in truth.values())
    rule = replace(free, centralise=True)
    assert_close(descent(rule, net, double(rule.init(net, seed=1)), b), truth, atol=1e-12)
    rule = replace(rule, clip=sorted(float(g.norm()) for g in truth.values())[len(truth) // 2])
    clipped = {key: g * min(1.0, rule.clip / float(g.norm())) for key, g in truth.items()}
    assert_close(descent(rule, net, double(rule.init(net, seed=1)), b), clipped, atol=1e-12)


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


@pytest.mark.parametrize("centralise", [False, True])
@pytest.mark.parametrize("clip", [0.0, 0.05])
def test_the_parts_of_a_batch_add_up_and_are_clipped_together(clip, centralise):
    rule, net = replace(RULE, clip=clip, centralise=centralise), network("mlp")
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


def test_pairs_of_samples_do_not_survive_a_split():
    net = network("lenet")
    whole, split = (double(COSINE.init(net, seed=1)) for _ in range(2))
    split = split._replace(gradients=accumulators(COSINE, split.params))
    b = batch(COSINE, 7)
    parts = [Batch(b.x[rows], b.y[rows], b.weight[rows], None, b.weight.sum()) for rows in (slice(0, 3), slice(3, 7))]
    take_step(COSINE, net, whole, [b], 0.3)
    take_step(COSINE, net, split, parts, 0.3)
    assert max((split.params[key] - p).abs().max() for key, p in whole.params.items()) > 1e-4
    assert "pairs of samples" in COSINE.unsplittable and not RULE.unsplittable


def test_a_blank_sample_that_is_masked_changes_nothing():
    net = network("lenet")
    plain, padded = (double(COSINE.init(net, seed=1)) for _ in range(2))
    b = batch(COSINE, 5)
    blank = torch.zeros(2, *SHAPE, dtype=torch.float64)
    longer = Batch(torch.cat([b.x, blank]), torch.cat([b.y, b.y[:2]]), torch.cat([b.weight, blank[:, 0, 0, 0]]))
    step(COSINE, net, plain, b)
    step(COSINE, net, padded, longer)
    assert_close(padded.params, plain.params, atol=1e-12)


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


@pytest.mark.parametrize("activation, graph", [(nn.ReLU, 1), (nn.ELU, 2)])
def test_a_level_of_maps_more_stores_its_class_maps_alone(activation, graph):
    size, peaks = 32, []
    for depth in (3, 6, 12):
        blocks = [nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), activation()) for _ in range(depth)]
        head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, CLASSES))
        peaks.append(Planner(Network(nn.Sequential(*blocks, head), (4, 8, 8), CLASSES)).step(COSINE, size).parts)
    peaks = [parts["activations"] for parts in peaks]
    maps = graph * 4 * CLASSES * 4 * 64 + 4  # bytes, with the graph's end; of an ELU its input is kept too
    assert peaks[1] - peaks[0] == 3 * maps and peaks[2] - peaks[1] == 6 * maps
    assert peaks[0] < 4 * 6 * size * 4 * 64 + 8 * maps


@pytest.mark.parametrize("name", MAPS)
def test_a_step_on_maps_is_planned_to_the_byte(name, monkeypatch):
    monkeypatch.setattr(planning, "SMALL", 0)  # without data, however small it is
    net, b = net_of(name), batch(COSINE, 7, dtype=torch.float32)
    plan, state = Planner(net).step(COSINE, 7), COSINE.init(net, seed=1)
    meter = PeakMemory(residents(state, {}))
    take_step(COSINE, net, state, [b], 0.1, meter)
    assert (plan.peak, plan.op, plan.flops) == (meter.peak, meter.op, meter.flops)


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


PAPER = {"scale": 1.0, "clip": 0.3, "momentum": 0.8, "centralise": True}  # of its convolutions


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, PAPER], ids=["default", "paper"])
def test_convolutions_read_nine_digits_in_ten(settings):
    rule, epochs = CounterCurrent(loss="cosine", **settings), 6
    net = Network(lambda: cnn(SHAPE, CLASSES, channels=(16, 32), activation="elu"), SHAPE, CLASSES)
    x, y = (torch.from_numpy(a) for a in load_digits(return_X_y=True))
    x, rng = x.float().view(-1, *SHAPE) / 16, np.random.default_rng(0)
    train, test = torch.from_numpy(rng.permutation(len(y))).split([1437, 360])
    state = rule.init(net, seed=0)
    for epoch in range(epochs):
        lr = rule.lr * min(1, 2 * (1 - epoch / epochs))  # constant for half the epochs, then falling in a line
        for rows in train[torch.from_numpy(rng.permutation(len(train)))].split(16):
            step(rule, net, state, Batch(x[rows], y[rows], torch.ones(len(rows))), lr)
    accuracy = float((rule.logits(net, state, x[test]).argmax(1) == y[test]).float().mean())
    assert accuracy > 0.9


def test_refusals_name_the_remedy():
    with pytest.raises(RuleError, match="add a layer before the output"):
        RULE.check(Network(lambda: mlp(SHAPE, CLASSES, hidden=()), SHAPE, CLASSES))
    with pytest.raises(RuleError, match="block 1 is residual: use --model mlp, lenet or cnn"):
        RULE.check(Network(lambda: resnet(SHAPE, CLASSES, depth=8), SHAPE, CLASSES))
    for odd, width in ((nn.PReLU(), 8), (nn.MaxPool1d(2), 4)):
        net = Network(nn.Sequential(nn.Linear(6, 8), odd, nn.Linear(width, 3)), (6,), 3)
        with pytest.raises(RuleError, match=f"block . is .*{type(odd).__name__.lower()}"):
            RULE.check(net)
    for name in ("lenet", "cnn-group"):
        with pytest.raises(RuleError, match=r"by cosines: use --set rule.loss=cosine, or --model mlp"):
            RULE.check(network(name))
        COSINE.check(network(name))
    with pytest.raises(RuleError, match="unknown loss 'sine': use product or cosine"):
        CounterCurrent(loss="sine")
    for setting in ({"clip": -1.0}, {"scale": 0.0}):
        with pytest.raises(RuleError, match="clip ≥ 0 and scale > 0"):
            CounterCurrent(**setting)
    for name in DENSE:
        RULE.check(network(name))
        COSINE.check(network(name))
