"""Target projection is the gradient of the blocks' own losses against random targets, where its signal ends."""

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
from fedforward.algorithms import Network, RuleError
from fedforward.algorithms.feedback.drtp import DRTP
from fedforward.algorithms.feedback.target_projection import TargetProjection
from fedforward.algorithms.models import mlp

RULE = TargetProjection(momentum=0.0)


@pytest.mark.parametrize("loss", ["l2", "l1"])
@pytest.mark.parametrize("name", NETS)
def test_one_step_subtracts_the_gradients_of_the_blocks_own_losses(name, loss):
    net, rule = network(name), replace(RULE, loss=loss)
    state, b = double(rule.init(net, seed=1)), nonuniform(batch(rule))
    params, x, total = leaves(state.params), b.x, 0.0
    for i in net.hidden:
        x = run_block(net, i, params, x.detach())
        target = (torch.eye(10).double() @ state.fixed[f"{i}.target"])[b.y]
        apart = x.flatten(2) - target[:, :, None] if x.dim() > 2 else (x - target)[:, :, None]
        losses = (apart.square() / 2 if loss == "l2" else apart.abs()).mean(2).sum(1)  # over positions, of channels
        total = total + (losses * b.weight).sum() / b.weight.sum()
    total = total + cross_entropy(run_block(net, net.output, params, x.detach()), b)
    truth = dict(zip(params, torch.autograd.grad(total, list(params.values())), strict=True))
    assert_close(descent(rule, net, state, b), truth, atol=1e-9)
    assert all(g.abs().max() > 1e-6 for g in truth.values())


@pytest.mark.parametrize("loss, shape", [("l2", lambda d: d), ("l1", torch.sign)])
def test_of_dense_layers_it_is_the_papers_rule_sample_by_sample(loss, shape):
    net, rule = Network(lambda: mlp((6,), 3, hidden=(5, 4), activation="tanh"), (6,), 3), replace(RULE, loss=loss)
    state = double(rule.init(net, seed=1))
    b = nonuniform(batch(rule, shape=(6,), classes=3))
    truth = {key: torch.zeros_like(p) for key, p in state.params.items()}
    for x, y, weight in zip(b.x, b.y, b.weight / b.weight.sum(), strict=True):
        for i in range(3):
            w, bias = state.params[f"{i}.linear.weight"], state.params[f"{i}.linear.bias"]
            z = w @ x + bias
            if i < 2:
                delta = -shape(state.fixed[f"{i}.target"][y] - z.tanh()) * (1 - z.tanh() ** 2)
            else:
                delta = z.softmax(0) - torch.eye(3)[y]
            truth[f"{i}.linear.weight"] += weight * torch.outer(delta, x)
            truth[f"{i}.linear.bias"] += weight * delta
            x = z.tanh()
    assert_close(descent(rule, net, state, b), truth, atol=1e-9)


@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_targets_are_uniform_the_same_for_all_and_never_sent(scale):
    net, rule = network("lenet"), TargetProjection(scale=scale)
    state = rule.init(net, seed=1)
    assert set(state.fixed) == {"0.target", "1.target"} and set(state.params) == set(net.init(1))
    assert equal(state.fixed, replace(rule, lr=1.0, loss="l1").init(net, seed=1).fixed)  # of the seed alone
    before = copied(state).fixed
    step(rule, net, state, batch(rule, dtype=torch.float32))
    assert equal(state.fixed, before)
    for i, channels in ((0, 4), (1, 6)):
        target = state.fixed[f"{i}.target"] / scale
        assert target.shape == (10, channels) and 0.9 < target.abs().max() <= 1 + 1e-6
        assert abs(target.mean()) < 4 / (3 * target.numel()) ** 0.5  # 4 standard errors
        assert abs(target.square().mean() - 1 / 3) < 4 * (4 / 45 / target.numel()) ** 0.5


def test_a_step_needs_one_block_whatever_the_depth():
    # Its input and output, the rows of the labels and what is made of them, and the shares.
    assert_one_block_is_needed(TargetProjection(), numbers=4)


def test_the_signal_ends_at_the_target_where_that_of_drtp_does_not():
    net, moved = network("mlp-tanh"), {}
    for rule in (TargetProjection(momentum=0.0, lr=1.0, scale=0.9), DRTP(momentum=0.0, lr=1.0)):
        state, b = double(rule.init(net, seed=1)), batch(rule)
        b = b._replace(x=b.x - 0.5, y=torch.arange(6))  # each of a class of its own: every target can be met
        for _ in range(300):
            before = state.params["0.linear.weight"].clone()
            step(rule, net, state, b)
        moved[rule.name] = float((state.params["0.linear.weight"] - before).norm())
        if rule.name == "target-projection":
            a = net.block(0, state.params, b.x)
            torch.testing.assert_close(a, state.fixed["0.target"][b.y], rtol=0, atol=1e-3)
    assert moved["target-projection"] < moved["drtp"] / 100


def test_an_unknown_loss_is_refused():
    with pytest.raises(RuleError, match="unknown loss 'l3': use l2 or l1"):
        TargetProjection(loss="l3")
