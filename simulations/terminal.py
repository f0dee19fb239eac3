"""What a run looks like in a terminal: a line a round, a progress bar under them, a table at the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from ..server.rows import OVER_BUDGET
from .experiment import Experiment
from .formats import NOTHING, format_bytes, format_number, format_percent, format_seconds
from .population import Admission, describe

# (heading, width, value of a round's row and its clients); with the gaps between, a line fits 80 columns
REFUSED = ("refused", 11, lambda row, clients, rounds: str(row.get("over_budget") or "–"))
COLUMNS = (
    ("round", 9, lambda row, clients, rounds: f"{row['round']}/{rounds}"),
    ("accuracy", 8, lambda row, clients, rounds: format_percent(row.get("accuracy"))),
    ("own acc", 7, lambda row, clients, rounds: format_percent(row.get("client_accuracy"))),
    ("tr. loss", 8, lambda row, clients, rounds: _loss(row.get("train_loss"))),
    ("max memory", 11, lambda row, clients, rounds: format_bytes(_largest(clients, "peak_bytes"))),
    ("max sent up", 11, lambda row, clients, rounds: format_bytes(_largest(clients, "bytes_up"))),
    ("failed", 6, lambda row, clients, rounds: str(row["failed"]) if row["failed"] else "–"),
    ("time", 6, lambda row, clients, rounds: _seconds(row["seconds"])),
)
MOST_FAILURES = 5  # told of one round; the report holds them all


class Watcher:
    """Shows a run on a console while it goes on. Use as a context manager.

    What became of the clients on their devices is said once, before the first round; rounds only count the refused.

    Args:
        console: where to write.
        experiment: what is running.
        done: rounds that were there before.
        admissions: what becomes of the clients on their devices; nothing without a fleet.
    """

    def __init__(
        self, console: Console, experiment: Experiment, done: int = 0, admissions: Sequence[Admission] = ()
    ) -> None:
        self.console, self.rounds = console, experiment.rounds
        self.columns = [REFUSED if experiment.fleet and each[0] == "max sent up" else each for each in COLUMNS]
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self.task = self.progress.add_task("clients", total=_replies(experiment, done))
        for line in describe(admissions):
            say(console, f"  {line}")
        say(console, "  ".join(f"{name:>{width}}" for name, width, _ in self.columns), style="bold")

    def __enter__(self) -> Watcher:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def client_done(self) -> None:
        """Move the bar by one client that has trained or evaluated."""
        if self.progress.tasks[0].completed < self.progress.tasks[0].total:
            self.progress.advance(self.task)

    def round_started(self, server_round: int, clients: int) -> None:
        """Name the round beside the bar."""
        self.progress.update(self.task, description=f"round {server_round}/{self.rounds}")

    def round_done(self, row: Mapping[str, Any], clients: list[dict[str, Any]]) -> None:
        """Print the round's line."""
        say(self.console, "  ".join(f"{value(row, clients, self.rounds):>{width}}" for _, width, value in self.columns))
        failures = [client for client in clients if client["status"] not in ("ok", OVER_BUDGET)]
        for client in failures[:MOST_FAILURES]:
            say(self.console, f"  client {client['client']} {client['status']}: {client['reason']}", style="yellow")
        if len(failures) > MOST_FAILURES:
            say(self.console, f"  and {len(failures) - MOST_FAILURES} more: see the report", style="yellow")


def say(console: Console, text: str, style: str | None = None) -> None:
    """Print a line as it stands; where it is not a terminal that reads it, never wrapped."""
    console.print(text, style=style, highlight=False, markup=False, soft_wrap=not console.is_terminal)


def headline(experiment: Experiment) -> str:
    """Return the line that begins a run."""
    e = experiment
    clients = f"{e.clients} clients" if e.sampled() == e.clients else f"{e.sampled()} of {e.clients} clients"
    partition = f"{e.partition}, resampled" if e.resample else e.partition
    return f"{e.rule} on {e.data} ({partition}), {clients}, {e.rounds} rounds, seed {e.seed}"


def final_table(experiment: Experiment, summary: Mapping[str, Any]) -> Table:
    """Return the table that ends a run."""
    title = escape(f"{summary['name']}: {experiment.rule} on {experiment.data}")
    table = Table(title=title, show_header=False, expand=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(justify="right")
    up, down = summary["bytes_up_client"], summary["bytes_down_client"]
    rows = [
        ("test accuracy", format_percent(summary["accuracy"])),
        ("test loss", format_number(summary["loss"])),
        ("client accuracy (held-out, mean)", format_percent(summary["client_accuracy"])),
        ("peak memory of a step, median client", format_bytes(summary["peak_bytes_median"])),
        ("peak memory of a step, largest client", format_bytes(summary["peak_bytes_max"])),
        ("sent up per client and round", format_bytes(up)),
        ("sent down per client and round", format_bytes(down)),
        ("sent up in total", format_bytes(summary["bytes_up_total"])),
        ("sent down in total", format_bytes(summary["bytes_down_total"])),
        ("sent for evaluation besides, up and down", format_bytes(summary["evaluation_bytes_total"])),
        ("client rounds (failed)", f"{summary['client_rounds']} ({summary['failed']})"),
        *_fleet_rows(summary),
        *_diagnosis_rows(summary),
        ("time", format_seconds(summary["seconds"])),
    ]
    for row in rows:
        table.add_row(*row)
    return table


def _fleet_rows(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return what a run's devices came to, as far as it has any."""
    rows = (
        ("adapted", "client rounds adapted to their device", f"{summary['adapted']}"),
        ("over_budget", "client rounds refused, over budget", f"{summary['over_budget']}"),
        (
            "audited",
            "client rounds audited (not as planned)",
            f"{summary['audited']} ({summary['audit_mismatches']})",
        ),
        ("simulated_seconds", "time on the devices, simulated", format_seconds(summary["simulated_seconds"])),
    )
    return [(label, value) for key, label, value in rows if summary[key]]


def _diagnosis_rows(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return what was last found of the blocks, as far as anybody asked."""
    rows = (
        ("angles", "angle with the gradient, by block", "{:.1f}°"),
        ("sparsity", "sparsity of activity (Hoyer), by block", "{:.2f}"),
        ("separation", "goodness separates, by block (standard deviations)", "{:.2f}"),
    )
    told = lambda values, form: "  ".join(NOTHING if v is None else form.format(v) for v in values)  # noqa: E731
    return [(label, told(summary[key], form)) for key, label, form in rows if summary[key]]


def _replies(experiment: Experiment, done: int) -> int:
    """Return how often a client will be asked to train or to evaluate in the rounds after `done`."""
    left = range(done + 1, experiment.rounds + 1)
    evaluated = sum(t == experiment.rounds or t % experiment.evaluate_every == 0 for t in left)
    return len(left) * experiment.sampled() + evaluated * experiment.evaluated()


def _largest(clients: list[dict[str, Any]], column: str) -> int | None:
    return max((client[column] for client in clients if client.get(column)), default=None)


def _loss(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value < 9.995 else f"{value:.1f} s" if value < 99.95 else f"{value:.0f} s"
