"""Local epochs of one rule over one client's data, and what they cost.

The trainer keeps one network structure and the rule's seeded constants, and nothing of any client: a client is its
data, a round, and the parameters that came with the message.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..algorithms.network import Network
from ..algorithms.projection import basis, encode
from ..algorithms.replica import Replica
from ..algorithms.rule import Batch, Rule, RuleError, State, Stats, Tensors
from ..algorithms.scalar_rule import ScalarRule
from ..algorithms.seeds import Place, Purpose, generator
from .audit import Audit
from .fitting import Fit, OverBudget, evaluation_batch, fit
from .memory import PeakMemory
from .plan import Planner
from .step import accumulators, batch_of, load_parts, score, take_step


class LocalData(Protocol):
    """A client's samples, whoever holds them."""

    def __len__(self) -> int: ...

    def batch(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return inputs (B, *shape) float32 and labels (B,) int64 of the given rows, in storage of their own."""


class TrainingFailed(RuntimeError):
    """A client cannot finish its round; the message is recorded with it."""


@dataclass(frozen=True)
class Assignment:
    """What the server asks of a client in one round."""

    round: int
    lr: float
    epochs: int
    batch_size: int
    steps: int = 0  # local steps of all epochs, at most; 0: all
    evaluate: bool = True  # measure accuracy on held-out data before and after training
    proximal_mu: float = 0.0  # FedProx, as a split step: w ← w − η μ (w − w_received), then the rule's own step
    projection: int = 0  # numbers to answer with, see `algorithms.projection`; 0: the model itself, or a rule's scalars

    @property
    def anchored(self) -> bool:
        """A copy of the received model is kept."""
        return bool(self.proximal_mu or self.projection)


class Evaluation(NamedTuple):
    """Mean cross-entropy and accuracy over n samples (NaN for n = 0)."""

    loss: float
    accuracy: float
    samples: int


class Report(NamedTuple):
    """What a client measured in one round of training."""

    params: Tensors
    scalars: Tensor | None  # (n,) float32: of each step, for rules that exchange scalars, or of what was learned
    samples: int
    steps: int
    batch: int  # largest batch
    loss: float  # mean of the rule's own objective over the samples visited
    accuracy: float  # part of the samples visited that was classified rightly, each before its own update
    accuracy_before: float
    accuracy_after: float
    fit: Fit  # how the step was made to fit; its peak is the planned one
    flops: int
    round: int


class Trainer:
    """Trains and evaluates any client with one rule and one network.

    Args:
        rule: the learning rule.
        net: the network's structure.
        seed: the run seed.
        micro_batch: samples in a part of a batch, at most; 0 splits a batch only where memory demands it.
        ladder: rules for clients that cannot afford `rule`, the best first; of the same parameters.
        audit: part of the client rounds whose memory is measured and compared with the plan.

    Raises:
        RuleError: if the rule cannot train the network.
    """

    def __init__(
        self,
        rule: Rule,
        net: Network,
        seed: int,
        *,
        micro_batch: int = 0,
        ladder: Sequence[Rule] = (),
        audit: float = 0.0,
    ) -> None:
        rule.check(net)
        if micro_batch and rule.unsplittable:
            raise RuleError(f"{rule.name or type(rule).__name__} cannot split a batch: {rule.unsplittable}")
        self.rule, self.net, self.seed = rule, net, seed
        self.micro_batch, self.ladder, self.audit = micro_batch, tuple(ladder), audit
        self.planner = Planner(net)
        self.device = "cpu"
        self._fits: dict[tuple, Fit | OverBudget] = {}
        self._flops: dict[tuple, int] = {}
        self._initial: dict[type[Rule], State] = {}

    def to(self, device: str) -> Trainer:
        """Train and evaluate on this device from now on; parameters come from the CPU and go back to it."""
        self.device = device
        self._initial.clear()
        return self

    def initial(self, rule: Rule) -> State:
        """Return the state that every replica of a rule starts from: this object's own, not to be changed."""
        if type(rule) not in self._initial:
            initial = rule.init(self.net, self.seed)
            self._initial[type(rule)] = State(initial.params, self._here(initial.fixed), self._here(initial.slots))
        return self._initial[type(rule)]

    def _here(self, tensors: Tensors) -> Tensors:
        """Return tensors on the device that trains; on the CPU, themselves."""
        return tensors if self.device == "cpu" else {key: t.to(self.device) for key, t in tensors.items()}

    def _batch(self, data: LocalData, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return some of a client's samples on the device that trains."""
        x, y = data.batch(rows)
        return (x, y) if self.device == "cpu" else (x.to(self.device), y.to(self.device))

    def state(self, rule: Rule, params: Tensors, *, split: bool = False) -> State:
        """Return a replica's state around `params`, which it owns from now on; optimizer memory starts at zero."""
        initial = self.initial(rule)
        slots = {key: slot.clone() for key, slot in initial.slots.items()}
        return State(params, initial.fixed, slots, accumulators(rule, params) if split else {})

    def replica_of(
        self, rule: Rule, params: Tensors, data: LocalData, rows: Tensor, place: Place
    ) -> tuple[State, Batch]:
        """Return a replica of a model, and a batch of some rows of data with the rule's draws, where this trains."""
        draws = rule.draw(place, len(rows), self.net.classes)
        draws = draws.to(self.device) if isinstance(draws, Tensor) else draws
        state = self.state(rule, {key: p.clone() for key, p in self._here(params).items()})
        return state, batch_of(partial(self._batch, data), rows, draws)

    def initial_params(self) -> Tensors:
        """Return a copy of the parameters that every replica starts from."""
        return {key: p.clone() for key, p in self.initial(self.rule).params.items()}

    def replica(self) -> Replica:
        """Return a replica of the initial model, to be brought on by a server's news.

        Raises:
            RuleError: if the rule does not exchange scalars.
        """
        if not isinstance(self.rule, ScalarRule):
            raise RuleError(f"{self.rule.name} exchanges weights: it cannot follow a server by scalars")
        return Replica(self.rule, self.seed, self.initial_params())

    def fit_to(self, samples: int, todo: Assignment, budget: int | None) -> Fit:
        """Return how a client of `samples` samples trains within `budget` bytes (None: as asked).

        Raises:
            OverBudget: if nothing fits.
        """
        batch = min(todo.batch_size, samples)
        key = batch, budget, todo.anchored, todo.projection
        if key not in self._fits:
            options = {"micro_batch": self.micro_batch, "anchored": todo.anchored, "projection": todo.projection}
            try:
                self._fits[key] = fit(self.planner, self.rule, batch, budget, ladder=self.ladder, **options)
            except OverBudget as refusal:
                self._fits[key] = refusal
        if isinstance(self._fits[key], OverBudget):
            raise OverBudget(*self._fits[key].args)
        return self._fits[key]

    def audited(self, server_round: int, client: int) -> bool:
        """Return whether a client round is audited, a function of the run seed and its place."""
        if self.audit in (0, 1):
            return bool(self.audit)
        return generator(self.seed, Purpose.AUDIT, server_round, client).random() < self.audit

    def fit(
        self,
        params: Tensors,
        train: LocalData,
        test: LocalData,
        client: int,
        todo: Assignment,
        budget: int | None = None,
    ) -> Report:
        """Train `params` in place on `train` as assigned, within `budget` bytes.

        Raises:
            OverBudget: before anything has run, if nothing fits the budget.
            TrainingFailed: if there are no samples, or the loss, the parameters or the scalars stop being finite.
            AuditFailed: if the round was audited and its memory is not the planned one.
        """
        if not len(train):
            raise TrainingFailed("the client has no samples to train on")
        chosen, blank = self.fit_to(len(train), todo, budget), float("nan")
        received, params = params, self._here(params)
        audit = Audit(chosen, budget) if self.audited(todo.round, client) else None
        lr = todo.lr * (chosen.rule.lr / self.rule.lr)  # of another rule, its own as far as the schedule has come

        def accuracy() -> float:
            return self._evaluate(chosen, params, test, audit) if todo.evaluate else blank

        before = accuracy()
        anchor = {key: p.clone() for key, p in params.items()} if todo.anchored else {}
        seen, scalars = self._train(chosen, params, anchor, train, client, todo, lr, audit)
        answer = torch.cat(scalars) if self.rule.exchange == "scalars" else None
        if todo.projection:
            answer = self._encoded(chosen, params, anchor, todo, audit)
        del anchor
        loss, correct, weight = (math.fsum(column) for column in zip(*seen, strict=True))
        if not all(map(_is_finite, params.values())):
            raise TrainingFailed(f"parameters are not finite after {len(seen)} steps (lr {lr:g}): lower --lr")
        after = accuracy()
        if audit:
            audit.close()
        if params is not received:
            for key, p in params.items():
                received[key].copy_(p)
        return Report(
            params=received,
            scalars=answer,
            samples=len(train),
            steps=len(seen),
            batch=chosen.batch,
            loss=loss / weight,
            accuracy=correct / weight,
            accuracy_before=before,
            accuracy_after=after,
            fit=chosen,
            flops=self.flops(len(train), todo, budget),
            round=todo.round,
        )

    def _train(self, chosen, params, anchor, train, client, todo, lr, audit) -> tuple[list[Stats], list[Tensor | None]]:
        """Take all steps of a round, in place on `params`; return the stats as numbers, and the answers, of each."""
        rule, seen, scalars = chosen.rule, [], []
        state = self.state(rule, params, split=bool(chosen.micro_batch))
        load, plainly = partial(self._batch, train), not (audit or state.gradients or rule.exchange == "scalars")
        with torch.no_grad():
            for step, rows in enumerate(self.orders(len(train), client, todo)):
                for key, origin in anchor.items() if todo.proximal_mu else ():
                    params[key].lerp_(origin, min(lr * todo.proximal_mu, 1.0))
                draws = rule.draw(Place(self.seed, todo.round, client, step), len(rows), self.net.classes)
                draws = draws.to(self.device) if isinstance(draws, Tensor) else draws
                if plainly:
                    stats, answer = rule.step(self.net, state, batch_of(load, rows, draws), lr), None
                else:
                    parts = load_parts(load, rows, draws, chosen.micro_batch)
                    del draws
                    with audit.step(state, anchor) if audit else nullcontext() as meter:
                        stats, answer = take_step(rule, self.net, state, parts, lr, meter)
                    stats = Stats(*map(float, stats))  # an audit finds after a step what it found before
                seen.append(stats)
                scalars.append(answer)
        seen = [Stats(*map(float, stats)) for stats in seen]
        for step, (stats, answer) in enumerate(zip(seen, scalars, strict=True)):
            if not math.isfinite(stats.loss) or (answer is not None and not answer.isfinite().all()):
                raise TrainingFailed(f"loss is not finite at step {step + 1} (lr {lr:g}): lower --lr")
        return seen, scalars

    def _encoded(self, chosen: Fit, params: Tensors, anchor: Tensors, todo: Assignment, audit: Audit | None) -> Tensor:
        """Return what was learned since `anchor`, as so many numbers as are asked for."""
        state = State(params, self.initial(chosen.rule).fixed, {})
        with audit.watch(state, chosen.peak, anchor) if audit else nullcontext() as meter, meter or nullcontext():
            return encode(params, anchor, basis(self.seed, todo.round), todo.projection)

    def flops(self, samples: int, todo: Assignment, budget: int | None) -> int:
        """Return the floating-point operations of a client's round: of its full batches and of the last, smaller one.

        Raises:
            OverBudget: if nothing fits.
        """
        key = samples, todo.batch_size, todo.epochs, todo.steps, todo.anchored, todo.projection, budget
        if key not in self._flops:
            chosen = self.fit_to(samples, todo, budget)
            sizes = [chosen.batch] * (samples // chosen.batch) + [samples % chosen.batch] * bool(samples % chosen.batch)
            plans = {
                size: self.planner.step(chosen.rule, size, chosen.micro_batch, anchored=todo.anchored)
                for size in set(sizes)
            }
            epoch, steps = [plans[size].flops for size in sizes], todo.epochs * len(sizes)
            epochs, more = divmod(min(todo.steps or steps, steps), len(sizes))
            self._flops[key] = epochs * sum(epoch) + sum(epoch[:more])
        return self._flops[key]

    def _evaluate(self, chosen: Fit, params: Tensors, test: LocalData, audit: Audit | None) -> float:
        """Return the accuracy on `test`, in batches that need no more memory than training does."""
        state = State(params, self.initial(chosen.rule).fixed, {})
        with audit.watch(state, chosen.peak) if audit else nullcontext() as meter:
            return self._score(chosen.rule, state, test, chosen.evaluation_batch, meter).accuracy

    def evaluation_batch(self, budget: int) -> int:
        """Return how many samples a device of `budget` bytes evaluates at a time.

        Raises:
            OverBudget: if a single one is too many.
        """
        size = evaluation_batch(self.planner, self.rule, budget)
        plan = self.planner.inference(self.rule, size)
        if plan.peak > budget:
            raise OverBudget(f"inference needs {plan.peak:,} B, has {budget:,} B (at {plan.op})")
        return size

    def evaluate(self, params: Tensors, data: LocalData, batch_size: int = 1000) -> Evaluation:
        """Return mean cross-entropy and accuracy of the rule's inference on `data`."""
        return self._score(self.rule, State(self._here(params), self.initial(self.rule).fixed, {}), data, batch_size)

    def _score(
        self, rule: Rule, state: State, data: LocalData, batch_size: int, meter: PeakMemory | None = None
    ) -> Evaluation:
        loss = correct = 0.0
        for rows in torch.arange(len(data)).split(batch_size) if len(data) else ():
            batch_loss, batch_correct = score(rule, self.net, state, *self._batch(data, rows), meter)
            loss += float(batch_loss)
            correct += float(batch_correct)
        count = len(data)
        return Evaluation(loss / count, correct / count, count) if count else Evaluation(math.nan, math.nan, 0)

    def orders(self, samples: int, client: int, todo: Assignment) -> Iterator[Tensor]:
        """Yield the rows of each batch of all epochs, each epoch in an order that is a function of its place."""

        def all_epochs() -> Iterator[Tensor]:
            for epoch in range(todo.epochs):
                order = generator(self.seed, Purpose.ORDER, todo.round, client, epoch).permutation(samples)
                yield from torch.from_numpy(order).split(todo.batch_size)

        return islice(all_epochs(), todo.steps or None)


def _is_finite(p: Tensor) -> bool:
    """Return whether all values are finite; the sum says so at a fraction of the cost, unless it overflows."""
    return math.isfinite(p.sum()) or bool(p.isfinite().all())
