"""Local training: the same place gives the same bits, budgets are kept, audits find liars, failures say where."""

import math
from dataclasses import dataclass, replace
from itertools import chain
from typing import ClassVar

import pytest
import torch
from cases import CLASSES, RULES, SHAPE, equal, mostly, network
from fedforward.algorithms import (
    DFA,
    LADDER,
    Backprop,
    Baffle,
    Batch,
    ForwardForward,
    MonoForward,
    Network,
    Rule,
    RuleError,
    ScalarRule,
    State,
    Stats,
)
from fedforward.algorithms.models import mlp
from fedforward.algorithms.seeds import Place
from fedforward.client import fitting
from fedforward.client.audit import AuditFailed
from fedforward.client.fitting import OverBudget
from fedforward.client.trainer import Assignment, Trainer, TrainingFailed


class Data:
    """Random samples that remember the order in which they were visited."""

    def __init__(self, size, seed=0):
        g = torch.Generator().manual_seed(seed)
        self.x, self.y = torch.rand(size, *SHAPE, generator=g), torch.randint(CLASSES, (size,), generator=g)
        self.visited = []

    def __len__(self):
        return len(self.y)

    def batch(self, rows):
        self.visited.append(rows.tolist())
        return self.x[rows], self.y[rows]


ASSIGNED = Assignment(round=1, lr=0.1, epochs=2, batch_size=4)
TEST = Data(20, seed=1)


def fit(rule, train=None, *, net="mlp", seed=0, client=0, trainer=None, **changes):
    trainer = trainer or Trainer(rule, network(net), seed)
    train = Data(10) if train is None else train
    return trainer.fit(trainer.initial_params(), train, TEST, client, replace(ASSIGNED, **changes))


@pytest.mark.parametrize("rule", mostly(RULES))
def test_the_same_place_gives_the_same_bits_and_the_same_costs(rule):
    rule = RULES[rule]
    first, second = fit(rule, lr=rule.lr), fit(rule, lr=rule.lr)
    assert equal(first.params, second.params)
    assert first[2:] == second[2:]
    if first.scalars is not None:
        assert torch.equal(first.scalars, second.scalars)


@pytest.mark.parametrize("rule", ["mono-forward", "backprop-adam", "dfa", "baffle"])
def test_a_trainer_keeps_nothing_of_a_client_and_metering_changes_no_bit(rule):
    rule = RULES[rule]
    trainer = Trainer(rule, network("mlp"), 0)
    first = fit(rule, trainer=trainer, lr=rule.lr)  # its first steps are metered
    fit(rule, Data(10, seed=5), trainer=trainer, lr=rule.lr, client=3)
    second = fit(rule, trainer=trainer, lr=rule.lr)  # none is
    assert equal(first.params, second.params) and first[2:] == second[2:]


def test_every_epoch_visits_every_sample_once_in_an_order_of_its_place():
    orders = {}
    for place in ((0, 0, 1), (0, 1, 1), (0, 0, 2), (1, 0, 1)):
        seed, client, rnd = place
        data = Data(10)
        fit(Backprop(), data, seed=seed, client=client, round=rnd)
        assert [len(rows) for rows in data.visited] == [4, 4, 2, 4, 4, 2]
        epochs = [list(chain(*data.visited[half])) for half in (slice(3), slice(3, 6))]
        assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
        orders[place] = epochs
    assert len({str(epoch) for pair in orders.values() for epoch in pair}) == 8


def test_a_round_is_its_steps_one_after_the_other():
    rule, net, data = RULES["forward-forward"], network("mlp"), Data(10)
    report = fit(rule, data, seed=7, client=3, lr=0.02)
    state, losses = rule.init(net, 7), 0.0
    for step, rows in enumerate(list(data.visited)):
        x, y = data.batch(torch.tensor(rows))
        draws = rule.draw(Place(7, 1, 3, step), len(y), CLASSES)
        losses += float(rule.step(net, state, Batch(x, y, torch.ones(len(y)), draws), 0.02).loss)
    assert equal(report.params, state.params)
    assert report.loss == pytest.approx(losses / 20)
    assert (report.samples, report.steps, report.batch) == (10, 6, 4)
    assert fit(rule, Data(3), batch_size=100).batch == 3


