"""The tables of a report: which columns of the run database they show, under which heading, and written how."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from typing import Any, NamedTuple

import pandas as pd

from .formats import (
    format_bytes,
    format_flops,
    format_integer,
    format_number,
    format_percent,
    format_seconds,
    format_text,
)

MOST_ROWS = 2000  # of one table of the page; the database holds the rest


class Column(NamedTuple):
    """A column of a table; one that is not always there is left out where no row has it."""

    key: str
    heading: str
    meaning: str
    write: Callable[[Any], str]
    always: bool = True


def table(frame: pd.DataFrame, columns: Sequence[Column]) -> str:
    """Return the rows of `frame` as HTML."""
    if not len(frame):
        return "<p class=small>No rows yet.</p>"
    columns = [column for column in columns if column.always or (column.key in frame and frame[column.key].any())]
    sides = ["" if column.write is format_text else " class=n" for column in columns]
    head = "".join(
        f'<th{side} title="{escape(column.meaning)}">{column.heading}</th>'
        for side, column in zip(sides, columns, strict=True)
    )
    rows = []
    for values in frame.tail(MOST_ROWS).to_dict("records"):
        cells = zip(sides, columns, strict=True)
        rows.append("".join(f"<td{side}>{escape(each.write(values.get(each.key)))}</td>" for side, each in cells))
    left_out = len(frame) - len(rows)
    more = f"<p class=small>{left_out:,} more rows are in run.sqlite.</p>" if left_out > 0 else ""
    return f"{more}<div class='scroll tall'><table><tr>{head}</tr><tr>{'</tr><tr>'.join(rows)}</tr></table></div>"


def format_audited(x: float | None) -> str:
    """Return whether a client round was audited."""
    return "yes" if x == 1 else "no"


ROUNDS = (
    Column("round", "Round", "0 is the initial model", format_integer),
    Column("accuracy", "Accuracy", "of the global model on the server's test set", format_percent),
    Column("loss", "Loss", "of the global model on the server's test set", format_number),
    Column(
        "client_accuracy", "Client accuracy", "clients' own held-out data, mean weighted by samples", format_percent
    ),
    Column("train_loss", "Training loss", "mean over the clients of the round, weighted by samples", format_number),
    Column("learning_rate", "Learning rate", "of the round", format_number),
    Column("clients", "Ok", "clients that ended ok", format_integer),
    Column("over_budget", "Refused", "clients whose device cannot train the model", format_integer, always=False),
    Column("failed", "Failed", "clients that failed or dropped out", format_integer),
    Column("bytes_up", "Up", "payload bytes of training, all clients", format_bytes),
    Column("bytes_down", "Down", "payload bytes of training, all clients", format_bytes),
    Column("flops", "Compute", "floating-point operations, all clients", format_flops),
    Column("simulated_seconds", "Simulated", "time of the round's slowest device", format_seconds, always=False),
    Column("seconds", "Time", "of this machine", format_seconds),
)
CLIENTS = (
    Column("client", "Client", "its partition of the data", format_integer),
    Column("round", "Round", "the last one it took part in", format_integer),
    Column("device", "Device", "what it runs on", format_text, always=False),
    Column("rule", "Rule", "how it learnt", format_text),
    Column("status", "Status", "ok, over budget, failed, audit failed or dropped", format_text),
    Column("fit", "Fit", "what it changed to fit its device", format_text, always=False),
    Column("samples", "Samples", "of its training data", format_integer),
    Column("steps", "Steps", "minibatches learnt from", format_integer),
    Column("batch", "Batch", "samples of a minibatch", format_integer),
    Column("loss", "Loss", "training loss", format_number),
    Column("accuracy_before", "Before", "accuracy on its own held-out data before training", format_percent),
    Column("accuracy_after", "After", "accuracy on its own held-out data after training", format_percent),
    Column("budget_bytes", "Budget", "memory of its device for tensors", format_bytes, always=False),
    Column("peak_bytes", "Peak", "memory: most bytes of a training step of that round", format_bytes),
    Column("audited", "Audited", "whether its memory was measured beside the plan", format_audited, always=False),
    Column("bytes_up", "Up", "payload bytes", format_bytes),
    Column("bytes_down", "Down", "payload bytes", format_bytes),
    Column("flops", "Compute", "floating-point operations", format_flops),
    Column("simulated_seconds", "Simulated", "time of its device and link", format_seconds, always=False),
    Column("seconds", "Time", "of this machine", format_seconds),
)
DEVICES = (
    Column("device", "Device", "of the fleet", format_text),
    Column("budget_bytes", "Budget", "memory for tensors", format_bytes),
    Column("clients", "Clients", "that were sampled at least once", format_integer),
    Column("peak_bytes", "Peak", "the most that any of these clients needed", format_bytes),
    Column("share", "Of budget", "peak / budget", format_percent),
    Column("audited", "Audited", "client rounds whose memory was measured", format_integer, always=False),
    Column("simulated_seconds", "Simulated", "time of a round: receive, compute, send; median", format_seconds),
    Column("accuracy_after", "After", "accuracy on own held-out data after the last training, mean", format_percent),
    Column("how", "What became of them", "how they train, or why not", format_text),
)
FAILURES = (
    Column("status", "Status", "failed, audit failed or dropped", format_text),
    Column("count", "Client-rounds", "that ended so", format_integer),
    Column("clients", "Clients", "their partitions of the data", format_text),
    Column("rounds", "Rounds", "in which they failed", format_text),
    Column("device", "Device", "what they run on", format_text, always=False),
    Column("reason", "Reason", "why they failed", format_text),
)
