"""Structured Knowledge Accumulation: the author's equations by loops, labels for the read-out alone, and collapse."""

import math
from dataclasses import replace

import pytest
import torch
from cases import CLASSES, SHAPE, assert_close, batch, copied, double, equal, leaves, network, nonuniform, step
from cases import weighted_cross_entropy as cross_entropy
from fedforward.algorithms import Batch, Network, RuleError
from fedforward.algorithms.layerwise.knowledge_accumulation import KnowledgeAccumulation
from fedforward.algorithms.models import lenet, mlp
from fedforward.client.plan import Planner
from sklearn.datasets import load_digits

RULE = KnowledgeAccumulation(lr=0.5, momentum=0.0, passes=6, eta=0.3)
DEEP = Network(lambda: mlp((6,), 4, hidden=(7, 5, 6)), (6,), 4)


def of_hidden(net, params):
    return {key: p for key, p in params.items() if int(key[0]) in net.hidden}


def by_loops(rule, net, params, b):
    """Return the hidden layers' parameters after one step: every number of every pass by itself."""
    w = [params[f"{i}.linear.weight"].tolist() for i in net.hidden]
    c = [params[f"{i}.linear.bias"].tolist() for i in net.hidden]
    inputs, shares = b.x.flatten(1).tolist(), (b.weight / b.weight.sum()).tolist()
    previous = None
    for _ in range(rule.passes):
        knowledge, decisions = [], []
        for i in net.hidden:
            below = decisions[-1] if i else inputs
            z = [[sum(m * v for m, v in zip(row, x, strict=True)) + o for row, o in zip(w[i], c[i], strict=True)]
                 for x in below]  # fmt: skip
            knowledge.append(z)
            decisions.append([[1 / (1 + math.exp(-v)) for v in row] for row in z])
        if previous:
            for i in net.hidden:
                before = previous[i - 1] if i else inputs
                for n, share in enumerate(shares):
                    for u in range(len(w[i])):
                        z, d, old = knowledge[i][n][u], decisions[i][n][u], previous[i][n][u]
                        g = -1 / math.log(2) * (z * d * (1 - d) + (d - old))
                        for j in range(len(w[i][u])):
                            w[i][u][j] -= rule.eta * share * g * before[n][j]
                        c[i][u] -= rule.eta * share * g
        previous = decisions
    found = {f"{i}.linear.weight": torch.tensor(w[i], dtype=torch.float64) for i in net.hidden}
    return found | {f"{i}.linear.bias": torch.tensor(c[i], dtype=torch.float64) for i in net.hidden}


@pytest.mark.parametrize("name", ["mlp", "mlp-tanh", "deep"])
def test_hidden_layers_after_a_step_are_those_of_the_loops_over_all_numbers(name):
    net = DEEP if name == "deep" else network(name)
    rule = RULE if name == "deep" else replace(RULE, passes=3)
    state = double(rule.init(net, seed=1))
    b = nonuniform(batch(rule, shape=net.shape, classes=net.classes))
    start = copied(state).params
    truth = by_loops(rule, net, start, b)
    step(rule, net, state, b, rule.lr)
    found = of_hidden(net, state.params)
    assert_close({key: found[key] for key in truth}, truth, atol=1e-9)
    assert len(truth) == len(found) and all((found[key] - start[key]).abs().max() > 1e-4 for key in found)


def test_two_passes_descend_the_gradient_of_the_entropy_with_the_decisions_before_held():
    # Of one layer, by autograd: H = −Σ z (σ(z) − D before) / ln 2. Decisions move with η² alone, so it is given others.
    net, rule = Network(lambda: mlp((6,), 4, hidden=(7,)), (6,), 4), replace(RULE, passes=3, eta=1e-6)
    state, b = double(rule.init(net, seed=1)), batch(rule, shape=(6,), classes=4)
    before = copied(state).params
    step(rule, net, state, b, rule.lr)
    params = leaves(before)
    z = b.x @ params["0.linear.weight"].T + params["0.linear.bias"]
    entropy = -(z * (z.sigmoid() - z.sigmoid().detach())).sum() / math.log(2) / len(b.y)
    truth = torch.autograd.grad(entropy, params["0.linear.weight"])[0]
    moved = (before["0.linear.weight"] - state.params["0.linear.weight"]) / rule.eta
    torch.testing.assert_close(moved, 2 * truth, rtol=0, atol=1e-4)
    assert truth.abs().max() > 0.01


def test_labels_reach_the_read_out_alone():
    net, b = network("mlp"), batch(RULE)
    state, other = (double(RULE.init(net, seed=1)) for _ in range(2))
    step(RULE, net, state, b)
    step(RULE, net, other, b._replace(y=(b.y + 1) % CLASSES))
    assert equal(of_hidden(net, state.params), of_hidden(net, other.params))
    assert not torch.equal(state.params["2.linear.weight"], other.params["2.linear.weight"])


