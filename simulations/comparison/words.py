"""A comparison in words: its columns, the notes under it, and what its numbers mean."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from ..formats import NOTHING, format_bytes, format_flops, format_number, format_percent, is_missing
from .rows import Comparison, Row


class Column(NamedTuple):
    """A column of the table: heading, what it means, and how a row is written in it."""

    heading: str
    meaning: str
    write: Callable[[Row], str]


def spread(row: Row, key: str) -> str:
    """Return a share as mean ± standard deviation: `96.7 ± 0.3 %`."""
    value, deviation = row[key], row[f"{key}_sd"]
    if is_missing(value) or is_missing(deviation):
        return format_percent(value)
    return f"{100 * value:.1f} ± {100 * deviation:.1f} %"


def ratio(row: Row) -> str:
    """Return the peak memory in that of backprop: `0.90`."""
    return NOTHING if is_missing(row["peak_to_backprop"]) else f"{row['peak_to_backprop']:.2f}"


COLUMNS = (
    Column("Accuracy", "after the last round", lambda row: spread(row, "accuracy")),
    Column("Peak memory", "of the largest client", lambda row: format_bytes(row["peak_bytes"])),
    Column("× backprop", "its peak memory", ratio),
    Column("Sent up", "a client and round", lambda row: format_bytes(row["bytes_up_client"])),
    Column("Sent up, total", "all clients and rounds", lambda row: format_bytes(row["bytes_up_total"])),
    Column("FLOPs, total", "of a client", lambda row: format_flops(row["flops_client"])),
    Column("At equal FLOPs", "accuracy", lambda row: spread(row, "accuracy_at_equal_flops")),
    Column("Learning rate", "at the start", lambda row: format_number(row["lr"])),
)


def marks(comparison: Comparison) -> dict[str, str]:
    """Return the mark of every rule that has a note, ¹, ² and so on."""
    noted = [row["rule"] for row in comparison.rows if _note(row, comparison)]
    return {rule: str(number).translate(SUPERSCRIPTS) for number, rule in enumerate(noted, 1)}


def notes(comparison: Comparison) -> list[str]:
    """Return a line for every rule of which the table does not tell all: settings of its own, failures."""
    rows = {row["rule"]: row for row in comparison.rows}
    return [f"{mark} {rule}: {_note(rows[rule], comparison)}" for rule, mark in marks(comparison).items()]


def headline(comparison: Comparison) -> str:
    """Return what is compared, in one line."""
    e, seeds = comparison.common, comparison.seeds
    clients = f"{e.clients} clients" if e.sampled() == e.clients else f"{e.sampled()} of {e.clients} clients a round"
    told = f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {seeds[0]} to {seeds[-1]}"
    rules = f"{len(comparison.rows)} rule{'s' * (len(comparison.rows) > 1)}"
    return f"{rules} on {e.data} ({e.partition}), model {e.model}, {clients}, {e.rounds} rounds, {told}"


def settings(comparison: Comparison) -> str:
    """Say in what the rules' settings are equal and in what not."""
    lr, own = comparison.common.lr, [row["rule"] for row in comparison.rows if row["settings"]]
    rate = "each rule's own default learning rate" if lr is None else f"learning rate {lr:g} for all"
    differing = f", but for the noted settings of {', '.join(own)}" if own else ""
    return f"Settings are the same for every rule, with {rate}{differing}."


def equal_flops(comparison: Comparison) -> str:
    """Say what "at equal FLOPs" is."""
    if comparison.equal_flops is None:
        return "No FLOPs were counted, so there is no accuracy at equal FLOPs."
    least = [row["rule"] for row in comparison.rows if row["flops_client"] == comparison.equal_flops]
    return (
        f"At equal FLOPs: accuracy at the last evaluated round within {format_flops(comparison.equal_flops)} a client,"
        f" the total of {' and '.join(least)}, the least of all."
    )


def front(comparison: Comparison) -> str:
    """Say what the front is."""
    said = "Front: no other rule is at least as good in accuracy, peak memory and bytes sent up, and better in one"
    return f"{said}; by means, so what lies within ± decides nothing." if len(comparison.seeds) > 1 else f"{said}."


SUPERSCRIPTS = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")


def _note(row: Row, comparison: Comparison) -> str:
    said = [f"its own settings: {row['settings']}"] if row["settings"] else []
    if 0 < row["seeds"] < len(comparison.seeds):
        said.append(f"{row['seeds']} of {len(comparison.seeds)} seeds")
    said += [row["reason"]] if row["reason"] else []
    asked = sum(row[key] for key in ("client_rounds", "client_rounds_failed", "client_rounds_over_budget"))
    for key, word in {"client_rounds_failed": "failed", "client_rounds_over_budget": "were over budget"}.items():
        said += [f"{row[key]} of {asked} client rounds {word}"] if row[key] else []
    if row["client_rounds_adapted"]:
        said.append(
            f"{row['client_rounds_adapted']} client rounds were trained otherwise than asked, to fit the device"
        )
    return "; ".join(said)
