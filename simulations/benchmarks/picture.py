"""The picture of a benchmark: a panel of bars for each part and workload."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..axes import plain, styled
from ..summary import COLOURS
from .columns import LOOKS, pace
from .settings import Row

ACROSS = 2  # panels in a row


class Panel(NamedTuple):
    """Bars, the first one on top."""

    title: str
    unit: str
    names: list[str]
    lengths: list[float]
    ours: list[bool]


def draw_bench(results: Mapping[str, Any]) -> bytes:
    """Return the picture as PNG."""
    panels = [panel for name, rows in results.items() if name in LOOKS for panel in panels_of(name, rows)]
    pairs = [panels[start : start + ACROSS] for start in range(0, len(panels), ACROSS)] or [[]]
    heights = [0.9 + 0.24 * max([len(panel.names) for panel in pair], default=1) for pair in pairs]
    figure = Figure(figsize=(12, sum(heights) + 0.4), dpi=130, layout="constrained")
    grid = figure.subplots(len(pairs), ACROSS, squeeze=False, height_ratios=heights)
    for axes, panel in zip(grid.flat, panels, strict=False):
        _bars(axes, panel)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    machine = results["machine"]
    figure.supxlabel(
        f"{machine['device']}; load {machine['load_before']} before, {machine['load_after']} after."
        " Grey: hand-written loops and other bounds. Compare bars of one panel alone.", fontsize=9,
    )  # fmt: skip
    png = io.BytesIO()
    figure.savefig(png, format="png")
    return png.getvalue()


def panels_of(part: str, rows: Sequence[Row]) -> list[Panel]:
    """Return the panels of a part: one for each value of the column that its look groups by."""
    group, name, length, unit = LOOKS[part].bars
    rows = [_with_size(row) for row in rows]
    found = []
    for key, members in groupby(sorted(rows, key=lambda row: str(row.get(group, ""))), lambda row: row.get(group, "")):
        known = [row for row in members if row.get(length) is not None]
        if known:
            title = f"{part}: {key}" if key else part
            ours = [row.get("ours", name != "rule" or row[name] != "matrix product") for row in known]
            found.append(Panel(title, unit, [row[name] for row in known], [row[length] for row in known], ours))
    return found


def _with_size(row: Row) -> Row:
    """Return a row of the scaling part with the name and the length of its bar."""
    if "peak_resident_bytes" not in row:
        return row
    size = f"{row['clients_per_round']:,} of {row['clients']:,}"
    return row | {"size": size, "peak_resident_mib": row["peak_resident_bytes"] / 2**20}


def _bars(axes: Axes, panel: Panel) -> None:
    styled(axes, panel.unit, "")
    places = range(len(panel.names), 0, -1)
    bars = axes.barh(places, panel.lengths, color=[COLOURS[0] if ours else "#bbbbbb" for ours in panel.ours])
    axes.bar_label(bars, [pace(length) for length in panel.lengths], padding=3, fontsize=9)
    axes.set_yticks(list(places), [plain(name) for name in panel.names])
    axes.margins(x=0.12)
    axes.set_title(plain(panel.title), fontsize=11, loc="left")
    axes.grid(visible=False, axis="y")