def test_a_round_costs_what_its_batches_are_planned_to_cost():
    trainer = Trainer(Backprop(), network("mlp"), 0)
    report = fit(Backprop(), trainer=trainer)
    full, rest = (trainer.planner.step(Backprop(), size) for size in (4, 2))
    assert full.flops == 2 * rest.flops > 0  # flops grow with the batch
    assert report.fit.peak == full.peak > rest.peak
    assert report.flops == 4 * full.flops + 2 * rest.flops


def test_accuracy_is_measured_before_and_after_or_not_at_all():
    trainer = Trainer(MonoForward(), network("mlp"), 0)
    report = fit(MonoForward(), trainer=trainer)
    assert report.accuracy_before == trainer.evaluate(trainer.initial_params(), TEST).accuracy
    assert report.accuracy_after == trainer.evaluate(report.params, TEST).accuracy
    silent = fit(MonoForward(), trainer=trainer, evaluate=False)
    assert math.isnan(silent.accuracy_before) and math.isnan(silent.accuracy_after)
    assert equal(silent.params, report.params)


def test_evaluation_is_the_mean_over_the_samples_whatever_the_batch():
    trainer = Trainer(DFA(), network("mlp"), 0)
    params = trainer.initial_params()
    scores = trainer.net.forward(params, TEST.x)
    loss = -scores.log_softmax(1)[torch.arange(20), TEST.y].mean()
    for size in (1000, 20, 7, 1):
        evaluation = trainer.evaluate(params, TEST, size)
        assert evaluation.loss == pytest.approx(float(loss), rel=1e-5)
        assert evaluation.accuracy == int((scores.argmax(1) == TEST.y).sum()) / 20
        assert evaluation.samples == 20


def test_no_data_is_no_measurement_and_no_training():
    trainer = Trainer(Backprop(), network("mlp"), 0)
    empty = trainer.evaluate(trainer.initial_params(), Data(0))
    assert math.isnan(empty.loss) and math.isnan(empty.accuracy) and empty.samples == 0
    with pytest.raises(TrainingFailed, match="no samples to train on"):
        fit(Backprop(), Data(0), trainer=trainer)


def test_a_loss_that_is_not_finite_fails_and_names_the_step():
    with pytest.raises(TrainingFailed, match=r"loss is not finite at step 2 \(lr 1e\+30\): lower --lr"):
        fit(Backprop(), lr=1e30)
    broken = Data(10)
    broken.x[:] = math.inf
    for rule in (Backprop(), Baffle(directions=2)):
        with pytest.raises(TrainingFailed, match="at step 1"):
            fit(rule, broken)


def test_parameters_that_are_not_finite_fail_when_no_later_loss_tells():
    with pytest.raises(TrainingFailed, match="parameters are not finite after 1 steps"):
        fit(Backprop(), lr=math.inf, epochs=1, batch_size=10)


@pytest.mark.parametrize("scheme", ["forward", "central"])
def test_a_scalar_rule_answers_with_k_numbers_a_step_from_which_its_model_follows(scheme):
    rule = Baffle(directions=3, scheme=scheme)
    trainer = Trainer(rule, network("mlp"), 0)
    report = fit(rule, trainer=trainer, lr=0.01)
    assert isinstance(rule, ScalarRule) and report.scalars.shape == (6 * 3,) and report.scalars.dtype == torch.float32
    replica = trainer.initial_params()
    for step, scalars in enumerate(report.scalars.view(6, 3)):
        rule.apply(State(replica, {}, {}), rule.draw(Place(0, 1, -1, step), 0, 0), scalars, 0.01)
    for key, p in replica.items():  # the client's own copy was perturbed and put back: the same but for rounding
        torch.testing.assert_close(report.params[key], p, rtol=0, atol=1e-6)
    assert fit(MonoForward()).scalars is None


@dataclass(frozen=True)
class Drift(Rule):
    """Every parameter falls by lr each step: proximal pulls then have a closed form."""

    name: ClassVar[str] = "drift"

    def init(self, net, seed):
        return State(net.init(seed), {}, {})

    def step(self, net, state, batch, lr):
        for p in state.params.values():
            p.sub_(lr)
        return Stats(torch.zeros(()), torch.zeros(()), batch.weight.sum())

    def logits(self, net, state, x):
        return net.forward(state.params, x)


@pytest.mark.parametrize("mu", [0.0, 2.0, 10.0, 100.0])
def test_proximal_mu_pulls_towards_the_received_model(mu):
    # d ← (1 − lr μ) d + lr, from d = 0, six times: lr (1 − q⁶) / (1 − q); a pull of lr μ ≥ 1 stops at the anchor.
    report, anchor = fit(Drift(), proximal_mu=mu), Trainer(Drift(), network("mlp"), 0).initial_params()
    q = 1 - min(0.1 * mu, 1.0)
    wanted = 0.1 * sum(q**i for i in range(6))
    for key, p in report.params.items():
        torch.testing.assert_close(anchor[key] - p, torch.full_like(p, wanted), rtol=0, atol=1e-5)


