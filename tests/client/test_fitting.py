"""What is chosen for a budget fits it, is the largest that does, and is refused when nothing does."""

from dataclasses import replace

import pytest
from cases import network, takes
from fedforward.algorithms import LADDER, RULES, Backprop, Baffle, MonoForward
from fedforward.client.fitting import OverBudget, fit
from fedforward.client.plan import Planner

NET = network("lenet")
PLANNER = Planner(NET)
WHOLE = PLANNER.step(Backprop(), 32).peak


def test_what_fits_is_left_as_it_is():
    for budget in (None, WHOLE, 10 * WHOLE):
        chosen = fit(PLANNER, Backprop(), 32, budget)
        assert (chosen.rule, chosen.rank, chosen.micro_batch, chosen.peak) == (Backprop(), 0, 0, WHOLE)
    assert fit(PLANNER, Backprop(), 32, None, micro_batch=5).micro_batch == 5


@pytest.mark.parametrize("part", [0.95, 0.7, 0.4, 0.25])
def test_the_largest_part_of_a_batch_that_fits_is_taken(part):
    budget = int(part * WHOLE)
    chosen = fit(PLANNER, Backprop(), 32, budget)
    assert 1 <= chosen.micro_batch < 32 and chosen.peak <= budget
    assert PLANNER.step(Backprop(), 32, chosen.micro_batch).peak == chosen.plan.peak
    if chosen.micro_batch < 31:
        assert PLANNER.step(Backprop(), 32, chosen.micro_batch + 1).peak > budget


def test_parts_asked_for_are_made_smaller_only_where_needed():
    asked = PLANNER.step(Backprop(), 32, 8).peak
    assert fit(PLANNER, Backprop(), 32, asked, micro_batch=8).micro_batch == 8
    assert fit(PLANNER, Backprop(), 32, asked - 1, micro_batch=8).micro_batch == 7
    assert fit(PLANNER, Backprop(), 4, None, micro_batch=8).micro_batch == 0  # no batch has that many


def test_slices_of_directions_give_way_before_the_batch_does():
    rule, batch = Baffle(directions=3, chunk=8192), 2
    whole = PLANNER.step(rule, batch).peak
    chosen = fit(PLANNER, rule, batch, whole - 1)
    assert chosen.micro_batch == 0 and 256 <= chosen.chunk < 8192
    assert chosen.peak <= whole - 1 < PLANNER.step(replace(rule, chunk=chosen.chunk + 256), batch).peak
    smallest = PLANNER.step(replace(rule, chunk=256), batch).peak
    chosen = fit(PLANNER, rule, batch, smallest - 1)
    assert chosen.micro_batch == 1 and chosen.peak < smallest
    assert PLANNER.step(replace(rule, chunk=chosen.chunk + 256), batch, 1).peak >= smallest


def test_the_best_rule_of_the_ladder_that_fits_is_taken():
    ladder = [RULES[name](optimizer="sgd") for name in LADDER[:4] if name != "backprop"]
    single = min(PLANNER.step(Backprop(), 32, micro).peak for micro in (0, 1))
    assert fit(PLANNER, Backprop(), 32, single, ladder=ladder).rank == 0  # its own in parts, before another rule
    needs = {rule.name: min(PLANNER.step(rule, 32, micro).peak for micro in (0, 1)) for rule in ladder}
    assert needs["backprop-checkpointed"] < single
    budget = max(need for need in needs.values() if need < single)
    chosen = fit(PLANNER, Backprop(), 32, budget, ladder=ladder)
    best = next(rule for rule in ladder if needs[rule.name] <= budget)
    assert chosen.rule.name == best.name == LADDER[chosen.rank - 1] and chosen.peak <= budget


def test_what_fits_nothing_is_refused_with_the_least_that_is_needed():
    ladder = [RULES["backprop-fused"](), Baffle(directions=1)]
    least = min(
        PLANNER.step(rule, 8, micro).peak
        for rule in (Backprop(), ladder[0], Baffle(directions=1, chunk=256))
        for micro in (0, 1)
    )
    with pytest.raises(OverBudget, match=rf"^needs {least:,} B, has {least - 1:,} B \(at aten\.[\w.]+\)$"):
        fit(PLANNER, Backprop(), 8, least - 1, ladder=ladder)
    assert fit(PLANNER, Backprop(), 8, least, ladder=ladder).peak == least


@pytest.mark.parametrize("rule", [name for name in RULES if name != "backprop-approx"])
@pytest.mark.parametrize("batch", [1, 16])
def test_evaluation_stays_below_training(rule, batch):
    rule = RULES[rule]()
    planner = PLANNER if takes(rule, NET) else Planner(network("mlp"))
    chosen = fit(planner, rule, batch, None)
    assert planner.inference(rule, chosen.evaluation_batch).peak <= chosen.peak == chosen.plan.peak
    assert planner.inference(rule, 2 * chosen.evaluation_batch).peak > chosen.peak


def test_an_anchor_is_part_of_what_must_fit():
    rule = MonoForward()
    free = PLANNER.step(rule, 4).peak
    assert fit(PLANNER, rule, 4, free).micro_batch == 0
    with pytest.raises(OverBudget):
        fit(PLANNER, rule, 4, free // 2, anchored=True)
