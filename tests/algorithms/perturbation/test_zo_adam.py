"""Adam in slices against Adam on the whole estimate, and what the slices save."""

import pytest
import torch
from cases import assert_close, copied, equal, network
from estimates import SMALL, digits_losses, flat, planner, problem, signs
from fedforward.algorithms import Backprop, RuleError, State, ZOAdam, optimizer
from fedforward.algorithms.directions import Directions


@pytest.mark.parametrize("clients", [1, 3])
@pytest.mark.parametrize("name", SMALL)
def test_slices_of_adam_are_adam_of_the_whole_estimate(name, clients):
    net, rule = SMALL[name], ZOAdam(directions=4)
    state, _ = problem(rule, net)
    whole = copied(state)
    for s in range(3):
        draws = [Directions(0, 1, s, client) for client in range(clients)]
        answers = torch.randn(clients, 4, generator=torch.Generator().manual_seed(s)).double()
        c = rule.coefficients(answers, torch.full((clients,), 1 / clients).double())
        rule.descend(state, draws, c, 0.1)
        dense = sum(row @ signs(whole.params, own, 4) for row, own in zip(c, draws, strict=True))
        for key, part in zip(whole.params, dense.split([p.numel() for p in whole.params.values()]), strict=True):
            optimizer.update("adam", 0.0, 0.0, whole, key, part.clone().view_as(whole.params[key]), 0.1)
    assert_close(state.params, whole.params, atol=1e-12)
    assert_close(state.slots, whole.slots, atol=1e-12)
    assert {float(n) for key, n in state.slots.items() if key.endswith("steps")} == {3.0}


def test_the_size_of_a_slice_changes_no_bit():
    found = []
    for chunk in (1, 1000, 8192, 10**6):
        rule = ZOAdam(directions=3, chunk=chunk)
        params = {"a": torch.ones(20_001), "b": torch.ones(300, 7), "c": torch.ones(())}
        state = State(params, {}, optimizer.slots("adam", 0.0, params))
        for s in range(3):
            rule.apply(state, Directions(1, 2, s), torch.tensor([0.3, -1.7, 1e-3]) * (s + 1), 0.01)
        found.append(state)
    assert all(equal(found[0].params, other.params) and equal(found[0].slots, other.slots) for other in found[1:])


def test_a_step_is_scale_free_from_the_first():
    net, rule = SMALL["lenet"], ZOAdam(directions=1)
    for scale in (1e-3, 1e3):
        state, b = problem(rule, net)
        before = flat(state.params)
        rule.apply(state, b.draws, torch.tensor([scale]).double(), 0.1)
        moved = (flat(state.params) - before).abs()
        torch.testing.assert_close(moved, torch.full_like(moved, 0.1), rtol=1e-4, atol=0)


@pytest.mark.parametrize("model", ["mlp", "lenet"])
def test_a_step_needs_two_models_above_inference(model):
    plans = planner(model)
    params = plans.params(Backprop())
    moments = 8 * sum(p.numel() for p in params.values()) + 4 * len(params)
    for k in (2, 8, 12):
        assert plans.step(ZOAdam(directions=k), 64).peak == plans.forward(64).peak + moments + 4 * (k + 4)


@pytest.mark.parametrize("k, chunk", [(4, 4096), (16, 8192), (64, 4096)])
def test_where_inference_needs_little_the_signs_of_a_slice_are_the_peak(k, chunk):
    plans = planner("mlp")  # of one sample
    parts = plans.step(ZOAdam(directions=k, chunk=chunk), 1).parts
    q = max(256, chunk // k)
    assert 4 * q * k < parts["activations"] <= 4 * q * k + 24 * q + 12 * k + 64


def test_a_hundred_steps_on_the_digits_take_a_quarter_off_the_loss():
    losses = digits_losses(ZOAdam(directions=8), network("mlp-tanh"), 100)
    assert losses[0] > 2.2 and losses[-1] < 3 / 4 * losses[0]


def test_a_pool_is_refused():
    with pytest.raises(RuleError, match="zo-adam does more with directions than add them up"):
        ZOAdam(pool=64)
