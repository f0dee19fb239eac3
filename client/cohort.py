"""Many clients at once: what `Trainer.fit` does for one, as one batched program.

Clients that train alike hold their models in stacked tensors, a row a client, and every step is the rule's own under
`torch.func.vmap`. Batches are padded with samples of weight 0. Clients are sorted by their number of steps, so that
those still training are the first rows: a step sees views of these and changes them in place, and a client that has
finished is not touched. Nothing is read back from the device before all steps are on their way.

A client's report is that of `Trainer.fit`, but for the order in which floating-point sums are taken.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.func import vmap
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from ..algorithms.directions import Directions
from ..algorithms.network import Network
from ..algorithms.projection import basis, encode
from ..algorithms.rule import Batch, Rule, RuleError, State, Stats, Tensors
from ..algorithms.scalar_rule import ScalarRule
from ..algorithms.seeds import Place
from .audit import AuditFailed
from .fitting import Fit, OverBudget
from .step import take_step
from .trainer import Assignment, Evaluation, LocalData, Report, Trainer, TrainingFailed

EVALUATED_AT_ONCE = 1000  # samples of one model
ROOM = (
    1.5  # memory of a client's step among others, of that alone: vmap copies maps to bring clients' channels together
)


class Member(NamedTuple):
    """A client of a cohort, with its bytes for tensors (None: without limits)."""

    partition: int
    train: LocalData
    test: LocalData
    budget: int | None = None


class Cohort:
    """Trains clients side by side with one rule and one network, where the parameters are.

    Args:
        trainer: says how each client trains, and trains those that cannot be batched: of a rule that is not
            `vmappable` or draws what cannot be stacked, of an audited round, or without another that trains alike.
        clients_at_once: rows of the stacked tensors, at most.
    """

    def __init__(self, trainer: Trainer, clients_at_once: int) -> None:
        self.trainer, self.clients_at_once = trainer, clients_at_once

    def fit(self, params: Tensors, clients: Sequence[Member], todo: Assignment) -> list[Report | Exception]:
        """Train every client from `params`, which stay as they are; return what it measured, or why it failed.

        The parameters of clients who trained together are views of the same stacked tensors.

        Raises:
            RuleError: if the rule claims to be vmappable and is not.
        """
        outcomes: dict[int, Report | Exception] = {}
        for seats in self._together(clients, todo):
            if len(seats) > 1:
                found = _Batched(self.trainer, params, seats, todo).fit()
            else:
                found = [self._alone(params, seats[0].member, todo)]
            outcomes.update(zip((seat.place for seat in seats), found, strict=True))
        return [outcomes[place] for place in range(len(clients))]

    def _together(self, clients: Sequence[Member], todo: Assignment) -> list[list[_Seat]]:
        """Return who trains together, who takes most steps first; a client that trains alone, or cannot, is by itself.

        A batch need not be taken in parts here, and clients whose parts differ train alike.
        """
        alike: dict[str, list[_Seat]] = {}
        together: list[list[_Seat]] = []
        for place, member in enumerate(clients):
            chosen = self._batched(member, todo)
            if chosen:
                alike.setdefault(repr(chosen.rule), []).append(_Seat(place, member, chosen))
            else:
                together.append([_Seat(place, member, chosen)])
        for seats in alike.values():
            seats.sort(key=lambda seat: math.ceil(len(seat.member.train) / todo.batch_size), reverse=True)
            size = self.clients_at_once if _stackable(seats[0].fit.rule, self.trainer.net) else 1
            together += [seats[start : start + size] for start in range(0, len(seats), size)]
        return together

    def _batched(self, member: Member, todo: Assignment) -> Fit | None:
        """Return how a client trains beside others; None if it trains alone, or not at all: `Trainer.fit` says why."""
        trainer, samples = self.trainer, len(member.train)
        if not samples or trainer.audited(todo.round, member.partition):
            return None
        try:
            chosen = trainer.fit_to(samples, todo, member.budget)
        except OverBudget:
            return None
        return chosen if chosen.rule.vmappable else None

    def _alone(self, params: Tensors, member: Member, todo: Assignment) -> Report | Exception:
        own = {key: p.clone() for key, p in params.items()}
        try:
            return self.trainer.fit(own, member.train, member.test, member.partition, todo, member.budget)
        except (TrainingFailed, OverBudget, AuditFailed) as failure:
            return failure


def clients_within(trainer: Trainer, fit: Fit, size: int, samples: int = 0) -> int:
    """Return how many clients that train as `fit` says train at once in `size` bytes; at least one.

    Args:
        trainer: knows what a step needs.
        fit: how each of them trains; its batch is not split here.
        size: bytes free on the device.
        samples: of a client, to train on and held out: a cohort holds them all.
    """
    step = max(fit.peak, trainer.planner.step(fit.rule, fit.batch).peak)
    made = sum(p.nbytes for p in trainer.initial(fit.rule).params.values())  # of a gradient that is alone not made
    return max(1, int(size / (ROOM * step + made + samples * (4 * math.prod(trainer.net.shape) + 8))))


def evaluate_many(trainer: Trainer, params: Tensors, datas: Sequence[LocalData]) -> list[Evaluation]:
    """Return what `Trainer.evaluate` says of one model on each of `datas`, run together."""
    device = _device(params)
    state = State(params, _moved(trainer.initial(trainer.rule).fixed, device), {})
    return _evaluate(trainer.rule, trainer.net, state, _Samples(datas, device))


class _Seat(NamedTuple):
    """A client in a call: where its outcome belongs, and how it trains beside others, if it does."""

    place: int
    member: Member
    fit: Fit | None


class _Samples:
    """The samples of many clients in one tensor, one client after the other."""

    def __init__(self, datas: Sequence[LocalData], device: torch.device) -> None:
        self.sizes = [len(data) for data in datas]
        self.starts, self.count = [0, *accumulate(self.sizes)][: len(datas)], sum(self.sizes)
        if self.count:
            loaded = zip(*(data.batch(torch.arange(len(data))) for data in datas if len(data)), strict=True)
            self.x, self.y = (torch.cat(part).to(device, non_blocking=True) for part in loaded)

    def take(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return inputs (clients, B, *shape) and labels (clients, B) of rows (clients, B)."""
        flat = rows.flatten()
        return self.x.index_select(0, flat).view(*rows.shape, *self.x.shape[1:]), self.y[flat].view(rows.shape)


