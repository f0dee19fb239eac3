"""The trained blocks get backpropagation's gradient; the frozen ones stay, are not sent and leave no graph."""

import pytest
import torch
from cases import NETS, assert_close, batch, copied, descent, double, equal, network, nonuniform, step
from fedforward.algorithms import Backprop, RuleError, SelectiveBackprop, State


def split(net, frozen):
    """Return the names of the frozen parameters and of the trained ones."""
    keys = [(i, key) for i in range(len(net.blocks)) for key in net.keys(i)]
    return [key for i, key in keys if i < frozen], [key for i, key in keys if i >= frozen]


@pytest.mark.parametrize("frozen", [0, 1, 2])
@pytest.mark.parametrize("name", NETS)
def test_the_trained_blocks_step_as_in_backpropagation(name, frozen):
    rule, net = SelectiveBackprop(frozen=frozen), network(name)
    state, b = double(rule.init(net, seed=1)), nonuniform(batch(rule))
    whole = State(state.fixed | state.params, {}, {})
    truth = descent(Backprop(), net, copied(whole), b)
    before = copied(state).fixed
    assert_close(descent(rule, net, state, b), {key: truth[key] for key in split(net, frozen)[1]}, atol=1e-9)
    assert equal(state.fixed, before)


def test_what_is_frozen_comes_from_the_seed_and_is_not_exchanged():
    net = network("lenet")
    first, plain = SelectiveBackprop(frozen=2, momentum=0.9).init(net, seed=1), Backprop().init(net, seed=1)
    frozen, trained = split(net, 2)
    assert list(first.fixed) == frozen and list(first.params) == trained
    assert set(first.slots) == {f"{key}.velocity" for key in trained}
    assert equal(first.fixed | first.params, plain.params)


def test_inference_and_stats_are_of_the_whole_network():
    rule, net = SelectiveBackprop(), network("lenet")
    state, b = double(rule.init(net, seed=1)), nonuniform(batch(rule))
    scores = rule.logits(net, state, b.x)
    assert torch.equal(scores, net.forward(state.fixed | state.params, b.x))
    stats = step(rule, net, state, b)
    assert stats.correct == ((scores.argmax(1) == b.y) * b.weight).sum()
    losses = torch.nn.functional.cross_entropy(scores, b.y, reduction="none")
    torch.testing.assert_close(stats.loss, (losses * b.weight).sum(), rtol=0, atol=1e-12)


def test_refusals_name_the_remedy():
    net = network("lenet")
    SelectiveBackprop(frozen=2).check(net)
    with pytest.raises(RuleError, match=r"would freeze 3 of the 3 blocks .* use --set rule.frozen=2 or less"):
        SelectiveBackprop(frozen=3).check(net)
    with pytest.raises(RuleError, match="frozen ≥ 0"):
        SelectiveBackprop(frozen=-1)
