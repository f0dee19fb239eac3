"""A cohort is its clients: each learns, reports and fails as it would alone, whoever stands beside it.

Tolerances. A batched product sums in another order than a single one, which moves a float32 by a few units in the last
place (6e-8 of 1), and a few steps add that up: 1e-5 is far above that and far below a step. A scalar rule divides the
difference of two losses near 2.3, each rounded by 1e-7 or so, by σ = 1e-3: its scalars are good to 1e-3.
"""

import math
from dataclasses import dataclass, replace
from functools import cache
from typing import ClassVar

import pytest
import torch
from cases import ALIKE, CLASSES, SHAPE, assert_close, equal, network, takes
from fedforward import algorithms
from fedforward.algorithms import (
    DFA,
    Backprop,
    Baffle,
    ForwardForward,
    FusedBackprop,
    MonoForward,
    RuleError,
    ScalarRule,
)
from fedforward.client import fitting
from fedforward.client.audit import AuditFailed
from fedforward.client.cohort import Cohort, Member, clients_within, evaluate_many
from fedforward.client.fitting import OverBudget
from fedforward.client.memory import PeakMemory
from fedforward.client.trainer import Assignment, Report, Trainer, TrainingFailed

RULES = {name: rule(lr=min(rule.lr, 0.05)) for name, rule in algorithms.RULES.items() if name != "baffle"} | {
    "baffle": Baffle(lr=0.01, directions=3)
}
OPTIONS = {
    "momentum": Backprop(momentum=0.9, weight_decay=0.01),
    "side by side": FusedBackprop(momentum=0.9, weight_decay=0.01),
    "adam": MonoForward(lr=0.01, optimizer="adam", weight_decay=0.01),
    "one-pass": ForwardForward(inference="one-pass"),
    "central": Baffle(lr=0.01, directions=3, scheme="central"),
}
ASSIGNED = Assignment(round=3, lr=0.05, epochs=2, batch_size=4)


class Data:
    def __init__(self, size, seed):
        g = torch.Generator().manual_seed(seed)
        self.x, self.y = torch.rand(size, *SHAPE, generator=g), torch.randint(CLASSES, (size,), generator=g)

    def __len__(self):
        return len(self.y)

    def batch(self, rows):
        return self.x[rows], self.y[rows]


def member(partition, train, test=3, budget=None):
    return Member(partition, Data(train, partition), Data(test, 100 + partition), budget)


def ragged():
    """Return clients of which none ends with another; the last batches are shorter, and one has a single sample."""
    return [member(5, 10, test=3), member(0, 1, test=0), member(9, 6, test=5), member(2, 14, test=1)]


@pytest.fixture(autouse=True)
def evaluation_in_parts(monkeypatch):
    """Evaluate two samples at a time: in several batches, and without the search for the best size, which is slow."""
    monkeypatch.setattr(fitting, "evaluation_batch", lambda *_: 2)


@cache
def trainer_of(rule, net="mlp", **options):
    return Trainer(rule, network(net), 0, **options)


def alone(trainer, one, todo=ASSIGNED):
    try:
        return trainer.fit(trainer.initial_params(), one.train, one.test, one.partition, todo, one.budget)
    except (TrainingFailed, OverBudget, AuditFailed) as failure:
        return failure


def assert_as_alone(trainer, members, todo=ASSIGNED, at_once=10):
    """Assert that every outcome of a cohort is that of the client alone, and return the outcomes."""
    outcomes = Cohort(trainer, at_once).fit(trainer.initial_params(), members, todo)
    numbers = 5e-3 if isinstance(trainer.rule, ScalarRule) else 1e-5
    weights = 2e-4 if isinstance(trainer.rule, ScalarRule) else 1e-5
    for got, one in zip(outcomes, members, strict=True):
        wanted = alone(trainer, one, todo)
        assert (type(got) is type(wanted) and str(got) == str(wanted)) or isinstance(wanted, Report)
        if isinstance(wanted, Report):
            assert_close(got.params, wanted.params, atol=weights)
            assert (got.scalars is None) == (wanted.scalars is None)
            if wanted.scalars is not None:
                torch.testing.assert_close(got.scalars, wanted.scalars, rtol=0, atol=numbers)
            exact = [(r.samples, r.steps, r.batch, r.accuracy, r.fit, r.flops) for r in (got, wanted)]
            assert exact[0] == exact[1]
            assert [got.accuracy_before, got.accuracy_after] == pytest.approx(wanted[7:9], abs=0, nan_ok=True)
            assert got.loss == pytest.approx(wanted.loss, abs=10 * weights)
    return outcomes