class _Batched:
    """One round of clients that train alike, who takes most steps first."""

    def __init__(self, trainer: Trainer, params: Tensors, seats: Sequence[_Seat], todo: Assignment) -> None:
        self.trainer, self.net, self.received, self.seats, self.todo = trainer, trainer.net, params, seats, todo
        self.rule, self.device = seats[0].fit.rule, _device(params)
        self.lr = todo.lr * (self.rule.lr / trainer.rule.lr)
        initial = trainer.initial(self.rule)
        self.fixed = _moved(initial.fixed, self.device)
        self.params = _copies(params, len(seats))
        self.slots = _copies(_moved(initial.slots, self.device), len(seats))
        orders = (trainer.orders(len(member.train), member.partition, todo) for _, member, _ in seats)
        self.visits = [[rows.numpy() for rows in order] for order in orders]  # of each client in each of its steps

    def fit(self) -> list[Report | Exception]:
        """Train and evaluate all; return a report or a failure for each."""
        tests = _Samples([seat.member.test for seat in self.seats if self.todo.evaluate], self.device)
        unknown = [math.nan] * len(self.seats)
        received = _evaluate(self.rule, self.net, State(self.received, self.fixed, {}), tests)
        before = [evaluation.accuracy for evaluation in received] or unknown
        seen, answers = self._train()
        after = self._accuracies(tests) if tests.count else unknown
        finite = seen[..., 0].isfinite() if answers is None else seen[..., 0].isfinite() & answers.isfinite().all(2)
        finite, seen = finite.tolist(), seen.tolist()  # here the device is waited for
        sums = torch.stack([p.flatten(1).sum(1) for p in self.params.values()], 1).tolist()
        return [
            self._failure(c, finite[c], sums[c]) or self._report(c, answers, seen[c], before[c], after[c])
            for c in range(len(self.seats))
        ]

    def _train(self) -> tuple[Tensor, Tensor | None]:
        """Take all steps; return stats (clients, steps, 3) and, of a scalar rule, answers (clients, steps, K).

        Of a step that a client does not take they are 0.
        """
        samples = _Samples([seat.member.train for seat in self.seats], self.device)
        indices, weights = self._padded(samples.starts)
        seen, answers = weights.new_zeros(len(self.seats), len(weights), 3), None
        pull = min(self.lr * self.todo.proximal_mu, 1.0) if self.todo.proximal_mu else 0.0
        for step, (index, weight) in enumerate(zip(indices, weights, strict=True)):
            sizes = [len(visits[step]) for visits in self.visits if step < len(visits)]
            active, width = len(sizes), max(sizes)
            params, slots = ({key: t[:active] for key, t in part.items()} for part in (self.params, self.slots))
            for key, origin in self.received.items() if pull else ():
                params[key].lerp_(origin, pull)
            batch = Batch(*samples.take(index[:active, :width]), weight[:active, :width], self._draws(step, sizes))
            stats, *answer = self._step(params, slots, batch)
            seen[:active, step] = stats
            for numbers in answer:
                if answers is None:
                    answers = numbers.new_zeros(*seen.shape[:2], *numbers.shape[1:])
                answers[:active, step] = numbers
        return seen, answers

    def _step(self, params: Tensors, slots: Tensors, batch: Batch) -> tuple[Tensor, ...]:
        """Take one step of all who still train, in place; return stats (clients, 3) and any answers (clients, K)."""
        if self.rule.stackable(self.net):
            batch = batch._replace(x=batch.x.flatten(2))
            with torch.no_grad():
                return (torch.stack(self.rule.step(self.net, State(params, self.fixed, slots), batch, self.lr), 1),)

        def step(draws: Any, x: Tensor, y: Tensor, weight: Tensor, *own: Tensor) -> tuple[Tensor, ...]:
            state = State(
                dict(zip(params, own, strict=False)), self.fixed, dict(zip(slots, own[len(params) :], strict=True))
            )
            batch = Batch(x, y, weight, draws)
            if not isinstance(self.rule, ScalarRule):
                return (torch.stack(self.rule.step(self.net, state, batch, self.lr)),)
            stats, answer = take_step(self.rule, self.net, state, [batch], self.lr)
            return torch.stack(stats), answer

        stacked = [*batch[:3], *params.values(), *slots.values()]  # vmap takes its time over dictionaries
        axes = (None if self._shared(batch.draws) else 0, *[0] * len(stacked))
        try:
            with torch.no_grad():
                return vmap(step, in_dims=axes)(batch.draws, *stacked)
        except RuntimeError as error:
            if "vmap" not in str(error):
                raise
            name = self.rule.name or type(self.rule).__name__
            raise RuleError(f"{name} cannot be batched: say `vmappable = False` in its class ({error})") from error

    def _padded(self, starts: list[int]) -> tuple[Tensor, Tensor]:
        """Return which samples are visited and what they weigh, each (steps, clients, B).

        A batch is padded with its client's own first sample: another's could be infinite, and 0 · ∞ is no number.
        """
        shape = len(self.visits[0]), len(self.visits), max(len(visits[0]) for visits in self.visits)
        index, weight = np.empty(shape, np.int64), np.zeros(shape, np.float32)
        index[:] = np.array(starts)[:, None]
        for c, visits in enumerate(self.visits):
            for step, rows in enumerate(visits):
                index[step, c, : len(rows)] += rows
                weight[step, c, : len(rows)] = 1
        return tuple(torch.from_numpy(table).to(self.device, non_blocking=True) for table in (index, weight))

    def _draws(self, step: int, sizes: list[int]) -> Any:
        """Return what the rule draws for a step whose batches have these sizes: shared, or stacked and padded."""
        rule, classes = self.rule, self.net.classes
        places = (Place(self.trainer.seed, self.todo.round, seat.member.partition, step) for seat in self.seats)
        draws = (rule.draw(place, size, classes) for place, size in zip(places, sizes, strict=False))
        first = next(draws)
        if not isinstance(first, Tensor):
            return first
        stacked = first if self._shared(first) else pad_sequence([first, *draws], batch_first=True)
        return stacked.to(self.device, non_blocking=True)

    def _shared(self, draws: Any) -> bool:
        """Return whether draws are the same for all clients of a step."""
        return isinstance(self.rule, ScalarRule) or not isinstance(draws, Tensor)

    def _accuracies(self, tests: _Samples) -> list[float]:
        """Return the accuracy of each client's own model, in batches that need no more memory than training does."""
        run = vmap(lambda params, x: self.rule.logits(self.net, State(params, self.fixed, {}), x))
        size = min(seat.fit.evaluation_batch for seat in self.seats)
        starts, sizes = (torch.tensor(n, device=self.device)[:, None] for n in (tests.starts, tests.sizes))
        right = torch.zeros_like(sizes[:, 0])
        for start in range(0, max(tests.sizes), size):
            active = 1 + max(c for c, own in enumerate(tests.sizes) if own > start)
            places = torch.arange(start, min(start + size, max(tests.sizes)), device=self.device)
            x, y = tests.take((starts[:active] + places).clamp_max(tests.count - 1))
            hits = run({key: p[:active] for key, p in self.params.items()}, x).argmax(2) == y
            right[:active] += (hits & (places < sizes[:active])).sum(1)
        return [hits / own if own else math.nan for hits, own in zip(right.tolist(), tests.sizes, strict=True)]

    def _failure(self, c: int, finite: list[bool], sums: list[float]) -> TrainingFailed | None:
        """Return why a client failed, if it did, in the words of `Trainer.fit`.

        Args:
            c: the client.
            finite: whether its loss was, step by step.
            sums: of its parameters: finite if these are, unless they overflow.
        """
        if not all(finite):
            return TrainingFailed(f"loss is not finite at step {finite.index(False) + 1} (lr {self.lr:g}): lower --lr")
        if not all(map(math.isfinite, sums)) and not all(bool(p[c].isfinite().all()) for p in self.params.values()):
            steps = len(self.visits[c])
            return TrainingFailed(f"parameters are not finite after {steps} steps (lr {self.lr:g}): lower --lr")
        return None

    def _report(self, c: int, answers: Tensor | None, seen: list[Stats], before: float, after: float) -> Report:
        (_, member, chosen), steps = self.seats[c], len(self.visits[c])
        params, scalars = {key: p[c] for key, p in self.params.items()}, None
        if self.trainer.rule.exchange == "scalars":
            scalars = answers[c, :steps].flatten()
        if self.todo.projection:
            scalars = encode(params, self.received, basis(self.trainer.seed, self.todo.round), self.todo.projection)
        loss, correct, weight = (math.fsum(column) for column in zip(*seen, strict=True))
        return Report(
            params=params,
            scalars=scalars,
            samples=len(member.train),
            steps=steps,
            batch=chosen.batch,
            loss=loss / weight,
            accuracy=correct / weight,
            accuracy_before=before,
            accuracy_after=after,
            fit=chosen,
            flops=self.trainer.flops(len(member.train), self.todo, member.budget),
            round=self.todo.round,
        )


