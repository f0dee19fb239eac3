"""A client round under the meter: what was planned must be what is used, to the byte."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ..algorithms.rule import State, Tensors
from .fitting import Fit
from .memory import MemoryBudgetExceeded, PeakMemory
from .step import residents


class AuditFailed(RuntimeError):
    """A client round used other memory than was planned for it; the message says which and how much."""


class Audit:
    """Watches a round: its steps' peak must be the planned one, and evaluation must stay below it.

    Args:
        chosen: what was planned.
        budget: bytes that may be used; None for any number.
    """

    def __init__(self, chosen: Fit, budget: int | None) -> None:
        self.chosen, self.budget = chosen, budget
        self.peak, self.op = 0, "start"

    @contextmanager
    def watch(self, state: State, limit: int | None, anchor: Tensors | None = None) -> Iterator[PeakMemory]:
        """Give a meter that refuses more than `limit` bytes."""
        try:
            yield PeakMemory(residents(state, anchor or {}), budget=limit)
        except MemoryBudgetExceeded as error:
            over = self.budget is not None and error.needed > self.budget
            budget = f", over its budget of {self.budget:,} B" if over else ""
            planned = f"planned {self.chosen.peak:,} B"
            raise AuditFailed(f"{planned} and used {error.needed:,} B (at {error.op}){budget}") from error

    @contextmanager
    def step(self, state: State, anchor: Tensors) -> Iterator[PeakMemory]:
        """Give a meter for one step and note its peak."""
        with self.watch(state, self.budget, anchor) as meter:
            yield meter
        if meter.peak > self.peak:
            self.peak, self.op = meter.peak, meter.op

    def close(self) -> None:
        """Raise AuditFailed unless the round's peak was the planned one."""
        planned = self.chosen.plan
        if self.peak != planned.peak:
            raise AuditFailed(f"planned {planned.peak:,} B (at {planned.op}) and used {self.peak:,} B (at {self.op})")
