"""What a benchmark looks like in a terminal: a table a part, and the machine that all figures are of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from ..formats import format_text
from ..terminal import say
from .columns import LOOKS, Look
from .settings import Row


def show(results: Mapping[str, Any], console: Console) -> None:
    """Print the tables of all parts."""
    for name, rows in results.items():
        if name in LOOKS:
            console.print(table(LOOKS[name], rows))
    m = results["machine"]
    say(
        console,
        f"{m['device']}, PyTorch {m['torch']}, one thread a process; medians of {m['repeats']} runs of {m['rounds']}"
        f" rounds after {m['warm_up']}; load {m['load_before']} before, {m['load_after']} after:"
        " compare figures of one run alone",
    )


def table(look: Look, rows: Sequence[Row]) -> Table:
    """Return the table of a part."""
    shown = [column for column in look.columns if any(row.get(column.key) is not None for row in rows)]
    made = Table(title=look.title, box=None, padding=(0, 1, 0, 0), title_justify="left", title_style="bold")
    for column in shown:
        made.add_column(column.heading, justify="left" if column.write is format_text else "right", overflow="fold")
    previous = None
    for row in rows:
        if previous is not None and row[shown[0].key] != previous and len(shown) > 1 and look.bars[0] == shown[0].key:
            made.add_row()
        previous = row[shown[0].key]
        made.add_row(*(column.write(row.get(column.key)) for column in shown))
    return made
