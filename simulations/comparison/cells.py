"""A cell of a comparison is one recorded run, a rule with a seed; what is recorded and finished is never run again.

So the command that began a comparison also goes on with it: finished cells are read, the unfinished one is resumed, the
rest is run. A folder that holds another experiment is refused before anything runs.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...algorithms import NetworkError, RuleError
from ...server.records import NotARun, Run, read_run
from ..experiment import FIELDS, Experiment, ExperimentError, from_mapping
from ..run import execute, reopen, start
from ..summary import summarise
from ..world import build, resolved
from .settings import experiment_of

Watch = Callable[[Experiment, int], Any]  # an experiment and its rounds that are there -> what watches it, in a `with`


@dataclass(frozen=True)
class Cell:
    """A rule with a seed.

    Attributes:
        rule: its name, as it was given.
        experiment: everything written out, the name of the run's folder too.
    """

    rule: str
    experiment: Experiment


def cells_of(common: Experiment, own: Mapping[str, Mapping[str, Any]], seeds: int) -> list[Cell]:
    """Return a cell for every rule in `own` and every seed from the common experiment's on, rule by rule.

    Raises:
        ExperimentError, RuleError: if a rule does not take its settings.
    """
    cells = []
    for rule, settings in own.items():
        asked = experiment_of(common, rule, settings)
        with _blamed_on(rule):
            asked = resolved(asked)
        folder = re.sub(r"[^\w.-]+", "-", rule).lstrip(".-")
        for seed in range(common.seed, common.seed + seeds):
            cells.append(Cell(rule, asked.replace(seed=seed, name=f"{folder}-seed{seed}")))
    return cells


def recorded(experiment: Experiment, runs: Path, elsewhere: str = "--runs-dir") -> Run | None:
    """Return the run of an experiment as far as it got, or None if there is none.

    Args:
        experiment: everything written out, its name too.
        runs: the folder that holds the run's.
        elsewhere: the flag that names another place, for the message.

    Raises:
        ExperimentError: if its folder holds something else.
    """
    folder = runs / experiment.name
    if not folder.exists():
        return None
    remedy = f"remove it, or choose another {elsewhere}"
    try:
        run = read_run(folder)
    except NotARun as error:
        raise ExperimentError(f"{error}: {remedy}") from None
    there = from_mapping(tomllib.loads(run.info.get("experiment") or "")).replace(name=experiment.name)
    if experiment.engine == "auto":  # a run records the one that was chosen
        there = there.replace(engine="auto")
    if there != experiment:
        raise ExperimentError(f"{folder} holds a run with other settings ({_difference(there, experiment)}): {remedy}")
    return run


def finished(experiment: Experiment, runs: Path, watch: Watch) -> Run:
    """Return the finished run of an experiment: read if it is there, gone on with if it began, else run.

    Raises:
        ExperimentError, DataError, DeviceError, RuleError, NetworkError: if it cannot be run.
        RunFailed: if it came to nothing; it is tried again the next time.
        RunInUse: if another process is at it.
    """
    run = recorded(experiment, runs)
    if _is_finished(run):
        return run
    world, folder = reopen(runs / experiment.name) if run else start(experiment, runs)
    with watch(world.experiment, summarise(read_run(folder))["rounds"] or 0) as watcher:
        execute(world, folder, watcher, watcher.client_done)
    return read_run(folder)


def unfit(cells: list[Cell], runs: Path) -> dict[str, str]:
    """Return why rules cannot train their model, by rule; all that is not finished is built once to see it.

    Raises:
        ExperimentError, DataError, DeviceError: if what was asked for is a mistake.
        RuleError, NetworkError: if no rule at all can train it.
    """
    unfinished: dict[str, Cell] = {}  # the first of each rule
    for cell in cells:
        if not _is_finished(recorded(cell.experiment, runs, "--name")):
            unfinished.setdefault(cell.rule, cell)
    reasons: dict[str, str] = {}
    error: Exception | None = None
    for cell in unfinished.values():
        try:
            with _blamed_on(cell.rule):
                build(cell.experiment)
        except (RuleError, NetworkError) as refusal:
            reasons[cell.rule], error = " ".join(str(refusal).split()), refusal
    if error and len(reasons) == len({cell.rule for cell in cells}):
        raise error
    return reasons


def _is_finished(run: Run | None) -> bool:
    return run is not None and run.info.get("status") == "finished"


@contextmanager
def _blamed_on(rule: str) -> Iterator[None]:
    """Say of which rule an ExperimentError speaks, and how a setting is given to it alone."""
    try:
        yield
    except ExperimentError as error:
        raise ExperimentError(f"rule {rule}: {error} (for this rule alone: --for {rule}.KEY=VALUE)") from error


def _difference(there: Experiment, asked: Experiment) -> str:
    """Say in what two experiments differ, in one of the settings."""
    for key in FIELDS:
        old, new = getattr(there, key), getattr(asked, key)
        if old != new:
            return f"{key.replace('_', '-')} is {old} there, not {new}"
    return "none that is known"
