"""The fused rule walks backpropagation's trajectory, and holds one block's gradients at a time."""

import pytest
from cases import NETS, assert_close, batch, copied, descent, double, network, nonuniform, step
from fedforward.algorithms import Backprop, FusedBackprop

RULE = FusedBackprop()


@pytest.mark.parametrize("name", NETS)
def test_one_step_subtracts_backpropagations_gradient(name):
    net, b = network(name), nonuniform(batch(RULE))
    state = double(RULE.init(net, seed=1))
    truth = descent(Backprop(), net, copied(state), b)
    assert_close(descent(RULE, net, state, b), truth, atol=1e-9)
    assert all(g.abs().max() > 1e-6 for g in truth.values())


@pytest.mark.parametrize("name", ["mlp", "mlp-gelu", "lenet", "cnn-group"])
@pytest.mark.parametrize("options", [{"momentum": 0.9}, {"optimizer": "adam", "lr": 0.01, "weight_decay": 0.01}])
def test_the_optimizer_sees_what_it_sees_in_backpropagation(name, options):
    net, rules = network(name), (Backprop(**options), FusedBackprop(**options))
    plain, fused = (double(rule.init(net, seed=1)) for rule in rules)
    for s in range(3):
        b = nonuniform(batch(RULE, step=s))
        wanted, got = (step(rule, net, state, b) for rule, state in zip(rules, (plain, fused), strict=True))
        assert_close(got._asdict(), wanted._asdict(), atol=1e-9)
    assert_close(fused.params, plain.params, atol=1e-9)
    assert_close(fused.slots, plain.slots, atol=1e-9)


def test_gradients_are_applied_one_by_one_from_the_last_block_to_the_first(monkeypatch):
    seen, update = [], FusedBackprop.update

    def watched(rule, state, grads, lr):
        seen.append(list(grads))
        update(rule, state, grads, lr)

    monkeypatch.setattr(FusedBackprop, "update", watched)
    net = network("lenet")
    step(RULE, net, double(RULE.init(net, seed=1)), batch(RULE))
    assert seen == [[key] for i in (2, 1, 0) for key in net.keys(i)]
