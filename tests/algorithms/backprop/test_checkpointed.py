"""Running blocks again changes no gradient, and happens where it saves something."""

import pytest
import torch
from cases import NETS, assert_close, batch, copied, descent, double, equal, network, nonuniform, step
from fedforward.algorithms import Backprop, CheckpointedBackprop, FusedBackprop, Network


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", NETS)
def test_one_step_subtracts_backpropagations_gradient(name, fused):
    rule, net = CheckpointedBackprop(fused=fused), network(name)
    state, b = double(rule.init(net, seed=1)), nonuniform(batch(rule))
    truth = descent(Backprop(), net, copied(state), b)
    assert_close(descent(rule, net, state, b), truth, atol=1e-9)
    assert all(g.abs().max() > 1e-6 for g in truth.values())


@pytest.mark.parametrize("fused", [True, False])
def test_momentum_and_stats_are_backpropagations(fused):
    net, rules = network("lenet"), (Backprop(momentum=0.9), CheckpointedBackprop(momentum=0.9, fused=fused))
    plain, again = (double(rule.init(net, seed=1)) for rule in rules)
    for s in range(3):
        b = nonuniform(batch(rules[0], step=s))
        wanted, got = (step(rule, net, state, b) for rule, state in zip(rules, (plain, again), strict=True))
        assert_close(got._asdict(), wanted._asdict(), atol=1e-9)
    assert_close(again.params, plain.params, atol=1e-9)
    assert_close(again.slots, plain.slots, atol=1e-9)


@pytest.mark.parametrize(
    "name, runs",
    [
        ("mlp", [0, 1, 2]),  # dense blocks in closed form have nothing to forget
        ("mlp-gelu", [0, 1, 2, 1, 0]),
        ("lenet", [0, 1, 2, 1, 0]),  # the last block's turn comes at once
    ],
)
def test_blocks_that_forget_are_run_again_from_the_last_to_the_first(name, runs, monkeypatch):
    seen, block = [], Network.block

    def watched(net, i, params, x):
        seen.append(i)
        return block(net, i, params, x)

    monkeypatch.setattr(Network, "block", watched)
    rule, net = CheckpointedBackprop(), network(name)
    step(rule, net, rule.init(net, seed=1), batch(rule, dtype=torch.float32))
    assert seen == runs


def test_on_dense_blocks_it_is_the_fused_rule_bit_for_bit():
    net, rules = network("mlp"), (FusedBackprop(), CheckpointedBackprop())
    states = [rule.init(net, seed=1) for rule in rules]
    for rule, state in zip(rules, states, strict=True):
        step(rule, net, state, batch(rule, dtype=torch.float32))
    assert equal(states[0].params, states[1].params)


def test_without_fusing_the_parameters_stay_until_all_gradients_are_known(monkeypatch):
    seen = []
    monkeypatch.setattr(CheckpointedBackprop, "update", lambda rule, state, grads, lr: seen.append(set(grads)))
    rule, net = CheckpointedBackprop(fused=False), network("lenet")
    state = double(rule.init(net, seed=1))
    step(rule, net, state, batch(rule))
    assert seen == [set(state.params)]
