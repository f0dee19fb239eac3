"""Local forward gradients against autograd of the local losses, their error against theory, and how well they learn."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from cases import CLASSES, SHAPE, assert_close, batch, copied, descent, double, leaves, step
from cases import weighted_cross_entropy as cross_entropy
from estimates import SMALL, assert_mean_is, flat, mean_cosine, problem
from fedforward.algorithms import Backprop, Batch, LocalForwardGradient, Network, RuleError
from fedforward.algorithms.layerwise.mono_forward import pool
from fedforward.algorithms.models import lenet, mlp
from fedforward.algorithms.seeds import Place
from fedforward.client.plan import Planner
from sklearn.datasets import load_digits

NETS = SMALL | {"mlp-relu": Network(lambda: mlp((5,), 4, hidden=(20, 12)), (5,), 4)}
PLAIN = LocalForwardGradient(momentum=0.0)


def local_gradients(net, params, b):
    """Return the gradients of every block's own loss, nothing passing from block to block."""
    params, x, losses = leaves(params), b.x, 0.0
    for i in net.hidden:
        a = net.block(i, params, x)
        head = params[f"{i}.head"]
        losses = losses + cross_entropy(pool(a, head) @ head.T, b)
        x = a.detach()
    losses = losses + cross_entropy(net.block(net.output, params, x), b)
    return dict(zip(params, torch.autograd.grad(losses, list(params.values())), strict=True))


def guessed(params):
    """Return the keys of what learns from guesses: not heads, not the output block."""
    last = max(key.split(".")[0] for key in params)
    return [key for key in params if not key.endswith(".head") and not key.startswith(last)]


def gradients_of_steps(rule, net, state, b, steps):
    for s in range(steps):
        draws = rule.draw(Place(0, 1, 0, s), len(b.y), net.classes)
        yield descent(rule, net, copied(state), b._replace(draws=draws))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in ("mlp-relu", "mlp-gelu"))) for name in NETS]
)
def test_guesses_are_unbiased_and_heads_and_output_exact(name):
    net, rule = NETS[name], replace(PLAIN, directions=8)
    state, b = problem(rule, net)
    truth, found = local_gradients(net, state.params, b), []
    keys = guessed(truth)
    for grads in gradients_of_steps(rule, net, state, b, 600):
        exact = {key: g for key, g in grads.items() if key not in keys}
        assert_close(exact, {key: truth[key] for key in exact}, atol=1e-12)
        found.append(flat({key: grads[key] for key in keys}))
    found, truth = torch.stack(found), flat({key: truth[key] for key in keys})
    seen = truth != 0  # what a ReLU never lets through has no guess either
    assert not found[:, ~seen].any() and seen.sum() > 10
    assert_mean_is(found[:, seen], truth[seen])


@pytest.mark.parametrize("activation", ["relu", "tanh"])
@pytest.mark.parametrize("q", [1, 8])
def test_the_error_of_a_guess_is_its_units_less_one_over_q(q, activation):
    net = Network(lambda: mlp((40,), 10, hidden=(64,), activation=activation), (40,), 10)
    rule = replace(PLAIN, directions=q)
    state = double(rule.init(net, seed=1))
    b, head, rows = batch(rule, 1, shape=(40,)), state.params["0.head"], 5000
    a = net.block(0, state.params, b.x)
    live = int((a != 0).sum())
    assert live == 64 or (activation == "relu" and 20 < live < 44)
    delta = (a @ head.T).softmax(1)
    delta[0, b.y[0]] -= 1
    truth = (delta @ head)[0] * (a[0] != 0)
    many = rule.draw(Place(0, 1, 0, 0), rows, 10)  # one sample many times
    found = rule._guess(many, 0, a.expand(rows, -1), delta.expand(rows, -1), head, relu=activation == "relu")
    error = (found - truth).square().sum(1).mean() / truth.square().sum()
    assert float(error) == pytest.approx((live - 1) / q, rel=0.1)
    assert mean_cosine(found, truth) == pytest.approx((q / (q + live + 1)) ** 0.5, rel=0.1 if q > 1 else 0.2)