ON_MAPS = {"backprop", "mono-forward", "forward-forward", "dfa", "sign-symmetry", "pepita", "baffle"}  # others: slow
LONG = ALIKE | {"projection"}
RAGGED = [
    pytest.param(
        name,
        net,
        marks=[pytest.mark.slow] * (name in ALIKE | {"projection"} or (net == "lenet" and name not in ON_MAPS)),
    )
    for name, rule in RULES.items()
    for net in ("mlp", "lenet")
    if takes(rule, network(net))
]


@pytest.mark.parametrize("rule, net", RAGGED)
def test_ragged_clients_learn_and_report_what_they_would_alone(rule, net):
    rule = RULES[rule]
    assert rule.vmappable
    outcomes = assert_as_alone(trainer_of(rule, net), ragged(), replace(ASSIGNED, lr=rule.lr))
    homes = {next(iter(report.params.values())).untyped_storage().data_ptr() for report in outcomes}
    together = not (isinstance(rule, ScalarRule) and rule.own)  # of directions of their own a client's are for it alone
    assert len(homes) == (1 if together else len(outcomes))


@pytest.mark.parametrize("option", OPTIONS)
def test_optimizers_and_options_too(option):
    rule = OPTIONS[option]
    assert_as_alone(trainer_of(rule), ragged(), replace(ASSIGNED, lr=rule.lr))


@pytest.mark.parametrize("mu", [2.0, 100.0])  # of the second, every step begins at the received model
def test_fedprox_pulls_every_client_to_what_it_received(mu):
    assert_as_alone(trainer_of(FusedBackprop(momentum=0.9)), ragged(), replace(ASSIGNED, proximal_mu=mu))


def test_the_received_model_stays_and_no_accuracy_is_measured_unless_asked_for():
    trainer = trainer_of(DFA())
    received = trainer.initial_params()
    outcomes = Cohort(trainer, 10).fit(received, ragged(), replace(ASSIGNED, evaluate=False, lr=0.05))
    assert equal(received, trainer.initial_params())
    assert all(math.isnan(report.accuracy_before) and math.isnan(report.accuracy_after) for report in outcomes)


PARTS = [("mono-forward", 1), ("mono-forward", 3), ("forward-forward", 2), ("baffle", 2)]


@pytest.mark.parametrize("rule, at_once", PARTS)
def test_a_cohort_in_parts_is_the_cohort(rule, at_once):
    assert_as_alone(trainer_of(RULES[rule]), ragged(), replace(ASSIGNED, lr=RULES[rule].lr), at_once)


# ---- failures are one's own ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["backprop", "mono-forward", "baffle"])
def test_a_client_that_diverges_leaves_its_neighbours_alone(rule):
    members = ragged()
    members[0].train.x[:] = math.inf  # at once
    members[3].train.x[5] = 1e30  # after that sample
    outcomes = assert_as_alone(trainer_of(RULES[rule]), members, replace(ASSIGNED, lr=RULES[rule].lr))
    assert "loss is not finite at step 1 " in str(outcomes[0]) and isinstance(outcomes[3], TrainingFailed)
    assert all(isinstance(outcomes[i], Report) for i in (1, 2))


def test_parameters_that_are_not_finite_fail_too():
    outcomes = assert_as_alone(
        trainer_of(Backprop()), ragged(), replace(ASSIGNED, lr=math.inf, epochs=1, batch_size=20)
    )
    assert all("parameters are not finite after 1 steps" in str(failure) for failure in outcomes)


def test_clients_without_samples_or_memory_fail_and_the_others_train():
    trainer = trainer_of(Backprop(lr=0.05))
    outcomes = assert_as_alone(trainer, [member(1, 0), member(2, 9), member(3, 9, budget=100), member(4, 5)])
    assert [type(outcome) for outcome in outcomes] == [TrainingFailed, Report, OverBudget, Report]


# ---- what cannot be batched together ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Asking(Backprop):
    """Asks for a value, as vmap forbids, and says so."""

    vmappable: ClassVar[bool] = False

    def step(self, net, state, batch, lr):
        return super().step(net, state, batch, lr if float(batch.x.sum()) > 0 else 0.0)


