"""What a benchmark is asked to do, and how anything is timed: in turns, so that a busy machine is busy for all."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from .bare import WARM_UP

Row = dict[str, Any]


class Timing(NamedTuple):
    """One run: its steady pace, and the seconds that it took beyond its rounds at that pace (imports apart)."""

    rounds_per_s: float
    start_s: float


@dataclass(frozen=True)
class Settings:
    """How much is measured, and where.

    Attributes:
        repeats: runs of each runner; medians are told.
        rounds: timed in each run, after `warm_up` that are not.
        device: cpu or cuda:NUMBER.
        tell: says what is under way.
    """

    repeats: int = 5
    rounds: int = 20
    device: str = "cpu"
    warm_up: int = WARM_UP
    tell: Callable[[str], None] = lambda line: None


def timing(total: float, steady: float, settings: Settings) -> Timing:
    """Return the timing of a run that took `total` seconds, of which the timed rounds took `steady`."""
    rounds = settings.warm_up + settings.rounds
    return Timing(settings.rounds / steady, max(0.0, total - steady * rounds / settings.rounds))


def in_turns(runners: Mapping[str, Callable[[], Any]], settings: Settings, what: str = "") -> dict[str, list[Any]]:
    """Run every runner, then all of them again, `repeats` times; return what each came to, by runner."""
    found: dict[str, list[Any]] = {name: [] for name in runners}
    for turn in range(settings.repeats):
        for name, run in runners.items():
            settings.tell(f"{what} {name}, {turn + 1} of {settings.repeats}")
            found[name].append(run())
    return found


def ratio(above: list[float], below: list[float]) -> float:
    """Return the median of the ratios of numbers that were measured in the same turns."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))
