"""Cascaded-Forward against its equations in loops; its federated closed form against centralised least squares."""

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
    equal,
    leaves,
    network,
    nonuniform,
    run_block,
    step,
)
from cases import weighted_cross_entropy as cross_entropy
from fedforward.algorithms import DFA, Batch, Network, RuleError, State
from fedforward.algorithms.layerwise.cascaded_forward import CascadedForward, solved
from fedforward.algorithms.layerwise.features import features_of, grid, sparsemax
from fedforward.algorithms.models import cnn, lenet, mlp
from fedforward.client.memory import PeakMemory
from fedforward.client.plan import Planner
from fedforward.client.step import accumulators, residents, take_step
from sklearn.datasets import load_digits

RULE = CascadedForward(features=40)
CLOSED = replace(RULE, predictor="closed")
BLOCKS = ["mlp", "flat", "lenet", "mlp-gelu", "cnn-group"]


def windows(size, cells):
    """Return which positions each cell of a grid averages: the cells cover all, and may share one."""
    return [range(i * size // cells, -(-(i + 1) * size // cells)) for i in range(cells)]


def read(a, cells):
    """Return features of a block's output, number by number."""
    rows = []
    for sample in a:
        if sample.dim() > 1:
            across, down = (windows(size, c) for size, c in zip(sample.shape[1:], cells, strict=True))
            means = [
                torch.stack([m[h, w] for h in hs for w in ws]).mean() for m in sample for hs in across for ws in down
            ]
            sample = torch.stack(means)
        normal = (sample - sample.mean()) / ((sample - sample.mean()).pow(2).mean() + 1e-5).sqrt()
        rows.append(torch.cat([normal, normal.new_ones(1)]))
    return torch.stack(rows)


def all_features(net, weights, x):
    """Return every hidden block's features, with the grids of 40 features: 3 × 3 where 4 channels have 4 × 4."""
    found = {}
    for i in net.hidden:
        x = run_block(net, i, weights, x)
        channels = net.sizes[i][0]
        cells = max(c for c in range(1, 5) if c == 1 or channels * c * c <= 40)
        found[i] = read(x, [min(cells, size) for size in net.sizes[i][1:]])
    return found


def sparsemax_loss(z, y):
    """Return Martins & Astudillo's loss of a row z, equation 17: −z_y + ½ Σ_S (z² − τ²) + ½."""
    support, total = [], 0.0
    for k, value in enumerate(z.sort(descending=True)[0], 1):
        total = total + value
        if 1 + k * value > total:
            support, tau = [*support, value], (total - 1) / k
    return -z[y] + sum((value.square() - tau.square()) / 2 for value in support) + 0.5


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("predictor", ["ce", "sparsemax"])
def test_one_step_subtracts_the_gradient_of_each_predictors_loss(name, predictor):
    net, rule = network(name), replace(RULE, predictor=predictor)
    state, b = double(rule.init(net, seed=1)), nonuniform(batch(rule))
    for p in state.params.values():
        p.normal_(generator=torch.Generator().manual_seed(0)).mul_(0.3)
    params, loss = leaves(state.params), 0.0
    for i, x in all_features(net, state.fixed, b.x).items():
        z = x @ params[f"{i}.predictor"].T
        losses = torch.stack([sparsemax_loss(row, y) for row, y in zip(z, b.y, strict=True)])
        loss = loss + (cross_entropy(z, b) if predictor == "ce" else (losses * b.weight).sum() / b.weight.sum())
    truth = dict(zip(params, torch.autograd.grad(loss, list(params.values())), strict=True))
    assert_close(descent(rule, net, state, b), truth, atol=1e-9)
    assert all(g.abs().max() > 1e-3 for g in truth.values())


@pytest.mark.parametrize("name", BLOCKS)
def test_moments_are_the_weighted_mean_of_the_round_beside_what_was_there(name):
    net = network(name)
    state = double(CLOSED.init(net, seed=1))
    start = {key: p.normal_(generator=torch.Generator().manual_seed(0)).clone() for key, p in state.params.items()}
    batches = [nonuniform(batch(CLOSED, 5 + s, step=s)) for s in range(3)]
    for b in batches:
        step(CLOSED, net, state, b)
    weight = torch.cat([b.weight for b in batches])
    labels = torch.nn.functional.one_hot(torch.cat([b.y for b in batches]), CLASSES).double()
    for i, x in all_features(net, state.fixed, torch.cat([b.x for b in batches])).items():
        wanted = start[f"{i}.moments"].clone()
        for row, y, w in zip(x, labels, weight, strict=True):
            wanted += w / weight.sum() * torch.outer(row, torch.cat([row, y]))
        torch.testing.assert_close(state.params[f"{i}.moments"], wanted, rtol=0, atol=1e-12)


def federated(net, rule, params, shards, epochs=1):
    """Return the mean by samples of what clients make of `params` in a round, each in batches of 4."""
    total, mean = sum(len(y) for _, y in shards), {}
    for x, y in shards:
        state = double(rule.init(net, seed=1))._replace(params={key: p.clone() for key, p in params.items()})
        for _ in range(epochs):
            for rows in torch.arange(len(y)).split(4):
                step(rule, net, state, Batch(x[rows], y[rows], torch.ones(len(rows)).double()))
        for key, p in state.params.items():
            mean[key] = mean.get(key, 0) + p * (len(y) / total)
    return mean


@pytest.mark.parametrize("name", ["mlp", "lenet"])
def test_federated_averaging_of_unlike_clients_is_centralised_least_squares(name):
    net, b = network(name), batch(CLOSED, 67)
    order = b.y.argsort()  # each client knows few classes
    shards = [(b.x[rows], b.y[rows]) for rows in order.split([3, 40, 1, 11, 12])]
    state = double(CLOSED.init(net, seed=1))
    once = federated(net, CLOSED, state.params, shards)
    more = federated(net, CLOSED, federated(net, CLOSED, once, shards, epochs=3), shards)
    labels = torch.nn.functional.one_hot(b.y, CLASSES).double()
    for i, x in all_features(net, state.fixed, b.x).items():
        ridge = (CLOSED.ridge * len(x)) ** 0.5 * torch.eye(x.shape[1]).double()  # as further samples of no class
        truth = torch.linalg.lstsq(
            torch.cat([x, ridge]), torch.cat([labels, torch.zeros(len(ridge), CLASSES).double()])
        ).solution
        for moments in (once, more):
            found = solved(moments[f"{i}.moments"], CLASSES, CLOSED.ridge)
            torch.testing.assert_close(found, truth, rtol=0, atol=1e-9)
        assert truth.abs().max() > 0.1
        torch.testing.assert_close(more[f"{i}.moments"], 3 * once[f"{i}.moments"], rtol=0, atol=1e-12)
        alone = federated(net, CLOSED, state.params, shards[1:2])[f"{i}.moments"]
        assert (solved(alone, CLASSES, CLOSED.ridge) - truth).abs().max() > 0.05


def test_the_ridge_vanishes_with_its_weight():
    net, b = network("mlp"), batch(CLOSED, 90)
    state = double(CLOSED.init(net, seed=1))
    step(CLOSED, net, state, b)
    x = features_of(net.block(1, state.fixed, net.block(0, state.fixed, b.x)), 40)
    live = x.abs().amax(0) > 0
    assert live.all() and len(x.T) == 17
    # Features of mean 0 are dependent: of what is left, the shortest solution is the limit.
    truth = torch.linalg.pinv(x) @ torch.nn.functional.one_hot(b.y, CLASSES).double()
    for ridge, error in ((1e-5, 1e-1), (1e-7, 1e-3), (1e-9, 1e-5)):
        found = solved(state.params["1.moments"], CLASSES, ridge)
        torch.testing.assert_close(found, truth, rtol=0, atol=error)


def test_before_anything_is_seen_no_class_is_preferred():
    net, b = network("mlp"), batch(RULE)
    for rule in (RULE, CLOSED):
        scores = rule.logits(net, double(rule.init(net, seed=1)), b.x)
        torch.testing.assert_close(scores, torch.full_like(scores, 0.1).log(), rtol=0, atol=1e-12)
    state = double(CLOSED.init(net, seed=1))
    step(CLOSED, net, state, b._replace(weight=torch.zeros_like(b.weight)))
    assert not any(p.any() for p in state.params.values())


@pytest.mark.parametrize("name", ["mlp", "lenet"])
def test_the_prediction_is_the_mean_of_the_blocks_softmax(name):
    net, b = network(name), nonuniform(batch(RULE))
    for rule in (RULE, CLOSED):
        state = double(rule.init(net, seed=1))
        step(rule, net, state, b)
        mean = 0.0
        for i, x in all_features(net, state.fixed, b.x).items():
            if rule is RULE:
                z = x @ state.params[f"{i}.predictor"].T
            else:
                z = x @ solved(state.params[f"{i}.moments"], CLASSES, rule.ridge)
            mean = mean + z.softmax(1) / len(net.hidden)
        torch.testing.assert_close(rule.logits(net, state, b.x), mean.log(), rtol=0, atol=1e-10)
        stats = step(rule, net, state, b)  # before the update
        torch.testing.assert_close(stats.loss / stats.weight, cross_entropy(mean.log(), b), rtol=0, atol=1e-10)
        assert stats.correct == ((mean.argmax(1) == b.y) * b.weight).sum()


@pytest.mark.parametrize("name", ["mlp", "lenet"])
def test_random_blocks_stay_as_they_are_and_never_travel(name):
    net = network(name)
    for rule in (RULE, CLOSED):
        state = rule.init(net, seed=1)
        own = {key for i in net.hidden for key in net.keys(i)}
        assert set(state.fixed) == own and not set(state.params) & own
        assert len(state.params) == len(net.hidden)
        assert equal(state.fixed, {key: p for key, p in net.init(1).items() if key in own})
        step(rule, net, state, batch(rule, dtype=torch.float32))
        assert equal(state.fixed, rule.init(net, seed=1).fixed)


@pytest.mark.parametrize("name", ["mlp-tanh", "lenet"])
def test_dfa_trains_the_blocks_as_dfa_does_and_the_predictors_as_if_they_were_random(name):
    net, b = network(name), nonuniform(batch(RULE))
    options = {"momentum": 0.5, "weight_decay": 0.1}
    rule, teacher = replace(RULE, blocks="dfa", block_lr=0.3, **options), DFA(lr=0.3, feedback="normal", **options)
    state, wanted = (double(r.init(net, seed=1)) for r in (rule, teacher))
    assert_close(state.fixed, wanted.fixed, atol=0)
    predictors = {key: p for key, p in state.params.items() if key.endswith("predictor")}
    random = double(replace(RULE, **options).init(net, seed=1))._replace(
        params={k: p.clone() for k, p in predictors.items()}
    )
    for lr in (0.1, 0.05):
        random = random._replace(fixed={key: wanted.params[key].clone() for key in random.fixed})
        step(replace(RULE, **options), net, random, b, lr)
        step(teacher, net, wanted, b, lr * 0.3 / rule.lr)
        step(rule, net, state, b, lr)
    assert_close(state.params, wanted.params | random.params, atol=1e-12)


def test_all_ones_would_predict_what_zeros_do():
    net, b = network("mlp"), batch(RULE)
    for rule in (RULE, replace(RULE, predictor="sparsemax")):
        zeros, ones = (double(rule.init(net, seed=1)) for _ in range(2))
        for p in ones.params.values():
            p.fill_(1)
        for state in (zeros, ones):
            for _ in range(3):
                step(rule, net, state, b)
        torch.testing.assert_close(rule.logits(net, ones, b.x), rule.logits(net, zeros, b.x), rtol=0, atol=1e-12)


def test_sparsemax_is_the_nearest_point_of_the_simplex():
    z = torch.randn(200, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    z[100:] *= 0.1  # where nothing is cut off
    low, high = z.amin(1) - 1, z.amax(1)
    for _ in range(60):  # of max(z − τ, 0) the sum falls with τ: halve until it is 1
        middle = (low + high) / 2
        above = (z - middle[:, None]).clamp_min(0).sum(1) > 1
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    wanted = (z - low[:, None]).clamp_min(0)
    torch.testing.assert_close(sparsemax(z), wanted, rtol=0, atol=1e-12)
    zeros = (wanted == 0).sum(1)
    assert set(zeros.tolist()) >= {0, 3, 4, 5}


def test_a_grid_is_the_finest_that_has_room():
    assert grid((128,), 10) == []
    assert [grid((16, 14, 14), most) for most in (1, 16, 63, 64, 512, 3135, 3136)] == [
        [1, 1], [1, 1], [1, 1], [2, 2], [5, 5], [13, 13], [14, 14],
    ]  # fmt: skip
    assert grid((2, 3, 9), 40) == [3, 6] and grid((5, 7), 12) == [2]
    b = torch.rand(2, 3, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    halves = torch.nn.functional.layer_norm(b.view(2, 3, 2, 4).mean(3).flatten(1), (6,))
    torch.testing.assert_close(features_of(b, 8)[:, :-1], halves, rtol=0, atol=1e-12)


def above(net, rule, size):
    """Return the planned bytes of a step above what is held before it, and those measured."""
    state, b = rule.init(net, seed=0), batch(rule, size, dtype=torch.float32, shape=net.shape, classes=net.classes)
    meter = PeakMemory(residents(state, {}))
    take_step(rule, net, state, [b], rule.lr, meter)
    plan = Planner(net).step(rule, size)
    assert plan.parts == meter.parts
    return plan.parts["activations"]


VARIANTS = {
    "ce": RULE,
    "sparsemax": replace(RULE, predictor="sparsemax"),
    "closed": CLOSED,
    "dfa": replace(RULE, blocks="dfa", optimizer="adam"),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_random_blocks_cost_one_at_a_time_and_those_of_dfa_all(variant):
    width, size, rule, bytes_ = 64, 128, VARIANTS[variant], []
    for depth in (3, 6, 12):
        net = Network(lambda: mlp((width,), CLASSES, hidden=(width,) * depth), (width,), CLASSES)  # noqa: B023
        bytes_.append(above(net, rule, size))
    layer = 4 * size * width
    if variant == "dfa":
        assert bytes_[1] - bytes_[0] == 3 * layer and bytes_[2] - bytes_[1] == 6 * layer
    else:
        assert bytes_[0] == bytes_[1] == bytes_[2]
        assert bytes_[0] < 4.5 * layer + (3 * 4 * (width + 1) * (width + 11) if variant == "closed" else 0)


@pytest.mark.parametrize("model, shape", [(lenet, (1, 28, 28)), (cnn, (3, 32, 32))])
def test_convolutions_cost_less_than_half_of_what_dfa_stores(model, shape):
    net = Network(lambda: model(shape, CLASSES), shape, CLASSES)
    random, trained = (Planner(net).step(rule, 16).parts["activations"] for rule in (CascadedForward(), DFA()))
    assert random < trained / 2


@pytest.mark.parametrize("variant", ["closed", "dfa", "ce"])
def test_a_batch_in_parts_and_clients_side_by_side_learn_the_same(variant):
    rule, net = VARIANTS[variant], network("lenet")
    rule = rule if variant == "closed" else replace(rule, optimizer="sgd", momentum=0.9)
    states = [double(rule.init(net, seed=1)) for _ in range(3)]
    stacked = State(*({k: torch.stack([t] * 2) for k, t in part.items()} for part in states[0]))._replace(fixed={})
    split = states[2]._replace(gradients=accumulators(rule, states[2].params))
    for s in range(2):
        whole, other = (nonuniform(batch(rule, 7, step=s, client=c)) for c in range(2))
        parts = [
            Batch(whole.x[rows], whole.y[rows], whole.weight[rows], None, whole.weight.sum())
            for rows in (slice(0, 3), slice(3, 7))
        ]
        step(rule, net, states[0], whole)
        step(rule, net, states[1], other)
        take_step(rule, net, split, parts, rule.lr)

        def run(params, slots, x, y, weight):
            return step(rule, net, State(params, states[0].fixed, slots), Batch(x, y, weight))

        rows = [torch.stack(pair) for pair in zip(whole[:3], other[:3], strict=True)]
        torch.func.vmap(run)(stacked.params, stacked.slots, *rows)
    assert_close(split.params, states[0].params, atol=1e-11)
    assert_close(split.slots, states[0].slots, atol=1e-11)
    for c in range(2):
        assert_close({k: p[c] for k, p in stacked.params.items()}, states[c].params, atol=1e-11)
        assert_close({k: p[c] for k, p in stacked.slots.items()}, states[c].slots, atol=1e-11)
    assert not torch.equal(
        states[0].params["0.moments" if variant == "closed" else "0.predictor"],
        stacked.params["0.moments" if variant == "closed" else "0.predictor"][1],
    )


@pytest.mark.parametrize("model, least", [(mlp, 0.93), (lenet, 0.97)])
def test_one_round_of_clients_that_know_two_classes_each_reads_the_digits(model, least):
    rule, net = CascadedForward(predictor="closed"), Network(lambda: model(SHAPE, CLASSES), SHAPE, CLASSES)
    x, y = (torch.from_numpy(a) for a in load_digits(return_X_y=True))
    x, order = x.float().view(-1, *SHAPE) / 16, torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    test, train = order[:360], order[360:]
    state, mean = rule.init(net, seed=0), {}
    for pair in range(5):
        rows = train[y[train] // 2 == pair]
        client = copied(state)
        for part in rows.split(100):
            step(rule, net, client, Batch(x[part], y[part], torch.ones(len(part))))
        mean = {key: mean.get(key, 0) + p * (len(rows) / len(train)) for key, p in client.params.items()}
    right = rule.logits(net, state._replace(params=mean), x[test]).argmax(1) == y[test]
    assert right.float().mean() >= least


def test_refusals_name_the_remedy():
    with pytest.raises(RuleError, match="add a layer before the output"):
        RULE.check(Network(lambda: mlp(SHAPE, CLASSES, hidden=()), SHAPE, CLASSES))
    with pytest.raises(RuleError, match="unknown blocks 'frozen': use one of random, dfa"):
        CascadedForward(blocks="frozen")
    with pytest.raises(RuleError, match="unknown predictor 'mse': use one of ce, sparsemax, closed"):
        CascadedForward(predictor="mse")
    with pytest.raises(RuleError, match=r"use rule\.predictor=ce with dfa"):
        CascadedForward(predictor="closed", blocks="dfa")
    for options in ({"momentum": 0.9}, {"optimizer": "adam"}, {"weight_decay": 0.1}):
        with pytest.raises(RuleError, match="a closed form has no optimizer"):
            CascadedForward(predictor="closed", **options)
    for wrong in ({"features": 0}, {"ridge": 0.0}, {"block_lr": 0.0}):
        with pytest.raises(RuleError, match=r"rule\.features ≥ 1, and rule\.ridge and block_lr above 0"):
            CascadedForward(**wrong)