def _evaluate(rule: Rule, net: Network, state: State, samples: _Samples) -> list[Evaluation]:
    """Return the loss and accuracy of one model on each client's samples; sums are taken here, always in order."""
    found = []
    with torch.no_grad():
        for start in range(0, samples.count, EVALUATED_AT_ONCE):
            x, y = (part[start : start + EVALUATED_AT_ONCE] for part in (samples.x, samples.y))
            logits = rule.logits(net, state, x)
            found.append(torch.stack([cross_entropy(logits, y, reduction="none"), logits.argmax(1) == y]))
    sums = torch.zeros(len(samples.sizes), 2, dtype=torch.float64)
    if found:
        owners = torch.arange(len(samples.sizes)).repeat_interleave(torch.tensor(samples.sizes))
        sums.index_add_(0, owners, torch.cat(found, 1).T.double().cpu())
    return [
        Evaluation(loss / own, right / own, own) if own else Evaluation(math.nan, math.nan, 0)
        for (loss, right), own in zip(sums.tolist(), samples.sizes, strict=True)
    ]


def _stackable(rule: Rule, net: Network) -> bool:
    """Return whether what the clients draw for a step is the same for all, or tensors of one row a sample."""
    draws = rule.draw(Place(0, 0, 0, 0), 1, net.classes)
    if isinstance(rule, ScalarRule):
        return not rule.own
    return draws is None or isinstance(draws, Tensor | Directions)


def _device(params: Tensors) -> torch.device:
    return next(iter(params.values())).device


def _moved(tensors: Tensors, device: torch.device) -> Tensors:
    return {key: t.to(device, non_blocking=True) for key, t in tensors.items()}


def _copies(tensors: Tensors, count: int) -> Tensors:
    """Return each tensor `count` times, stacked."""
    return {key: t.new_empty(count, *t.shape).copy_(t) for key, t in tensors.items()}
