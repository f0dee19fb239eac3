"""Compare rules: every rule with every seed as a recorded run, then one row a rule."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from ...server.records import DATABASE
from ...server.rounds import RunFailed
from ..experiment import Experiment, ExperimentError
from ..parts import MISTAKES
from ..terminal import say
from .cells import Cell, cells_of, finished, unfit
from .page import write_files
from .rows import Comparison, Measured, Outcome, measured, rows_of
from .terminal import CellBar, cell_line


@dataclass(frozen=True)
class Request:
    """What is to be compared.

    Attributes:
        common: the experiment that all rules share; its seed is the first one.
        own: each rule's own settings, in the order of the rules.
        seeds: how many.
        runs: folder that holds the comparison's.
        command: that asks for it, and goes on with it.
    """

    common: Experiment
    own: Mapping[str, Mapping[str, Any]]
    seeds: int
    runs: Path
    command: str


def compare(request: Request, console: Console) -> Comparison:
    """Run what is not there yet of a comparison, telling of each cell on `console`, and write its files.

    A cell that fails does not stop the others; its reason is in the rule's row.

    Raises:
        ExperimentError, DataError, DeviceError: for a mistake, before anything is run.
        RuleError, NetworkError: if no rule can train its model.
        RunFailed: if no cell at all was finished.
        RunInUse: if another process is at one of them.
    """
    common, folder = request.common, _folder(request)
    cells = cells_of(common, request.own, request.seeds)
    reasons = unfit(cells, folder)
    outcomes = {rule: Outcome(rule, own) for rule, own in request.own.items()}
    for number, cell in enumerate(cells, 1):
        outcome, seed = outcomes[cell.rule], cell.experiment.seed
        heading = f"[{number}/{len(cells)}] {cell.rule}, seed {seed}"
        try:
            if cell.rule in reasons:
                raise ExperimentError(reasons[cell.rule])
            outcome.cells.append(_cell(cell, folder, heading, console))
        except (*MISTAKES, RunFailed) as error:
            outcome.failures[seed] = " ".join(str(error).split())
            say(console, f"{heading}: {outcome.failures[seed]}", style="yellow")
    if not any(outcome.cells for outcome in outcomes.values()):
        raise RunFailed(f"no run of {folder} was finished: {next(iter(outcomes.values())).failures[common.seed]}")
    rows, budget = rows_of(outcomes.values())
    seeds = range(common.seed, common.seed + request.seeds)
    comparison = Comparison(folder, common, seeds, list(outcomes.values()), rows, budget, request.command)
    try:
        write_files(comparison)
    except OSError as error:
        raise RunFailed(f"cannot write into {folder} ({error.strerror}): make room, then {request.command}") from None
    return comparison


def _cell(cell: Cell, folder: Path, heading: str, console: Console) -> Measured:
    """Return what a cell came to, with a bar while it runs and a line when it is finished."""
    bars = []

    def watch(experiment: Experiment, done: int) -> CellBar:
        bars.append(CellBar(console, heading, experiment, done))
        return bars[0]

    found = measured(finished(cell.experiment, folder, watch))
    say(console, cell_line(heading, found.numbers) + ("" if bars else " (recorded before)"))
    return found


def _folder(request: Request) -> Path:
    """Return the folder of a comparison.

    Raises:
        ExperimentError: if it holds a run, or the experiment is none that runs here.
    """
    common = request.common
    if common.engine == "flower":
        raise ExperimentError("engine flower is Flower's own runtime, started by `flwr run .`: use inline here")
    data = Path(common.data.rpartition(":")[2]).resolve().stem.lower()
    folder = request.runs / (common.name or f"{data}-comparison")
    if (folder / DATABASE).exists():
        raise ExperimentError(f"{folder} holds a run, not a comparison: choose another --name")
    return folder