def test_the_anchor_is_memory_too():
    trainer = Trainer(Backprop(), network("mlp"), 0)
    size = sum(p.nbytes for p in trainer.initial_params().values())
    free, pulled = fit(Backprop(), trainer=trainer), fit(Backprop(), trainer=trainer, proximal_mu=0.1)
    assert pulled.fit.peak == free.fit.peak + size
    assert pulled.fit.plan.parts["state"] == free.fit.plan.parts["state"] + size


def test_optimizer_memory_starts_anew_and_constants_are_shared():
    trainer = Trainer(DFA(momentum=0.9), network("mlp"), 0)
    a, b = (trainer.state(trainer.rule, trainer.initial_params()) for _ in range(2))
    assert a.fixed is b.fixed
    assert all(not slot.any() and slot.data_ptr() != b.slots[key].data_ptr() for key, slot in a.slots.items())
    before = {key: f.clone() for key, f in a.fixed.items()}
    fit(DFA(momentum=0.9), trainer=trainer)
    assert equal(trainer.state(trainer.rule, {}).fixed, before)
    assert not any(slot.any() for slot in trainer.state(trainer.rule, {}).slots.values())


def test_a_rule_that_cannot_train_the_network_is_refused_at_once():
    with pytest.raises(RuleError, match="needs two hidden blocks"):
        Trainer(ForwardForward(), Network(lambda: mlp(SHAPE, CLASSES, hidden=(8,)), SHAPE, CLASSES), 0)


# ---- budgets and audits ---------------------------------------------------------------------------------------------


def audited(rule, **options):
    return Trainer(rule, network("mlp"), 0, audit=1.0, **options)


PLAINER = pytest.param({"batch_size": 3, "evaluate": False}, marks=pytest.mark.slow)


@pytest.mark.parametrize("rule", mostly(RULES))
@pytest.mark.parametrize("changes", [{"proximal_mu": 0.1}, PLAINER])
def test_an_audit_finds_what_was_planned_and_changes_no_bit(rule, changes):
    rule = RULES[rule]
    plain, watched = (fit(rule, trainer=Trainer(rule, network("mlp"), 0, audit=p), **changes) for p in (0.0, 1.0))
    assert equal(plain.params, watched.params) and plain.fit == watched.fit


@pytest.mark.parametrize("rule", mostly(name for name, rule in RULES.items() if not rule.unsplittable))
def test_a_batch_in_parts_is_audited_too_and_learns_the_same(rule):
    rule = RULES[rule]
    # What divides by little makes much of rounding: differences of losses by σ, Adam by the size of a gradient.
    if hasattr(rule, "sigma") and isinstance(rule, ScalarRule):
        rule = replace(rule, sigma=0.1)
    if getattr(rule, "optimizer", None) == "adam":
        rule = replace(rule, optimizer="sgd")
    whole, parts = fit(rule), fit(rule, trainer=audited(rule, micro_batch=3))
    assert parts.fit.micro_batch == 3
    for key, p in whole.params.items():
        torch.testing.assert_close(parts.params[key], p, rtol=0, atol=1e-5)
    assert parts.loss == pytest.approx(whole.loss, abs=1e-5)
    # The feedback network of counter-current, 64-24-16-10 mirrored, runs on 10 classes once a part, forward and back:
    # in 2 epochs batches of 4, 4 and 2 are 4 parts more than batches.
    more = 4 * 2 * 2 * 10 * (64 * 24 + 24 * 16 + 16 * 10) if rule.name == "counter-current" else 0
    assert parts.flops == whole.flops + more


