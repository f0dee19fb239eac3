"""Inference learning: the paper's loops, an energy that falls, backpropagation in the limit, and a stable prox step."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from cases import (
    CLASSES,
    NETS,
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
from fedforward.algorithms.equilibrium.predictive_coding import PredictiveCoding
from fedforward.algorithms.models import mlp
from fedforward.client.plan import Planner
from fedforward.client.step import accumulators, take_step
from sklearn.datasets import load_digits

IL = PredictiveCoding(relaxation=7, gamma_bot=0.2, gamma_top=0.15)
PROX = replace(IL, scheme="prox")


def by_loops(rule, net, params, b, lr):
    """Return the energies (T + 1, B) of relaxation and the gradients, sample by sample, by autograd of the energy."""
    energies, grads = [], {key: torch.zeros_like(p) for key, p in params.items()}
    for row in range(len(b.y)):
        x, y = b.x[row : row + 1], b.y[row : row + 1]
        h = []
        for i in net.hidden:
            h.append(run_block(net, i, params, h[-1] if h else x))

        def norm(i, h=h, x=x):
            reads = max([1, *(params[key].shape[2:].numel() for key in net.keys(i) if params[key].dim() > 2)])
            return reads * float((h[i - 1] if i else x).square().sum()) + 1 + rule.epsilon

        kappa = 1.0
        if rule.scheme == "prox":
            kappa = lr * norm(net.output) / (1 + lr * norm(net.output))

        def terms(params, h, x=x, y=y, kappa=kappa):
            found = []
            for i in range(len(net.blocks)):
                a = run_block(net, i, params, h[i - 1] if i else x)
                last = i == net.output
                ce = -a.log_softmax(1)[0, y[0]] * kappa if last else None
                found.append(ce if last else (h[i] - a).square().sum() / 2)
            return found

        weights = [(rule.gamma_bot / rule.gamma_top) ** i for i in range(len(net.blocks))]
        own = [float(sum(w * t for w, t in zip(weights, terms(params, h), strict=True)))]
        for _ in range(rule.relaxation):
            moving = [a.clone().requires_grad_() for a in h]
            found, moved = terms(params, moving), []
            for i in net.hidden:
                own_pull = torch.autograd.grad(found[i], moving[i], retain_graph=True)[0]
                above = torch.autograd.grad(found[i + 1], moving[i], retain_graph=True)[0]
                moved.append(h[i] - rule.gamma_bot * above - rule.gamma_top * own_pull)
            h[:] = moved
            own.append(float(sum(w * t for w, t in zip(weights, terms(params, h), strict=True))))
        energies.append(own)
        learning = leaves(params)
        for i, term in enumerate(terms(learning, h)):
            share = float(b.weight[row] / b.weight.sum())
            share /= norm(i) if rule.scheme == "prox" else 1
            keys = net.keys(i)
            for key, g in zip(keys, torch.autograd.grad(term, [learning[key] for key in keys]), strict=True):
                grads[key] += share * g
    return torch.tensor(energies).T, grads


@pytest.mark.parametrize("rule", [IL, PROX], ids=["il", "prox"])
@pytest.mark.parametrize("name", NETS)
def test_a_step_is_the_relaxation_and_update_of_every_sample_by_loops(name, rule):
    net = network(name)
    state = double(rule.init(net, seed=1))
    b = nonuniform(batch(rule))
    _, truth = by_loops(rule, net, state.params, b, lr=1.0)
    assert_close(descent(rule, net, state, b), truth, atol=1e-9)
    assert all(g.abs().max() > 1e-9 for g in truth.values())


def test_a_dense_step_is_the_matrix_equations_written_out():
    rule, net = replace(PROX, relaxation=4), network("mlp-tanh")
    state, b, lr = double(rule.init(net, seed=1)), nonuniform(batch(rule)), 0.7
    (w1, c1), (w2, c2), (w3, c3) = (
        (state.params[f"{i}.linear.weight"], state.params[f"{i}.linear.bias"]) for i in range(3)
    )
    wanted = {key: torch.zeros_like(p) for key, p in state.params.items()}
    for x, y, weight in zip(b.x.flatten(1), b.y, b.weight, strict=True):
        share, target = weight / b.weight.sum(), torch.eye(CLASSES, dtype=torch.float64)[y]
        h1 = torch.tanh(w1 @ x + c1)
        h2 = torch.tanh(w2 @ h1 + c2)
        n3 = h2 @ h2 + 1 + rule.epsilon
        kappa = lr * n3 / (1 + lr * n3)

        def errors(h1, h2, x=x, target=target, kappa=kappa):
            a1, a2 = torch.tanh(w1 @ x + c1), torch.tanh(w2 @ h1 + c2)
            top = kappa * (target - torch.softmax(w3 @ h2 + c3, 0))
            return h1 - a1, h2 - a2, top, 1 - a1**2, 1 - a2**2

        for _ in range(rule.relaxation):
            e1, e2, e3, _, s2 = errors(h1, h2)
            h1, h2 = (
                h1 + rule.gamma_bot * w2.T @ (s2 * e2) - rule.gamma_top * e1,
                h2 + rule.gamma_bot * w3.T @ e3 - rule.gamma_top * e2,
            )
        e1, e2, e3, s1, s2 = errors(h1, h2)
        for i, (delta, below) in enumerate(((s1 * e1, x), (s2 * e2, h1), (e3, h2))):
            n = below @ below + 1 + rule.epsilon
            wanted[f"{i}.linear.weight"] += share / n * torch.outer(delta, below)
            wanted[f"{i}.linear.bias"] += share / n * delta
    start = copied(state).params
    step(rule, net, state, b, lr)
    assert_close({key: state.params[key] - p for key, p in start.items()}, wanted, atol=1e-12)
    assert not b.weight.all() and wanted["0.linear.weight"].abs().max() > 1e-6


@pytest.mark.parametrize("gammas", [(0.1, 0.1), (0.1, 0.05), (0.05, 0.1)])
@pytest.mark.parametrize("name, slack", [("mlp-tanh", 0), ("mlp-gelu", 0), ("mlp", 1e-4), ("lenet", 1e-4)])
def test_the_energy_never_rises_during_relaxation(name, slack, gammas):
    # But by a hair where a step crosses a ReLU's kink.
    rule, net = replace(PROX, relaxation=30, gamma_bot=gammas[0], gamma_top=gammas[1]), network(name)
    state = double(rule.init(net, seed=1))
    energies, _ = by_loops(rule, net, state.params, batch(rule, 2), lr=1.0)
    assert (energies[1:] <= (1 + slack) * energies[:-1]).all() and (energies[-1] < 0.998 * energies[0]).all()


def backpropagated(net, params, b):
    params = leaves(params)
    loss = cross_entropy(net.forward(params, b.x), b)
    return dict(zip(params, torch.autograd.grad(loss, list(params.values())), strict=True))


def cosine(a, b):
    return float(torch.cosine_similarity(a.flatten(), b.flatten(), dim=0))


@pytest.mark.parametrize("name", NETS)
def test_a_small_output_error_gives_nearly_backpropagations_gradient_and_a_large_one_its_direction(name):
    net, rule = network(name), PredictiveCoding()
    start, b = double(rule.init(net, seed=1)), nonuniform(batch(rule))
    b = b._replace(y=torch.full_like(b.y, 3))
    for push, least in ((0.0, 0.5), (4.0, 0.95)):  # with the larger bias nearly all samples are right
        state = copied(start)
        state.params[net.keys(net.output)[1]][3] += push
        truth = backpropagated(net, state.params, b)
        found = descent(rule, net, state, b)
        assert min(cosine(found[key], truth[key]) for key in truth) > least


@pytest.mark.parametrize("name", ["mlp-tanh", "mlp-gelu"])
def test_the_gradient_is_backpropagations_in_the_limit_of_a_small_output_error(name):
    net, distances = network(name), []
    for lr in (1e-2, 1e-4, 1e-6):  # of "prox" it shrinks the error at the output
        rule = PredictiveCoding(scheme="prox", relaxation=300, gamma_bot=0.3, gamma_top=0.3)
        state, b = double(rule.init(net, seed=1)), batch(rule, 1)
        truth, params, x, norms = backpropagated(net, state.params, b), copied(state).params, b.x, []
        for i in range(len(net.blocks)):
            norms.append(float(x.square().sum()) + 1 + rule.epsilon)
            x = net.block(i, params, x)
        kappa = lr * norms[-1] / (1 + lr * norms[-1])
        step(rule, net, state, b, lr)
        scaled = {key: (params[key] - p) * norms[int(key[0])] / kappa for key, p in state.params.items()}
        distances.append(max(float((scaled[key] - g).norm() / g.norm()) for key, g in truth.items()))
    assert distances[0] > 10 * distances[1] > 100 * distances[2] and distances[2] < 1e-5


def test_fewer_steps_of_relaxation_than_blocks_leave_the_first_block_as_it_is():
    net, moved = Network(lambda: mlp(SHAPE, CLASSES, hidden=(12, 12, 12)), SHAPE, CLASSES), []
    for steps in (1, 2, 3, 4):
        rule = replace(IL, relaxation=steps)
        state = double(rule.init(net, seed=1))
        found = descent(rule, net, state, batch(rule))
        moved.append([i for i in range(4) if found[f"{i}.linear.weight"].abs().max() > 0])
    assert moved == [[2, 3], [1, 2, 3], [0, 1, 2, 3], [0, 1, 2, 3]]


def test_one_prox_step_closes_the_residual_of_a_linear_block():
    rule = PredictiveCoding(scheme="prox", relaxation=50, epsilon=0.0)
    net = Network(torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Linear(5, 3)), (6,), 3)
    state, b = double(rule.init(net, seed=1)), batch(rule, 1, shape=(6,), classes=3)
    start = copied(state)
    h = [net.block(0, start.params, b.x)]
    rule._relax(net, start.params, h, b._replace(total=b.weight.new_ones(())), b)
    assert (h[0] - net.block(0, start.params, b.x)).abs().max() > 0.01
    step(rule, net, state, b, lr=1e12)  # κ = 1
    torch.testing.assert_close(net.block(0, state.params, b.x), h[0], rtol=0, atol=1e-9)


def test_prox_learns_from_single_samples_at_a_rate_where_il_diverges():
    # 5 is the paper's learning rate of IL-prox on MNIST, one sample at a time.
    net = Network(lambda: mlp(SHAPE, CLASSES, hidden=(32, 32)), SHAPE, CLASSES)
    x, y = (torch.from_numpy(a) for a in load_digits(return_X_y=True))
    x, accuracy = x.float().view(-1, *SHAPE) / 16, {}
    for scheme in ("il", "prox"):
        rule = PredictiveCoding(scheme=scheme, relaxation=6)
        state = rule.init(net, seed=0)
        for row in torch.from_numpy(np.random.default_rng(0).permutation(1437)[:300]).split(1):
            stats = step(rule, net, state, Batch(x[row], y[row], torch.ones(1)), 5.0)
            if not torch.isfinite(stats.loss):
                break
        accuracy[scheme] = float((rule.logits(net, state, x[1437:]).argmax(1) == y[1437:]).float().mean())
    assert not stats.loss.isnan() and accuracy["il"] < 0.2 and accuracy["prox"] > 0.6


@pytest.mark.parametrize("rule", [IL, PROX], ids=["il", "prox"])
@pytest.mark.parametrize("name", ["mlp", "lenet"])
def test_the_parts_of_a_batch_add_up(name, rule):
    net = network(name)
    whole, split = (double(rule.init(net, seed=1)) for _ in range(2))
    split = split._replace(gradients=accumulators(rule, split.params))
    b = batch(rule, 7)
    parts = [Batch(b.x[rows], b.y[rows], b.weight[rows], None, b.weight.sum()) for rows in (slice(0, 3), slice(3, 7))]
    a, _ = take_step(rule, net, whole, [b], 0.3)
    c, _ = take_step(rule, net, split, parts, 0.3)
    assert_close(split.params, whole.params, atol=1e-12)
    assert_close(c._asdict(), a._asdict(), atol=1e-12)


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_a_block_more_stores_one_activity_whatever_the_scheme(activation):
    for scheme in ("il", "prox"):
        peaks = []
        for depth in (3, 6):
            net = Network(lambda: mlp((40,), 10, hidden=(64,) * depth, activation=activation), (40,), 10)  # noqa: B023
            peaks.append(Planner(net).step(PredictiveCoding(scheme=scheme, relaxation=2), 128).parts["activations"])
        assert peaks[1] - peaks[0] == 3 * 4 * 128 * 64


@pytest.mark.parametrize("name", ["mlp", "mlp-gelu", "lenet", "cnn-group"])
def test_more_relaxation_takes_no_more_memory_and_more_work(name):
    plans = [Planner(network(name)).step(replace(PROX, relaxation=t), 8) for t in (1, 2, 4)]
    assert plans[0].peak == plans[1].peak == plans[2].peak
    assert plans[2].flops - plans[1].flops == 2 * (plans[1].flops - plans[0].flops) > 0


def test_a_step_of_relaxation_costs_a_forward_and_a_backward_pass_of_all_blocks_but_the_first():
    net = Network(lambda: mlp((40,), 10, hidden=(30, 20)), (40,), 10)
    flops = [Planner(net).step(PredictiveCoding(relaxation=t), 16).flops for t in (1, 2, 6)]
    once = 2 * 2 * 16 * (30 * 20 + 20 * 10)
    assert flops[1] - flops[0] == once and flops[2] - flops[0] == 5 * once


@pytest.mark.parametrize("rule", [IL, PROX], ids=["il", "prox"])
def test_replicas_side_by_side_learn_what_each_learns_alone(rule):
    net = network("mlp")
    assert rule.stackable(net) and not rule.stackable(network("lenet"))
    alone = [double(rule.init(net, seed)) for seed in range(2)]
    stacked = alone[0]._replace(params={k: torch.stack([s.params[k] for s in alone]) for k in alone[0].params})
    batches = [nonuniform(batch(rule, 5, client=c)) for c in range(2)]
    x, y, weight = (torch.stack([b[i] for b in batches]) for i in range(3))
    stats = step(rule, net, stacked, Batch(x.flatten(2), y, weight), 0.3)
    for c, (state, b) in enumerate(zip(alone, batches, strict=True)):
        found = step(rule, net, state, b, 0.3)
        assert_close({k: v[c] for k, v in stats._asdict().items()}, found._asdict(), atol=1e-12)
        assert_close({k: p[c] for k, p in stacked.params.items()}, state.params, atol=1e-12)


def test_stats_are_of_the_forward_pass():
    net, b = network("mlp"), nonuniform(batch(IL))
    for rule in (IL, PROX):
        state = double(rule.init(net, seed=1))
        scores = net.forward(state.params, b.x)
        stats = step(rule, net, state, b)
        torch.testing.assert_close(stats.loss, cross_entropy(scores, b) * b.weight.sum(), rtol=0, atol=1e-12)
        assert stats.correct == ((scores.argmax(1) == b.y) * b.weight).sum()


def test_refusals_name_the_remedy():
    with pytest.raises(RuleError, match="add a layer before the output"):
        IL.check(Network(lambda: mlp(SHAPE, CLASSES, hidden=()), SHAPE, CLASSES))
    with pytest.raises(RuleError, match="use il or prox"):
        PredictiveCoding(scheme="pc")
    for setting in ({"relaxation": 0}, {"gamma_bot": 0.0}, {"gamma_top": -1.0}, {"epsilon": -1.0}):
        with pytest.raises(RuleError, match="needs relaxation ≥ 1"):
            PredictiveCoding(**setting)
    for setting in ({"optimizer": "adam"}, {"momentum": 0.9}, {"weight_decay": 0.1}):
        with pytest.raises(RuleError, match="finds its own steps"):
            PredictiveCoding(scheme="prox", **setting)
