"""Local epochs of one rule over one client's data, and what they cost.

The trainer keeps one network structure and the rule's seeded constants, and nothing of any client: a client is its
data, a round, and the parameters that came with the message.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..algorithms.network import Network
from ..algorithms.rule import Batch, Rule, ScalarRule, State, Tensors
from ..algorithms.seeds import Place, Purpose, generator
from .memory import PeakMemory


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
    evaluate: bool = True  # measure accuracy on held-out data before and after training
    proximal_mu: float = 0.0  # FedProx, as a split step: w ← w − η μ (w − w_received), then the rule's own step


class StepCost(NamedTuple):
    """Cost of one training step at one batch size: a function of shapes alone."""

    peak: int  # bytes
    base: int  # bytes: parameters, state and batch
    flops: int


class Evaluation(NamedTuple):
    """Mean cross-entropy and accuracy over n samples (NaN for n = 0)."""

    loss: float
    accuracy: float
    samples: int


class Report(NamedTuple):
    """What a client measured in one round of training."""

    params: Tensors
    scalars: Tensor | None  # (steps · K,) float32, for rules that exchange scalars
    samples: int
    steps: int
    batch: int  # largest batch
    loss: float  # mean of the rule's own objective over the samples visited
    accuracy: float  # part of the samples visited that was classified rightly, each before its own update
    accuracy_before: float
    accuracy_after: float
    peak_bytes: int
    base_bytes: int
    flops: int


class Trainer:
    """Trains and evaluates any client with one rule and one network.

    Args:
        rule: the learning rule.
        net: the network's structure.
        seed: the run seed.

    Raises:
        RuleError: if the rule cannot train the network.
    """

    def __init__(self, rule: Rule, net: Network, seed: int) -> None:
        rule.check(net)
        self.rule, self.net, self.seed = rule, net, seed
        self._initial = rule.init(net, seed)
        self._costs: dict[tuple[int, bool], StepCost] = {}  # of a batch size, with or without an anchor

    def state(self, params: Tensors) -> State:
        """Return a replica's state around `params`, which it owns from now on; optimizer memory starts at zero."""
        return State(params, self._initial.fixed, {key: slot.clone() for key, slot in self._initial.slots.items()})

    def initial_params(self) -> Tensors:
        """Return a copy of the parameters that every replica starts from."""
        return {key: p.clone() for key, p in self._initial.params.items()}

    def fit(self, params: Tensors, train: LocalData, test: LocalData, client: int, todo: Assignment) -> Report:
        """Train `params` in place on `train` as assigned.

        Raises:
            TrainingFailed: if there are no samples, or the loss, the parameters or the scalars stop being finite.
        """
        if not len(train):
            raise TrainingFailed("the client has no samples to train on")
        state, blank = self.state(params), float("nan")
        anchor = {key: p.clone() for key, p in params.items()} if todo.proximal_mu else {}
        before = self.evaluate(params, test).accuracy if todo.evaluate else blank
        losses, correct, weights, scalars, costs = [], [], [], [], []
        for step, batch in enumerate(self._batches(train, client, todo)):
            for key, origin in anchor.items():
                state.params[key].lerp_(origin, min(todo.lr * todo.proximal_mu, 1.0))
            kind = len(batch.y), bool(anchor)
            if kind not in self._costs:
                stats, answer, self._costs[kind] = self._metered_step(state, anchor, batch, todo.lr)
            else:
                stats, answer = self._step(state, batch, todo.lr)
            loss = float(stats.loss)
            if not math.isfinite(loss) or (answer is not None and not answer.isfinite().all()):
                raise TrainingFailed(f"loss is not finite at step {step + 1} (lr {todo.lr:g}): lower --lr")
            losses.append(loss)
            correct.append(float(stats.correct))
            weights.append(float(stats.weight))
            scalars.append(answer)
            costs.append(self._costs[kind])
        if not all(bool(p.isfinite().all()) for p in params.values()):
            raise TrainingFailed(f"parameters are not finite after {len(losses)} steps (lr {todo.lr:g}): lower --lr")
        return Report(
            params=params,
            scalars=torch.cat(scalars) if isinstance(self.rule, ScalarRule) else None,
            samples=len(train),
            steps=len(losses),
            batch=min(todo.batch_size, len(train)),
            loss=sum(losses) / sum(weights),
            accuracy=sum(correct) / sum(weights),
            accuracy_before=before,
            accuracy_after=self.evaluate(params, test).accuracy if todo.evaluate else blank,
            peak_bytes=max(cost.peak for cost in costs),
            base_bytes=max(cost.base for cost in costs),
            flops=sum(cost.flops for cost in costs),
        )

    @torch.no_grad()
    def evaluate(self, params: Tensors, data: LocalData, batch_size: int = 1000) -> Evaluation:
        """Return mean cross-entropy and accuracy of the rule's inference on `data`."""
        loss = correct = 0.0
        for rows in torch.arange(len(data)).split(batch_size):
            if len(rows) == 0:
                continue
            x, y = data.batch(rows)
            logits = self.rule.logits(self.net, State(params, self._initial.fixed, {}), x)
            loss += float(torch.nn.functional.cross_entropy(logits, y, reduction="sum"))
            correct += float((logits.argmax(1) == y).sum())
        count = len(data)
        return Evaluation(loss / count, correct / count, count) if count else Evaluation(math.nan, math.nan, 0)

    def _batches(self, train: LocalData, client: int, todo: Assignment):
        """Yield the batches of all epochs, each epoch in an order that is a function of its place."""
        step = 0
        for epoch in range(todo.epochs):
            order = generator(self.seed, Purpose.ORDER, todo.round, client, epoch).permutation(len(train))
            for rows in torch.from_numpy(order).split(todo.batch_size):
                x, y = train.batch(rows)
                draws = self.rule.draw(Place(self.seed, todo.round, client, step), len(y), self.net.classes)
                yield Batch(x, y, torch.ones(len(y)), draws)
                step += 1

    def _step(self, state: State, batch: Batch, lr: float):
        """Take one step; the answer is what a scalar rule would send for it, else None."""
        if isinstance(self.rule, ScalarRule):
            answer, stats = self.rule.probe(self.net, state, batch)
            self.rule.apply(state.params, batch.draws, answer, lr)
            return stats, answer
        with torch.no_grad():
            return self.rule.step(self.net, state, batch, lr), None

    def _metered_step(self, state: State, anchor: Tensors, batch: Batch, lr: float):
        """Take one step under the meter: the same arithmetic, and its cost beside it."""
        resident = (*state.params.values(), *state.fixed.values(), *state.slots.values(), *anchor.values())
        draws = [batch.draws] if isinstance(batch.draws, Tensor) else []
        with PeakMemory((*resident, batch.x, batch.y, batch.weight, *draws)) as meter:
            stats, answer = self._step(state, batch, lr)
        return stats, answer, StepCost(meter.peak, meter.base, meter.flops)
