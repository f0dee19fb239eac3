"""Mono-Forward is the gradient of each block's own cross-entropy, and of nothing else."""

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
from fedforward.algorithms import MonoForward, Network, RuleError
from fedforward.algorithms.models import mlp

RULE = MonoForward(lr=0.1)


def local_gradients(net, params, b):
    """Return the gradients of Σ_l CE(M_l pool(a_l), y) with every block's input detached, by autograd."""
    params, x, loss = leaves(params), b.x, 0.0
    for i in net.hidden:
        a = run_block(net, i, params, x.detach())
        pooled = a.flatten(2).mean(-1) if a.dim() == 4 else a
        loss = loss + cross_entropy(pooled @ params[f"{i}.head"].T, b)
        x = a
    return dict(zip(params, torch.autograd.grad(loss, list(params.values())), strict=True))


@pytest.mark.parametrize("name", NETS)
def test_one_step_subtracts_the_gradient_of_the_local_losses(name):
    net = network(name)
    state = double(RULE.init(net, seed=1))
    b = nonuniform(batch(RULE))
    truth = local_gradients(net, state.params, b)
    assert_close(descent(RULE, net, state, b), truth, atol=1e-9)
    assert all(g.abs().max() > 1e-6 for g in truth.values())


@pytest.mark.parametrize("name", ["mlp", "lenet"])
def test_a_later_head_never_changes_an_earlier_block(name):
    net, b = network(name), batch(RULE)
    state = double(RULE.init(net, seed=1))
    other = copied(state)
    other.params["1.head"].neg_()
    step(RULE, net, state, b)
    step(RULE, net, other, b)
    first = [key for key in state.params if key.startswith("0.")]
    assert all(torch.equal(state.params[key], other.params[key]) for key in first)
    assert not torch.allclose(state.params["1." + net.keys(1)[0].partition(".")[2]], other.params[net.keys(1)[0]])


def test_prediction_adds_the_scores_of_all_blocks_or_takes_the_last():
    net, b = network("lenet"), batch(RULE)
    params = double(RULE.init(net, seed=1)).params
    maps = [run_block(net, 0, params, b.x)]
    maps.append(run_block(net, 1, params, maps[0]))
    scores = [torch.einsum("bchw,kc->bk", a, params[f"{i}.head"]) / a[0, 0].numel() for i, a in enumerate(maps)]
    state = double(RULE.init(net, seed=1))
    torch.testing.assert_close(RULE.logits(net, state, b.x), scores[0] + scores[1], rtol=0, atol=1e-12)
    torch.testing.assert_close(MonoForward(prediction="last").logits(net, state, b.x), scores[1], rtol=0, atol=1e-12)


def test_stats_are_of_the_prediction_before_the_update():
    net, b = network("mlp"), nonuniform(batch(RULE))
    for rule in (RULE, MonoForward(prediction="last")):
        state = double(rule.init(net, seed=1))
        scores = rule.logits(net, state, b.x)
        stats = step(rule, net, state, b)
        torch.testing.assert_close(stats.loss, cross_entropy(scores, b) * b.weight.sum(), rtol=0, atol=1e-12)
        assert stats.correct == ((scores.argmax(1) == b.y) * b.weight).sum()


def test_the_output_block_is_neither_trained_nor_sent():
    net = network("mlp")
    assert set(RULE.init(net, 0).params) == {
        f"{i}.{name}" for i in (0, 1) for name in ("linear.weight", "linear.bias", "head")
    }


def test_refusals_name_the_remedy():
    with pytest.raises(RuleError, match="add a layer before the output"):
        RULE.check(Network(lambda: mlp(SHAPE, CLASSES, hidden=()), SHAPE, CLASSES))
    with pytest.raises(RuleError, match="use sum or last"):
        MonoForward(prediction="first")