@dataclass(frozen=True)
class Hiding(Asking):
    """Does not say so."""

    name: ClassVar[str] = "hiding"
    vmappable: ClassVar[bool] = True


@dataclass(frozen=True)
class Naming(Backprop):
    """Draws what no tensor can hold, and is different for every client."""

    def draw(self, place, batch_size, classes):
        return {"client": place.client}

    def step(self, net, state, batch, lr):
        return super().step(net, state, batch, lr / (1 + batch.draws["client"]))


@pytest.mark.parametrize("rule", [Asking(), Naming()])
def test_a_rule_that_cannot_be_batched_trains_one_client_after_the_other(rule):
    trainer = trainer_of(rule)
    for got, one in zip(assert_as_alone(trainer, ragged()), ragged(), strict=True):
        assert equal(got.params, alone(trainer, one).params)


def test_a_rule_that_claims_too_much_is_told_what_to_say():
    trainer = trainer_of(Hiding())
    with pytest.raises(RuleError, match=r"hiding cannot be batched: say `vmappable = False` in its class \(vmap: "):
        Cohort(trainer, 10).fit(trainer.initial_params(), ragged(), ASSIGNED)


def test_audited_rounds_are_trained_alone_under_the_meter():
    trainer = trainer_of(Backprop(lr=0.05), audit=0.5)
    watched = [trainer.audited(ASSIGNED.round, one.partition) for one in ragged()]
    outcomes = assert_as_alone(trainer, ragged())
    stacked = [next(iter(report.params.values()))._base is not None for report in outcomes]
    assert stacked == [not audited for audited in watched] and 1 < sum(stacked) < 4


def test_clients_of_other_memory_train_with_those_alike():
    rule, other = Backprop(lr=0.05, momentum=0.9), FusedBackprop(lr=0.05)
    trainer = trainer_of(rule, "lenet", ladder=(other,))
    whole, single, least = (trainer.planner.step(*way).peak for way in ((rule, 4), (rule, 4, 1), (other, 4, 1)))
    assert least < single < whole
    budgets = [None, single, least, whole, least]
    members = [member(i, 7 + i, budget=budget) for i, budget in enumerate(budgets)]
    outcomes = assert_as_alone(trainer, members)
    assert [report.fit.rank for report in outcomes] == [0, 0, 2, 0, 2]
    assert [bool(report.fit.micro_batch) for report in outcomes] == [False, True, True, False, True]
    homes = [next(iter(report.params.values())).untyped_storage().data_ptr() for report in outcomes]
    assert homes[0] == homes[1] == homes[3] != homes[2] == homes[4]


# ---- evaluation and memory -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["mono-forward", "forward-forward", "backprop-selective"])
def test_many_evaluations_of_one_model_are_each_its_own(rule):
    trainer = trainer_of(RULES[rule])
    params, datas = trainer.initial_params(), [Data(size, size) for size in (7, 0, 1, 1203, 0, 40)]
    for got, data in zip(evaluate_many(trainer, params, datas), datas, strict=True):
        wanted = trainer.evaluate(params, data)
        assert got == pytest.approx(wanted, rel=1e-5, nan_ok=True)
        assert type(got) is type(wanted) and got.samples == len(data)
    assert evaluate_many(trainer, params, []) == []


@pytest.mark.parametrize("rule, net", [("backprop-fused", "mlp"), ("mono-forward", "mlp"), ("backprop", "lenet")])
def test_as_many_clients_as_fit_do_fit(rule, net):
    trainer, members = trainer_of(RULES[rule], net), [member(i, 8) for i in range(12)]
    chosen, samples = trainer.fit_to(8, ASSIGNED, None), 8 + 3
    size = next(n for n in range(10**4, 10**7, 1000) if clients_within(trainer, chosen, n, samples) == 12)
    assert clients_within(trainer, chosen, 1) == 1 and clients_within(trainer, chosen, 3 * size, samples) >= 36
    received = trainer.initial_params()
    meter = PeakMemory()
    with meter:
        Cohort(trainer, 12).fit(received, members, ASSIGNED)
    elsewhere = sum(t.nbytes for one in members for data in (one.train, one.test) for t in (data.x, data.y))
    assert meter.peak - elsewhere - sum(p.nbytes for p in received.values()) <= size


def test_a_cohort_of_nobody_is_empty():
    assert Cohort(trainer_of(Backprop()), 10).fit({}, [], ASSIGNED) == []
