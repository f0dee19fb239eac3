"""What is found of a rule's blocks: angles with the true gradient, sparsity, and how goodness tells samples apart."""

import math

import pytest
import torch
from cases import CLASSES, RULES, batch, copied, equal, mostly, network, step, taken
from fedforward.algorithms import DFA, Backprop, ForwardForward, LayerCollaboration, MonoForward
from fedforward.algorithms.diagnosis import diagnose, hoyer, separation


@pytest.mark.parametrize("name", mostly(RULES))
def test_every_rule_can_be_diagnosed_and_is_left_as_it_was(name):
    rule = RULES[name]
    net = taken(rule, "mlp")
    state = rule.init(net, seed=1)
    before, b = copied(state), batch(rule, 8, dtype=torch.float32)
    found = diagnose(rule, net, state, b)
    assert [each.block for each in found] == list(range(len(net.blocks)))
    assert all(each.angle is None or 0 <= each.angle <= 180 for each in found)
    unlearned = name.startswith(("cascaded", "no-prop")) or name in (
        "forward-forward-one-pass", "forward-forward-hybrid", "knowledge-accumulation",
    )  # fmt: skip
    assert unlearned or found[0].angle is not None or found[1].angle is not None
    assert all(0 <= found[i].hoyer <= 1 for i in net.hidden) and found[-1].hoyer is None
    assert all(equal(a, b) for a, b in zip(state, before, strict=True))


def test_backpropagation_follows_the_gradient_and_its_opposite_does_not():
    class Ascent(Backprop):
        def update(self, state, grads, lr):
            super().update(state, grads, -lr)

    for name in ("mlp", "lenet", "cnn-group"):
        net, b = network(name), batch(Backprop(), 8)
        state = Backprop().init(net, seed=1)
        assert all(each.angle < 1e-4 for each in diagnose(Backprop(), net, state, b))
        assert all(each.angle > 180 - 1e-4 for each in diagnose(Ascent(), net, state, b))


def test_an_angle_is_that_of_two_known_directions():
    rule, net = DFA(momentum=0.0), network("mlp")
    b = batch(rule, 8)
    state = rule.init(net, seed=1)
    found = diagnose(rule, net, state, b)
    taken_by = {}
    for one in (rule, Backprop()):
        after = copied(state)
        after = after._replace(
            **{part: {k: t.double() for k, t in getattr(after, part).items()} for part in ("params", "fixed")}
        )
        step(one, net, after, b, lr=1.0)
        taken_by[one.name] = [
            torch.cat([(state.params[k] - after.params[k]).flatten() for k in net.keys(i)]) for i in range(3)
        ]
    for each, ours, true in zip(found, taken_by["dfa"], taken_by["backprop"], strict=True):
        cosine = torch.nn.functional.cosine_similarity(ours, true, dim=0)
        assert each.angle == pytest.approx(math.degrees(math.acos(min(1.0, float(cosine)))), abs=1e-3)
    assert 60 < found[0].angle < 120 and found[-1].angle < 1e-4  # random feedback knows nothing yet


def test_what_the_rule_does_not_learn_has_no_angle():
    net, rule = network("mlp"), MonoForward(prediction="last")
    found = diagnose(rule, net, rule.init(net, seed=1), batch(rule, 8))
    assert found[-1].angle is None  # its last projection predicts
    assert found[1].angle < 1e-4  # whose loss is what the block below it learns from


def test_hoyers_sparsity_is_1_for_one_unit_and_0_for_all_alike():
    a = torch.tensor([[0, 0, 7, 0], [2, 2, -2, 2], [0, 0, 0, 0], [3, 4, 0, 0]]).double()
    torch.testing.assert_close(hoyer(a), torch.tensor([1, 0, 0, 2 - 7 / 5], dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(hoyer(5 * a.view(4, 2, 2)), hoyer(a))  # of a map, of any length


def test_goodness_separates_what_a_trained_layer_tells_apart():
    assert separation(torch.tensor([3.0, 5.0]), torch.tensor([1.0, 3.0])) == pytest.approx(2)
    for kind in (ForwardForward, LayerCollaboration):
        rule, net = kind(lr=0.02), network("mlp")
        state, b = rule.init(net, seed=1), batch(rule, 64)
        b = b._replace(
            x=(b.x + 3 * torch.eye(CLASSES, 64).roll(20, 1)[b.y].view_as(b.x)).float(), weight=b.weight.float()
        )
        before = diagnose(rule, net, state, b)
        for s in range(60):
            step(rule, net, state, b._replace(draws=batch(rule, 64, step=s).draws))
        after = diagnose(rule, net, state, b)
        for i in net.hidden:
            assert after[i].separation > before[i].separation + 0.5
    assert all(each.separation is None for each in diagnose(DFA(), net, DFA().init(net, 1), batch(DFA(), 8)))
