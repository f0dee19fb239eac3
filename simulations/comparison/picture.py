"""The picture of a comparison: accuracy against peak memory, against bytes sent up. Up and left is better."""

from __future__ import annotations

import io
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..axes import accuracy_axis, byte_axis, plain, styled
from ..formats import is_missing
from ..summary import COLOURS, MARKERS
from .labels import Label, place_labels
from .rows import REFERENCE, Row

PANELS = (  # column, label of the axis
    ("peak_bytes", "Peak memory of a training step, largest client"),
    ("bytes_up_total", "Sent up in total, all clients"),
)
CAPTION = (
    "One mark a rule: mean accuracy on the server's test set after the last round, with the standard deviation over"
    " seeds as a bar. Filled: on the front. Dotted: backprop. Both horizontal axes are logarithmic."
)


def draw_comparison(rows: Sequence[Row]) -> bytes | None:
    """Return the picture as PNG, or None if no rule has an accuracy."""
    rows = [row for row in rows if not is_missing(row["accuracy"])]
    if not rows:
        return None
    figure = Figure(figsize=(11.4, 4.8), dpi=132, layout="constrained")
    panels = figure.subplots(1, len(PANELS), sharey=True)
    for axes, (key, label) in zip(panels, PANELS, strict=True):
        _panel(axes, rows, key, label)
    styled(panels[0], PANELS[0][1], "Accuracy")
    _accuracies(panels[0])
    figure.draw_without_rendering()  # the labels need to know where the points came to lie
    figure.set_layout_engine("none")
    for axes, (key, _) in zip(panels, PANELS, strict=True):
        place_labels(axes, [
            Label(row[key], row["accuracy"], row["accuracy_sd"] or 0, plain(row["rule"]), _colour(index))
            for index, row in enumerate(rows) if row[key]
        ])  # fmt: skip
    png = io.BytesIO()
    figure.savefig(png, format="png")
    return png.getvalue()


def _panel(axes: Axes, rows: Sequence[Row], key: str, label: str) -> None:
    styled(axes, label, "")
    axes.set_xscale("log", base=2)
    for index, row in enumerate(rows):
        if not row[key]:
            continue
        if row["rule"] == REFERENCE:
            axes.axvline(row[key], ls=":", lw=1.1, color="#9aa5b1", zorder=0)
            axes.axhline(row["accuracy"], ls=":", lw=1.1, color="#9aa5b1", zorder=0)
        colour = _colour(index)
        axes.errorbar(
            row[key], row["accuracy"], yerr=row["accuracy_sd"] or 0, fmt=MARKERS[index // len(COLOURS) % len(MARKERS)],
            ms=8, color=colour, mfc=colour if row["front"] else "white", mew=1.6, elinewidth=1.4, capsize=3,
        )  # fmt: skip
    if known := [row[key] for row in rows if row[key]]:
        byte_axis(axes.xaxis, min(known), max(known))


def _accuracies(axes: Axes) -> None:
    """Fit the range of accuracies, with room for names above and below."""
    accuracy_axis(axes.yaxis)
    low, high = axes.get_ylim()
    low, high = low - 0.08 * (high - low), high + 0.12 * (high - low)
    axes.set_ylim(low, high)
    axes.set_yticks([tick for tick in axes.get_yticks() if max(low, 0) <= tick <= min(high, 1)])


def _colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]
