"""What the axes of every picture look like: quiet lines, and ticks a reader can say aloud."""

from __future__ import annotations

import math

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.ticker import MaxNLocator, PercentFormatter

from .formats import format_bytes


def styled(axes: Axes, x: str, y: str) -> Axes:
    """Return `axes` in the house's style, with its two labels."""
    axes.set_xlabel(x, fontsize=11)
    axes.set_ylabel(y, fontsize=11)
    axes.tick_params(labelsize=10, color="#bbbbbb")
    axes.grid(color="#e6e6e6", lw=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#bbbbbb")
    return axes


def plain(label: str) -> str:
    """Return a label free of matplotlib's own notation."""
    label = "".join(c if c.isprintable() else "?" for c in label).replace("$", r"\$")
    return f" {label}" if label.startswith("_") else label


def count_axis(axis: Axis) -> None:
    """Set ticks that are whole numbers."""
    axis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def accuracy_axis(axis: Axis) -> None:
    """Fit a range of accuracies: never narrower than 4 %, never far beyond 0 or 100 %."""
    low, high = axis.get_data_interval()
    room = max(0.02, 0.06 * (high - low))
    _limit(axis, max(low - room, -0.01), min(high + room, 1.01))
    axis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    share_axis(axis, decimals=0 if high - low > 0.08 else 1)


def share_axis(axis: Axis, decimals: int = 0) -> None:
    """Write shares as per cent."""
    axis.set_major_formatter(PercentFormatter(1, decimals=decimals, symbol=" %"))


def byte_axis(axis: Axis, low: float, high: float) -> None:
    """Set ticks that are round numbers of bytes; a linear axis starts at 0."""
    low, high = max(low, 1), max(high, 1)
    if axis.get_scale() == "log":
        first, last = math.floor(math.log2(low)), math.ceil(math.log2(high))
        last += first == last
        ticks = [2.0**power for power in range(first, last + 1, math.ceil((last - first) / 5))]
        labels, limits = [format_bytes(tick).replace(".0 ", " ") for tick in ticks], (2.0**first / 1.1, 2.0**last * 1.1)
    else:
        unit = 1024 ** int(math.log(high, 1024))
        counts = MaxNLocator(5, integer=unit == 1).tick_values(0, 1.1 * high / unit)
        ticks, name = [count * unit for count in counts], format_bytes(unit).split()[1]
        labels, limits = [f"{count:g} {name}" for count in counts], (0, ticks[-1])
    axis.set_ticks(ticks, labels)
    axis.axes.minorticks_off()
    _limit(axis, *limits)


def _limit(axis: Axis, low: float, high: float) -> None:
    (axis.axes.set_xlim if axis.axis_name == "x" else axis.axes.set_ylim)(low, high)
