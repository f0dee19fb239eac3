"""What the scripts of papers share: a recorded run with its progress shown, and the rules that were asked for."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import typer
from rich.console import Console

from ...server.records import Run
from ..comparison.cells import finished
from ..experiment import Experiment, ExperimentError, choose
from ..terminal import Watcher, headline, say
from ..world import resolved


def run_of(cell: Experiment, runs: Path) -> Run:
    """Return the run of a cell: read if it is finished, gone on with if it was stopped, else run."""
    console = Console(stderr=True)

    def watch(running: Experiment, done: int) -> Watcher:
        say(console, headline(running))
        return Watcher(console, running, done)

    return finished(resolved(cell), runs, watch)


def asked(rules: str, known: Iterable[str]) -> list[str]:
    """Return the rules named with commas between.

    Raises:
        BadParameter: if the script has no setting for one of them.
    """
    names, known = [name.strip() for name in rules.split(",")], list(known)
    try:
        for name in names:
            choose("rule of this script", name, known)
    except ExperimentError as error:
        raise typer.BadParameter(str(error), param_hint="--rules") from error
    return names
