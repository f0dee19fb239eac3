"""What a comparison looks like in a terminal: a bar while a cell runs, a line when it is done, a table at the end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from ..experiment import Experiment
from ..formats import NOTHING, format_bytes, format_flops, format_percent, format_seconds, is_missing
from .rows import Comparison
from .words import equal_flops, front, headline, marks, notes, ratio, settings

HEADINGS = (
    "accuracy\n%", "peak\nmemory", "×\nbp", "up, client\nand round", "up,\ntotal", "FLOPs,\nclient", "=FLOPs\n%",
)  # fmt: skip
WIDE, LONG = 100, 14  # on a narrower terminal, a longer name of a rule takes two lines


class CellBar:
    """Shows how far a cell is, and leaves nothing behind. Use as a context manager.

    Args:
        console: where to draw; nothing is drawn unless it is a terminal.
        heading: which cell.
        experiment: what is running.
        done: rounds that were there before.
    """

    def __init__(self, console: Console, heading: str, experiment: Experiment, done: int = 0) -> None:
        self.heading, self.rounds = heading, experiment.rounds
        self.done, self.share, self.clients = done, 0.0, 1
        self.progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self.task = self.progress.add_task(heading, total=experiment.rounds, completed=done)

    def __enter__(self) -> CellBar:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def round_started(self, server_round: int, clients: int) -> None:
        """Name the round; each of its clients that trains is a part of it."""
        self.done, self.share, self.clients = server_round - 1, 0.0, max(clients, 1)
        self.progress.update(self.task, description=f"{self.heading}, round {server_round}/{self.rounds}")

    def client_done(self) -> None:
        """Move the bar by one client; those that evaluate afterwards move it no further."""
        self.share = min(self.share + 1 / self.clients, 1.0)
        self.progress.update(self.task, completed=self.done + self.share)

    def round_done(self, row: Mapping[str, Any], clients: list[dict[str, Any]]) -> None:
        """Move the bar to the round's end."""
        self.progress.update(self.task, completed=row["round"])


def cell_line(heading: str, summary: Mapping[str, Any]) -> str:
    """Return the line of a finished cell."""
    lost = summary["failed"] + summary["over_budget"]
    failed = f", {lost} client rounds failed or over budget" if lost else ""
    return (
        f"{heading}: accuracy {format_percent(summary['accuracy'])}, peak {format_bytes(summary['peak_bytes_max'])},"
        f" {format_seconds(summary['seconds'])}{failed}"
    )


def show(comparison: Comparison, console: Console) -> None:
    """Print the table of a comparison and what there is to say of it."""
    table = Table(box=None, padding=(0, 1, 0, 0), title=headline(comparison), title_justify="left", title_style="bold")
    table.add_column(width=1)
    table.add_column("rule\n", style="bold", overflow="fold")
    for heading in HEADINGS:
        table.add_column(heading, justify="right", no_wrap=True)
    marked, broken = marks(comparison), console.width < WIDE
    for row in comparison.rows:
        name = row["rule"].replace("-", "-\n", 1) if broken and len(row["rule"]) > LONG else row["rule"]
        table.add_row(
            "●" if row["front"] else "",
            Text(name + marked.get(row["rule"], "")),
            _percent(row["accuracy"], row["accuracy_sd"]),
            format_bytes(row["peak_bytes"]),
            ratio(row),
            format_bytes(row["bytes_up_client"]),
            format_bytes(row["bytes_up_total"]),
            format_flops(row["flops_client"]).removesuffix("FLOP"),
            _percent(row["accuracy_at_equal_flops"]),
        )
    console.print(table)
    for line in (*notes(comparison), f"● {front(comparison)}", equal_flops(comparison), settings(comparison)):
        console.print(line, highlight=False, markup=False)
    console.print(f"report: {comparison.folder / 'compare.html'}", highlight=False, markup=False, soft_wrap=True)


def as_object(comparison: Comparison) -> dict[str, Any]:
    """Return a comparison as one JSON object: what `show` prints, and where its files are."""
    folder = comparison.folder
    return {
        "name": folder.name,
        "path": str(folder),
        "report": str(folder / "compare.html"),
        "seeds": list(comparison.seeds),
        "equal_flops": comparison.equal_flops,
        "rules": list(comparison.rows),
    }


def _percent(value: float | None, deviation: float | None = None) -> str:
    if is_missing(value):
        return NOTHING
    return f"{100 * value:.1f}" + ("" if is_missing(deviation) else f" ± {100 * deviation:.1f}")
