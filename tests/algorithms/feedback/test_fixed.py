"""Matrices that are made again are what they should be, teach what kept ones would, and take no room of their own."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from cases import batch, copied, double, equal, network, step
from fedforward.algorithms import (
    DFA,
    DRTP,
    PEPITA,
    FeedbackAlignment,
    Network,
    RuleError,
    SignSymmetry,
    TargetProjection,
)
from fedforward.algorithms.feedback import feedback_alignment, fixed, pepita, sign_symmetry, target_projection
from fedforward.algorithms.feedback.fixed import KINDS, feedback, kept_seed, remade
from fedforward.algorithms.models import mlp
from fedforward.client.plan import Planner

SEED = kept_seed(3)["seed"]
RULES = {
    "dfa": DFA(), "drtp": DRTP(), "target-projection": TargetProjection(), "feedback-alignment": FeedbackAlignment(),
    "sign-symmetry": SignSymmetry(scheme="frsf"), "pepita": PEPITA(),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_made_again_have_the_law_of_those_that_are_kept(kind):
    shape = torch.Size((10, 30_000))
    kept = feedback(0, 1, *shape, 2.0, kind)
    again = remade(SEED, 1, shape, 2 / shape[1] ** 0.5, torch.float32, kind)
    assert again.shape == kept.shape
    assert float(again.square().mean()) == pytest.approx(float(kept.square().mean()), rel=0.01)
    for part in (-0.9, -0.6, -0.3, -0.1, 0.1, 0.3, 0.6, 0.9):
        fractions = [float((m < part * kept.abs().max()).float().mean()) for m in (kept, again)]
        assert fractions[0] == pytest.approx(fractions[1], abs=5 / shape.numel() ** 0.5)
    if kind in ("sign", "ternary"):
        torch.testing.assert_close(again.unique(), kept.unique())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_matrix_is_the_same_in_pieces_of_any_size(kind, dtype, monkeypatch):
    whole = remade(SEED, 4, torch.Size((7, 33)), 0.5, dtype, kind)
    monkeypatch.setattr(fixed, "AT_ONCE", 10)
    assert torch.equal(remade(SEED, 4, torch.Size((7, 33)), 0.5, dtype, kind), whole)
    assert not torch.equal(remade(SEED, 5, torch.Size((7, 33)), 0.5, dtype, kind), whole)
    assert not torch.equal(remade(kept_seed(4)["seed"], 4, torch.Size((7, 33)), 0.5, dtype, kind), whole)


@pytest.mark.parametrize("net", ["mlp", "lenet"])
@pytest.mark.parametrize("name", RULES)
def test_a_step_with_matrices_made_again_is_that_with_the_same_ones_kept(name, net, monkeypatch):
    rule, net, made = RULES[name], network(net), {}

    def recorded(seed, i, *args):
        made[i] = remade(seed, i, *args)
        return made[i].clone()

    for module in (fixed, feedback_alignment, pepita, sign_symmetry, target_projection):
        monkeypatch.setattr(module, "remade", recorded)
    again = replace(rule, regenerate=True)
    state, b = double(again.init(net, seed=1)), batch(rule)
    other = copied(state)
    step(again, net, state, b)
    kept = rule.init(net, seed=1).fixed
    same = {key: made[int(key[0]) if key[0].isdigit() else 0] for key in kept}
    assert all(same[key].shape == m.shape for key, m in kept.items())
    other = other._replace(fixed={key: m.abs() for key, m in same.items()} if name == "sign-symmetry" else same)
    step(rule, net, other, b)
    assert equal(state.params, other.params)
    assert all(0.5 < same[key].square().mean() / m.double().square().mean() < 2 for key, m in kept.items())


@pytest.mark.parametrize("name", RULES)
def test_no_more_than_one_blocks_matrix_is_there_at_a_time(name):
    rule = RULES[name]
    nets = [Network(partial(mlp, (64,), 10, hidden=(64,) * depth), (64,), 10) for depth in (2, 4, 8)]
    kept, again = ([Planner(net).step(each, 4) for net in nets] for each in (rule, replace(rule, regenerate=True)))
    assert {plan.parts["state"] for plan in again} == {8}
    assert name == "pepita" or kept[0].parts["state"] < kept[1].parts["state"] < kept[2].parts["state"]
    if name in ("feedback-alignment", "sign-symmetry"):  # as large as the weights of the four blocks more
        growth = [plans[2].peak - plans[1].peak for plans in (kept, again)]
        assert abs(growth[0] - growth[1] - 4 * 4 * 64 * 64) < 64


def test_what_is_not_fixed_is_not_made_again():
    with pytest.raises(RuleError, match="only frsf has fixed matrices"):
        SignSymmetry(regenerate=True)
    with pytest.raises(RuleError, match="mirrors leave no fixed matrix"):
        PEPITA(mirror=0.1, regenerate=True)
    for rule in (DFA, DRTP, PEPITA, TargetProjection):
        with pytest.raises(RuleError, match="above 0"):
            rule(scale=-1.0, regenerate=True).init(network("mlp"), 1)