def test_a_budget_is_kept_or_refused_before_anything_runs():
    net = network("mlp")
    peak = Trainer(Backprop(), net, 0).planner.step(Backprop(), 4).peak
    params = Trainer(Backprop(), net, 0).initial_params()
    before = {key: p.clone() for key, p in params.items()}
    least = Trainer(Backprop(), net, 0).planner.step(Backprop(), 4).peak - 1
    with pytest.raises(OverBudget, match=r"needs [\d,]+ B, has [\d,]+ B"):
        audited(Backprop()).fit(params, Data(10), TEST, 0, ASSIGNED, budget=least // 2)
    assert equal(params, before)
    report = audited(Backprop()).fit(params, Data(10), TEST, 0, ASSIGNED, budget=peak)
    assert report.fit.peak == peak


def test_another_rule_of_the_ladder_learns_at_its_own_rate_as_far_as_the_schedule_has_come():
    own, net = Backprop(lr=0.2), network("lenet")
    other = DFA(lr=0.05, momentum=0.0)
    trainer = Trainer(own, net, 0, ladder=[other], audit=1.0)
    peaks = [min(trainer.planner.step(rule, 4, micro).peak for micro in (0, 1)) for rule in (own, other)]
    assert peaks[0] != peaks[1]
    trainer.planner.step(own, 4)
    alone = Trainer(other, net, 0)
    todo = replace(ASSIGNED, lr=0.1)  # half of the experiment's
    half = alone.fit(alone.initial_params(), Data(10), TEST, 0, replace(ASSIGNED, lr=0.025))
    chosen = replace(fit_of(trainer, other), rank=LADDER.index("dfa") + 1)
    trainer.fit_to = lambda *_: chosen
    report = trainer.fit(trainer.initial_params(), Data(10), TEST, 0, todo)
    assert equal(report.params, half.params)


def fit_of(trainer, rule):
    return fitting.fit(trainer.planner, rule, 4)


class Liar(Drift):
    """Takes more memory for data that it has seen than for data that it has not."""

    def step(self, net, state, batch, lr):
        batch.x.new_zeros(1 + 1000 * int(batch.x.sum() > 0)).add_(1)
        return super().step(net, state, batch, lr)


def test_a_rule_that_takes_more_than_it_planned_is_caught_if_it_is_audited():
    assert fit(Liar(), trainer=Trainer(Liar(), network("mlp"), 0)).steps == 6
    with pytest.raises(AuditFailed, match=r"^planned [\d,]+ B \(at .*\) and used [\d,]+ B \(at aten\.\w+"):
        fit(Liar(), trainer=audited(Liar()))


def test_a_rule_that_exceeds_the_budget_is_stopped_there():
    trainer = audited(Liar())
    planned = trainer.fit_to(10, ASSIGNED, None).peak
    with pytest.raises(
        AuditFailed, match=rf"planned {planned:,} B and used [\d,]+ B .* over its budget of {planned + 10:,} B"
    ):
        trainer.fit(trainer.initial_params(), Data(10), TEST, 0, ASSIGNED, budget=planned + 10)


def test_audits_are_a_sample_that_the_seed_and_the_place_decide():
    trainer = Trainer(Backprop(), network("mlp"), 5, audit=0.2)
    drawn = [(t, c) for t in range(50) for c in range(40) if trainer.audited(t, c)]
    assert 330 < len(drawn) < 470
    again = Trainer(Backprop(), network("mlp"), 5, audit=0.2)
    assert drawn == [(t, c) for t in range(50) for c in range(40) if again.audited(t, c)]
    assert not Trainer(Backprop(), network("mlp"), 5).audited(1, 1)


@pytest.mark.parametrize(
    "steps, taken", [(1, [4]), (3, [4, 4, 2]), (4, [4, 4, 2, 4]), (5, [4, 4, 2, 4, 4]), (99, [4, 4, 2] * 2)]
)
def test_a_limit_of_steps_ends_a_round_in_the_middle_of_an_epoch(steps, taken):
    rule, data, trainer = RULES["backprop"], Data(10), Trainer(RULES["backprop"], network("mlp"), 0)
    report = fit(rule, data, trainer=trainer, steps=steps, evaluate=False)
    assert [len(rows) for rows in data.visited] == taken and report.steps == len(taken)
    assert report.flops == sum(trainer.planner.step(rule, size).flops for size in taken)
    whole = Data(10)
    fit(rule, whole, evaluate=False)
    assert data.visited == whole.visited[: len(taken)]  # the same samples as without a limit


def test_a_replica_is_where_the_trainer_is():
    rule = DFA(noise=0.1)
    trainer = Trainer(rule, network("mlp"), 0).to("meta")
    place = Place(0, 1, 2, 3)
    state, b = trainer.replica_of(rule, trainer.initial_params(), TEST, torch.arange(3), place)
    tensors = [t for part in state for t in part.values()] + [b.x, b.y, b.weight, b.draws]
    assert {t.device.type for t in tensors} == {"meta"} and len(b.y) == len(b.draws) == 3
