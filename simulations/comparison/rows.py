"""What a comparison came to: one row a rule, from the runs of its seeds.

Every number is measured and read from the run databases. A mean is over seeds, ± their standard deviation (n − 1).
FLOPs and bytes are those of training; FLOPs are a client's, the mean over all clients that exist.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pandas as pd

from ...server.records import Run
from ..experiment import Experiment
from ..formats import is_missing
from ..summary import numbers, summarise
from .settings import written

REFERENCE = "backprop"  # whose peak memory the others' is told in
AIMS = {"accuracy": 1, "peak_bytes": -1, "bytes_up_total": -1}  # of the front: 1 is to be large, −1 to be small

Row = dict[str, Any]  # None where nothing was measured


@dataclass(frozen=True)
class Measured:
    """A finished cell.

    Attributes:
        seed: of its run.
        numbers: `summarise` of its run.
        curve: by round, `flops` of a client so far and `accuracy` where it was evaluated.
        lr: the learning rate it began with.
    """

    seed: int
    numbers: Mapping[str, Any]
    curve: pd.DataFrame
    lr: float | None


@dataclass
class Outcome:
    """What became of a rule: its finished cells, and why the others are not."""

    rule: str
    own: Mapping[str, Any] = field(default_factory=dict)  # settings of its own
    cells: list[Measured] = field(default_factory=list)
    failures: dict[int, str] = field(default_factory=dict)  # by seed


@dataclass(frozen=True)
class Comparison:
    """A comparison as its table, picture and page show it.

    Attributes:
        folder: that holds its runs, named as the comparison is.
        common: the experiment that all rules share.
        seeds: that every rule was to run with.
        outcomes: what became of each rule.
        rows: one a rule, see `rows_of`.
        equal_flops: of a client, see `rows_of`.
        command: that ran it.
    """

    folder: Path
    common: Experiment
    seeds: Sequence[int]
    outcomes: Sequence[Outcome]
    rows: Sequence[Row]
    equal_flops: float | None
    command: str


def measured(run: Run) -> Measured:
    """Return what a comparison needs of a run."""
    experiment = tomllib.loads(run.info["experiment"])
    curve = pd.DataFrame(
        {
            "flops": numbers(run.rounds, "flops").fillna(0).cumsum() / experiment["clients"],
            "accuracy": numbers(run.rounds, "accuracy"),
        }
    ).set_index(run.rounds["round"])
    return Measured(experiment.get("seed", 0), summarise(run), curve, experiment.get("lr"))


def rows_of(outcomes: Iterable[Outcome]) -> tuple[list[Row], float | None]:
    """Return one row a rule, and the FLOPs a client of `accuracy_at_equal_flops`: the least that any rule took."""
    outcomes = list(outcomes)
    curves = {each.rule: mean_curve([cell.curve for cell in each.cells]) for each in outcomes if each.cells}
    totals = [total for flops, _ in curves.values() if (total := flops.iloc[-1]) > 0]
    budget = float(min(totals)) if totals else None
    rows = [_row(each, *curves.get(each.rule, (None, None)), budget) for each in outcomes]
    reference = next((row["peak_bytes"] for row in rows if row["rule"] == REFERENCE), None)
    front = on_front(rows)
    for row in rows:
        row["peak_to_backprop"] = row["peak_bytes"] / reference if row["peak_bytes"] and reference else None
        row["front"] = row["rule"] in front
    return rows, budget


def mean_curve(curves: Sequence[pd.DataFrame]) -> tuple[pd.Series, pd.DataFrame]:
    """Return FLOPs of a client so far, the mean over seeds, and the seeds' accuracies where all were evaluated."""
    flops = pd.concat([curve["flops"] for curve in curves], axis=1).mean(axis=1)
    return flops, pd.concat([curve["accuracy"] for curve in curves], axis=1).dropna()


def accuracies_at(budget: float, flops: pd.Series, accuracies: pd.DataFrame) -> list[float]:
    """Return the seeds' accuracies after the last evaluated round that took no more than `budget` FLOPs.

    Nothing if there is no such round: the initial model, which took none, is not counted.
    """
    spent = flops[accuracies.index]
    within = accuracies[(spent > 0) & (spent <= budget)]
    return within.iloc[-1].tolist() if len(within) else []


def on_front(rows: Sequence[Mapping[str, Any]]) -> set[str]:
    """Return the rules that no other beats: at least as good in accuracy, peak and bytes up, and better in one.

    Rules that are equal in all three stay together. One that lacks a number is not on the front and beats nobody.
    """
    points = {
        row["rule"]: [sign * row[key] for key, sign in AIMS.items()]
        for row in rows
        if not any(is_missing(row[key]) for key in AIMS)
    }

    def beats(one: list[float], other: list[float]) -> bool:
        return one != other and all(a >= b for a, b in zip(one, other, strict=True))

    return {rule for rule, point in points.items() if not any(beats(other, point) for other in points.values())}


def _row(each: Outcome, flops: pd.Series | None, accuracies: pd.DataFrame | None, budget: float | None) -> Row:
    def of_cells(key: str) -> list[float]:
        return [cell.numbers[key] for cell in each.cells if not is_missing(cell.numbers[key])]

    equal = accuracies_at(budget, flops, accuracies) if budget and flops is not None else []
    return {
        "rule": each.rule,
        "seeds": len(each.cells),
        "lr": each.cells[0].lr if each.cells else None,
        "accuracy": mean(of_cells("accuracy")),
        "accuracy_sd": deviation(of_cells("accuracy")),
        "peak_bytes": max(of_cells("peak_bytes_max"), default=None),
        "peak_to_backprop": None,
        "bytes_up_client": mean(of_cells("bytes_up_client")),
        "bytes_up_total": mean(of_cells("bytes_up_total")),
        "flops_client": float(flops.iloc[-1]) if flops is not None else None,
        "accuracy_at_equal_flops": mean(equal),
        "accuracy_at_equal_flops_sd": deviation(equal),
        "seconds": mean(of_cells("seconds")),
        "client_rounds": sum(of_cells("client_rounds")),
        "client_rounds_failed": sum(of_cells("failed")),
        "client_rounds_over_budget": sum(of_cells("over_budget")),
        "client_rounds_adapted": sum(of_cells("adapted")),
        "front": False,
        "settings": written(each.own) or None,
        "reason": _reason(each),
    }


def mean(values: Sequence[float]) -> float | None:
    """Return the mean, or None of nothing."""
    return fmean(values) if values else None


def deviation(values: Sequence[float]) -> float | None:
    """Return the sample standard deviation, or None of fewer than two values."""
    return stdev(values) if len(values) > 1 and all(map(math.isfinite, values)) else None


def _reason(each: Outcome) -> str | None:
    """Say why cells are not finished: once if all have one reason, else seed by seed."""
    if not each.failures:
        return None
    if not each.cells and len(set(each.failures.values())) == 1:
        return next(iter(each.failures.values()))
    return "; ".join(f"seed {seed}: {reason}" for seed, reason in each.failures.items())