@pytest.mark.parametrize("name", ["mlp", "mlp-tanh"])
def test_the_read_out_descends_its_cross_entropy_on_decisions_that_do_not_learn_from_it(name):
    net, b = network(name), nonuniform(batch(RULE))
    state = double(RULE.init(net, seed=1))
    start, params, x = copied(state), leaves(state.params), b.x.flatten(1)
    for i in net.hidden:
        x = (x @ params[f"{i}.linear.weight"].T + params[f"{i}.linear.bias"]).sigmoid().detach()
    scores = x @ params["2.linear.weight"].T + params["2.linear.bias"]
    loss = cross_entropy(scores, b)
    truth = torch.autograd.grad(loss, [params["2.linear.weight"], params["2.linear.bias"]])
    torch.testing.assert_close(RULE.logits(net, state, b.x), scores.detach(), rtol=0, atol=1e-12)
    stats = step(RULE, net, state, b, RULE.lr)
    for key, g in zip(("2.linear.weight", "2.linear.bias"), truth, strict=True):
        torch.testing.assert_close(start.params[key] - state.params[key], RULE.lr * g, rtol=0, atol=1e-12)
    torch.testing.assert_close(stats.loss, loss.detach() * b.weight.sum(), rtol=0, atol=1e-12)
    assert stats.correct == ((scores.argmax(1) == b.y) * b.weight).sum()


def test_one_pass_is_the_control_whose_hidden_layers_never_learn():
    net, rule = network("mlp"), replace(RULE, passes=1)
    state = double(rule.init(net, seed=1))
    start = copied(state).params
    step(rule, net, state, batch(rule))
    assert equal(of_hidden(net, state.params), of_hidden(net, start))
    assert not torch.equal(state.params["2.linear.weight"], start["2.linear.weight"])


def test_optimizer_memory_is_the_read_outs_and_the_schedule_scales_both():
    net, b = network("mlp"), batch(RULE)
    for rule in (replace(RULE, momentum=0.9), replace(RULE, optimizer="adam")):
        assert {key[0] for key in rule.init(net, 0).slots} == {"2"}
    rule, moved = replace(RULE, passes=2, eta=1e-3), []
    for lr in (rule.lr, rule.lr / 2):
        state = double(rule.init(net, seed=1))
        start = copied(state).params
        step(rule, net, state, b, lr)
        moved.append({key: start[key] - p for key, p in state.params.items()})
    assert_close(moved[0], {key: 2 * p for key, p in moved[1].items()}, atol=1e-12)


def test_what_counts_is_learning_rate_times_passes_and_too_much_of_it_decides_all_samples_alike():
    net = Network(lambda: mlp(SHAPE, CLASSES, hidden=(32, 32)), SHAPE, CLASSES)
    x, y = (torch.from_numpy(a) for a in load_digits(return_X_y=True))
    b, spreads = Batch(x[:200].view(-1, *SHAPE) / 16, y[:200], torch.ones(200, dtype=torch.float64)), []
    for passes, eta in ((1, 0.01), (51, 0.01), (101, 0.005), (501, 0.01)):
        rule = KnowledgeAccumulation(passes=passes, eta=eta)
        state = double(rule.init(net, seed=0))
        step(rule, net, state, b)
        h = b.x.flatten(1)
        for i in net.hidden:
            h = (h @ state.params[f"{i}.linear.weight"].T + state.params[f"{i}.linear.bias"]).sigmoid()
        spreads.append(float(h.std(0).mean()))
    untrained, once, halved, ten_times = spreads
    assert halved == pytest.approx(once, rel=0.05)
    assert ten_times < once / 10 < untrained / 10


@pytest.mark.parametrize("size", [16, 128])
def test_a_layer_more_stores_one_decision_whatever_the_passes(size):
    peaks = []
    for depth in (3, 6):
        net = Network(lambda: mlp((40,), 10, hidden=(64,) * depth), (40,), 10)  # noqa: B023
        plans = [Planner(net).step(replace(RULE, passes=k), size) for k in (2, 3, 6)]
        assert len({plan.peak for plan in plans}) == 1
        peaks.append(plans[0].parts["activations"])
    assert peaks[1] - peaks[0] == 3 * 4 * size * 64
    # Decisions; of one layer z, its decisions, 1 less them, and those before of the layer below; a share; the stats.
    assert peaks[0] == 4 * size * (3 * 64 + 4 * 64 + 1) + 3 * 4


def test_a_pass_costs_a_forward_pass_of_the_hidden_layers_and_their_updates():
    net, size = Network(lambda: mlp((40,), 10, hidden=(30, 20)), (40,), 10), 16
    flops = [Planner(net).step(replace(RULE, passes=k), size).flops for k in (1, 2, 6)]
    once = 2 * 2 * size * (40 * 30 + 30 * 20)
    assert flops[1] - flops[0] == once and flops[2] - flops[0] == 5 * once


def test_initial_weights_are_the_networks_own_scaled_in_hidden_layers():
    net = network("mlp")
    plain, state = net.init(3), replace(RULE, scale=2.0).init(net, 3)
    wanted = {key: p * (2.0 if key in ("0.linear.weight", "1.linear.weight") else 1.0) for key, p in plain.items()}
    assert equal(state.params, wanted) and not state.fixed


def test_refusals_name_the_remedy():
    for build in (lambda: mlp(SHAPE, CLASSES, hidden=()), lambda: lenet(SHAPE, CLASSES)):
        with pytest.raises(RuleError, match="use mlp"):
            RULE.check(Network(build, SHAPE, CLASSES))
    for setting in ({"passes": 0}, {"eta": 0.0}, {"scale": 0.0}):
        with pytest.raises(RuleError, match=r"passes ≥ 1, and lr, rule\.eta and scale above 0"):
            KnowledgeAccumulation(**setting)
    assert "whole batch has changed" in RULE.unsplittable