def test_the_errors_of_samples_average_out():
    net, rule, errors = Network(lambda: mlp((20,), 5, hidden=(32,)), (20,), 5), replace(PLAIN, directions=1), {}
    state = double(rule.init(net, seed=1))
    one = batch(rule, 1, shape=(20,), classes=5)
    truth = local_gradients(net, state.params, one)["0.linear.bias"]
    for size in (1, 16):
        b = Batch(one.x.expand(size, -1), one.y.expand(size), torch.ones(size, dtype=torch.float64))
        found = [g["0.linear.bias"] for g in gradients_of_steps(rule, net, state, b, 300)]
        errors[size] = float((torch.stack(found) - truth).square().sum(1).mean())
    assert errors[1] / errors[16] == pytest.approx(16, rel=0.2)


@pytest.mark.parametrize("q", [1, 32, 64])
@pytest.mark.parametrize("widths", [(784, 256, 256, 256), (100, 30, 400, 20), (50, 200, 40)])
def test_a_step_needs_a_block_its_guess_and_a_perturbation(widths, q):
    size, classes, peaks = 64, 10, []
    net = Network(lambda: mlp(widths[:1], classes, hidden=widths[1:]), widths[:1], classes)
    for i, (before, width) in enumerate(itertools.pairwise(widths)):
        kept = 4 * size * ((before if i else 0) + 2 * width + classes)  # input, output, guess, δ
        whole = 64 * -(-width // 64)
        peaks.append(kept + size * max(q * whole // 8 + 4 * width + whole, q * whole // 4))
    above = Planner(net).step(replace(PLAIN, directions=q), size).parts["activations"]
    assert max(peaks) <= above <= max(peaks) + 8 * q * 2 + 8  # counters, and places of bits


def test_on_the_digits_it_comes_within_two_points_of_backpropagation():
    net = Network(lambda: mlp(SHAPE, CLASSES), SHAPE, CLASSES)
    x, y = (torch.from_numpy(a) for a in load_digits(return_X_y=True))
    x, accuracy, epochs = x.float().view(-1, *SHAPE) / 16, {}, 8
    for rule in (Backprop(), LocalForwardGradient()):
        rng = np.random.default_rng(0)
        train, test = torch.from_numpy(rng.permutation(len(y))).split([1437, 360])
        state, place = rule.init(net, seed=0), 0
        for epoch in range(epochs):
            lr = rule.lr * min(1, 2 * (1 - epoch / epochs))
            for rows in train[torch.from_numpy(rng.permutation(len(train)))].split(32):
                draws = rule.draw(Place(0, 0, 0, place), len(rows), CLASSES)
                step(rule, net, state, Batch(x[rows], y[rows], torch.ones(len(rows)), draws), lr)
                place += 1
        accuracy[rule.name] = float((rule.logits(net, state, x[test]).argmax(1) == y[test]).float().mean())
    assert accuracy["local-forward-gradient"] > max(0.95, accuracy["backprop"] - 0.02)


def test_convolutions_learn():
    net, rule = Network(lambda: lenet(SHAPE, CLASSES, channels=(16, 32)), SHAPE, CLASSES), LocalForwardGradient()
    x, y = (torch.from_numpy(a[:100]) for a in load_digits(return_X_y=True))
    x, losses, state = x.float().view(-1, *SHAPE) / 16, [], rule.init(net, seed=0)
    for s in range(150):
        b = Batch(x, y, torch.ones(100), rule.draw(Place(0, 0, 0, s), 100, CLASSES))
        losses.append(float(step(rule, net, state, b).loss) / 100)
    assert losses[0] > 2.2 and losses[-1] < losses[0] / 2


def test_impossible_settings_are_refused():
    with pytest.raises(RuleError, match="directions ≥ 1"):
        LocalForwardGradient(directions=0)
    with pytest.raises(RuleError, match="add a layer before the output"):
        LocalForwardGradient().check(Network(torch.nn.Sequential(torch.nn.Linear(3, 2)), (3,), 2))
