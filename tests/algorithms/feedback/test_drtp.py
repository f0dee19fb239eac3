"""DRTP is the gradient of a pseudo-loss in which a random row for each label stands for the error."""

from dataclasses import replace

import pytest
import torch
from cases import (
    NETS,
    assert_close,
    assert_one_block_is_needed,
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
from fedforward.algorithms import Network
from fedforward.algorithms.feedback.drtp import DRTP
from fedforward.algorithms.models import mlp

RULE = DRTP(momentum=0.0)


@pytest.mark.parametrize("name", NETS)
def test_one_step_subtracts_the_gradient_of_the_injected_labels(name):
    net = network(name)
    state, b = double(RULE.init(net, seed=1)), nonuniform(batch(RULE))
    params, x, loss = leaves(state.params), b.x, 0.0
    labels, share = torch.eye(10).double()[b.y], b.weight / b.weight.sum()
    for i in net.hidden:
        x = run_block(net, i, params, x.detach())
        loss = loss + (x.flatten(1) * (labels @ state.fixed[f"{i}.feedback"]) * share[:, None]).sum()
    loss = loss + cross_entropy(run_block(net, net.output, params, x.detach()), b)
    truth = dict(zip(params, torch.autograd.grad(loss, list(params.values())), strict=True))
    assert_close(descent(RULE, net, state, b), truth, atol=1e-9)
    assert all(g.abs().max() > 1e-6 for g in truth.values())


def test_of_dense_layers_it_is_the_papers_rule_sample_by_sample():
    net = Network(lambda: mlp((6,), 3, hidden=(5, 4), activation="tanh"), (6,), 3)
    state = double(RULE.init(net, seed=1))
    b = nonuniform(batch(RULE, shape=(6,), classes=3))
    truth = {key: torch.zeros_like(p) for key, p in state.params.items()}
    for x, y, weight in zip(b.x, b.y, b.weight / b.weight.sum(), strict=True):
        for i in range(3):
            w, bias = state.params[f"{i}.linear.weight"], state.params[f"{i}.linear.bias"]
            z = w @ x + bias
            delta = state.fixed[f"{i}.feedback"][y] * (1 - z.tanh() ** 2) if i < 2 else z.softmax(0) - torch.eye(3)[y]
            truth[f"{i}.linear.weight"] += weight * torch.outer(delta, x)
            truth[f"{i}.linear.bias"] += weight * delta
            x = z.tanh()
    assert_close(descent(RULE, net, state, b), truth, atol=1e-9)


def test_the_published_codes_unreduced_signal_is_a_scale_of_batch_and_classes():
    # Of a learning rate of 1 there, the sum over the batch moves hidden blocks, and 1/(B C) of it the output block.
    net, size, classes = network("mlp-tanh"), 6, 10
    plain, unreduced = (replace(RULE, scale=scale) for scale in (1.0, float(size * classes)))
    start, b = double(plain.init(net, seed=1)), batch(RULE, size)
    params, labels = leaves(start.params), start.fixed["0.feedback"][b.y]
    (summed,) = torch.autograd.grad((run_block(net, 0, params, b.x) * labels).sum(), params["0.linear.weight"])
    own, found = descent(plain, net, copied(start), b), descent(unreduced, net, double(unreduced.init(net, seed=1)), b)
    torch.testing.assert_close(found["0.linear.weight"] / classes, summed, rtol=0, atol=1e-6)
    torch.testing.assert_close(found["2.linear.weight"], own["2.linear.weight"], rtol=0, atol=1e-12)


@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_feedback_is_uniform_the_same_for_all_and_never_sent(scale):
    net, rule = network("mlp"), DRTP(scale=scale)
    state = rule.init(net, seed=1)
    assert set(state.fixed) == {"0.feedback", "1.feedback"} and set(state.params) == set(net.init(1))
    assert equal(state.fixed, replace(rule, lr=1.0).init(net, seed=1).fixed)  # of the seed alone
    before = copied(state).fixed
    step(rule, net, state, batch(rule, dtype=torch.float32))
    assert equal(state.fixed, before)
    for i, width in ((0, 24), (1, 16)):
        feedback = state.fixed[f"{i}.feedback"] * (width / 6) ** 0.5 / scale
        assert feedback.shape == (10, width) and 0.95 < feedback.abs().max() <= 1 + 1e-6
        assert abs(feedback.mean()) < 4 / (3 * feedback.numel()) ** 0.5  # 4 standard errors
        assert abs(feedback.square().mean() - 1 / 3) < 4 * (4 / 45 / feedback.numel()) ** 0.5


def test_a_step_needs_one_block_whatever_the_depth():
    # Its input and output, the rows of the labels, which become the signal, and the shares; a bias's gradient.
    assert_one_block_is_needed(DRTP(), numbers=3, more=1)


def test_the_signal_never_ends():
    # Tanh units saturate while their weights still grow, in steps that no error shrinks.
    net, rule = network("mlp-tanh"), DRTP(momentum=0.0, lr=0.5)
    state, b, norms = double(rule.init(net, seed=1)), batch(rule), []
    for _ in range(600):
        stats = step(rule, net, state, b)
        norms.append(float(state.params["0.linear.weight"].norm()))
    assert float(stats.loss) < 0.05 and norms[0] < norms[199] < norms[399] < norms[599]
    assert norms[599] - norms[399] > 0.1
