"""What a run is made of: a plan of its rounds, a strategy, a first model, records, and whoever watches."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from flwr.app import ArrayRecord
from flwr.serverapp.strategy import Strategy

from .records import Records
from .rows import Row

Complete = Callable[[int, Row], Row]  # round, row of a client -> the row with what else is known of it
Evaluate = Callable[[ArrayRecord], tuple[float, float]]  # -> loss, accuracy on the server's test set
Diagnose = Callable[[int, ArrayRecord], list[Row]]  # round -> rows of the table of diagnoses, without the round


class Observer(Protocol):
    """Whoever wants to watch a run. All times are wall-clock."""

    def round_started(self, server_round: int, clients: int) -> None:
        """Clients have been sampled and are about to train."""

    def round_done(self, row: Mapping[str, Any], clients: list[Row]) -> None:
        """A round is on disk; `row` is its row in the database."""


@dataclass(frozen=True)
class Plan:
    """What the loop needs to know of an experiment."""

    rule: str
    seed: int
    rounds: int
    clients: int
    epochs: int
    batch_size: int
    lr: float
    steps: int = 0  # local steps a round, at most; 0: those of all epochs
    lr_schedule: str = "constant"
    evaluate_every: int = 1
    diagnose_every: int = 0  # 0: never
    timeout: float | None = None  # seconds to wait for a round's replies; None waits for all

    def learning_rate(self, server_round: int) -> float:
        """Return the clients' learning rate in a round, 1 … rounds."""
        passed = (server_round - 1) / max(self.rounds, 1)
        return self.lr * SCHEDULES[self.lr_schedule](passed)

    def evaluates(self, server_round: int) -> bool:
        """Return whether models are evaluated in this round; the last one always is."""
        return server_round == self.rounds or server_round % self.evaluate_every == 0

    def diagnoses(self, server_round: int) -> bool:
        """Return whether the model after this round (0: the first) is diagnosed; the last one is, if any."""
        every = self.diagnose_every
        return every > 0 and (server_round == self.rounds or server_round % every == 0)


# Learning rate relative to the first, as a function of the part of the run that has passed (0 up to, never at, 1).
SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda passed: 1.0,
    "cosine": lambda passed: 0.5 * (1 + math.cos(math.pi * passed)),
    "linear": lambda passed: 1 - passed,
    "half-linear": lambda passed: min(1.0, 2 * (1 - passed)),  # constant to the middle, then down
}


@dataclass
class Job:
    """A run to be done on some grid.

    Attributes:
        plan: rounds, clients, seed and what clients are asked to do.
        strategy: any Flower strategy.
        initial: the model before the first round.
        evaluate: returns (loss, accuracy) of a model on the server's test set.
        records: where rounds are committed; whatever they hold already is not done again.
        observer: whoever wants to watch.
        complete: adds to a client's row what a simulation knows of it beyond its answer, such as its device.
        diagnose: returns what is found of each block of a model, if the plan asks for it.
    """

    plan: Plan
    strategy: Strategy
    initial: ArrayRecord
    evaluate: Evaluate
    records: Records
    observer: Observer | None = None
    complete: Complete = lambda server_round, row: row
    diagnose: Diagnose = lambda server_round, arrays: []
