"""What `fedforward papers` prints: a table of all rules' lines, or one rule's page."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

from rich.table import Table

from ..experiment import Experiment
from .pages import Page

UNKNOWN = "–"


def table(rows: list[dict[str, Any]]) -> Table:
    """Return the published and our accuracies, in percent, and how far apart they are, in points."""
    shown = Table(title="Test accuracy, %: published, and ours (the last of a recorded run)")
    for heading in ("rule", "line", "published", "ours", "apart", "rounds"):
        shown.add_column(heading, no_wrap=True, justify="left" if heading in ("rule", "line") else "right")
    for row in rows:
        both = row["published"] is not None and row["ours"] is not None
        apart = f"{100 * (row['ours'] - row['published']):+.2f}" if both else UNKNOWN
        rounds = f"{row['rounds']}/{row['of']}" if row["rounds"] is not None else row["status"]
        shown.add_row(row["rule"], row["line"], _percent(row["published"]), _percent(row["ours"]), apart, rounds)
    return shown


def text(page: Page, data_dir: Path | None) -> str:
    """Return a rule's page in words."""
    published = f"{_percent(page.published)} %, {page.source}" if page.published is not None else page.source
    where = f" --data-dir {data_dir}" if data_dir else ""
    said = {"Claim": page.claim, "Published": published, "Ours differs": page.differs}
    said |= {line.capitalize(): _setting(asked) for line, asked in page.lines.items()}
    said |= {"Run it": f"fedforward papers {page.name} --run{where}"}
    return "\n".join([page.name, *(textwrap.fill(f"{key}: {words}", 118, initial_indent="  ", subsequent_indent="    ",
                                                 break_on_hyphens=False) for key, words in said.items())])  # fmt: skip


def _setting(asked: Experiment) -> str:
    """Return what matters of an experiment, as flags."""
    flags = {"--data": asked.data, "--clients": asked.clients, "--rounds": asked.rounds, "--epochs": asked.epochs}
    flags |= {"--batch-size": asked.batch_size, "--lr": asked.lr, "--lr-schedule": asked.lr_schedule}
    words = [f"{flag} {value}" for flag, value in flags.items() if value is not None]
    words += [f"--model {asked.model}"]
    words += [f"{part}.{key}={value}" for part, options in asked.set.items() for key, value in options.items()]
    return ", ".join(words)


def _percent(part: float | None) -> str:
    return UNKNOWN if part is None else f"{100 * part:.2f}"
