"""The pictures of a report: each draws one question over all runs that can answer it."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from .formats import format_bytes, format_percent
from .summary import Shown, accuracies_of_clients, numbers, peaks_of_clients

# What draws a picture: it draws the runs that have data, and returns the names of those runs and a caption.
Draw = Callable[[Axes, Sequence[Shown]], tuple[set[str], str]]


class Picture(NamedTuple):
    """A picture by name."""

    title: str
    x: str  # label of the axis
    y: str
    draw: Draw


def draw(picture: Picture, shown: Sequence[Shown]) -> tuple[bytes | None, str]:
    """Return a picture of some runs as PNG with its caption, or None with the reason why there is no picture."""
    figure = Figure(figsize=(5.6, 3.8), dpi=132, layout="constrained")
    axes = _axes(figure, picture)
    drawn, caption = picture.draw(axes, shown)
    if not drawn:
        return None, "No data yet: no committed round has measured this."
    without = [each.short for each in shown if each.name not in drawn]
    if handles := axes.get_legend_handles_labels()[0]:  # below the picture, which grows by it: no name covers data
        columns = 2 if max(len(str(handle.get_label())) for handle in handles) <= 26 else 1
        figure.set_figheight(3.8 + 0.2 * math.ceil(len(handles) / columns))
        figure.legend(handles=handles, loc="outside lower center", ncols=columns, fontsize=10, frameon=False)
    png = io.BytesIO()
    figure.savefig(png, format="png")
    return png.getvalue(), caption + (f" No data yet: {', '.join(without)}." if without else "")


def _axes(figure: Figure, picture: Picture) -> Axes:
    axes = figure.add_subplot()
    axes.set_xlabel(picture.x, fontsize=11)
    axes.set_ylabel(picture.y, fontsize=11)
    axes.tick_params(labelsize=10, color="#bbbbbb")
    axes.grid(color="#e6e6e6", lw=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#bbbbbb")
    return axes


# ---- the four pictures ----------------------------------------------------------------------------------------------


def _accuracy_by_round(axes: Axes, shown: Sequence[Shown]) -> tuple[set[str], str]:
    drawn = set()
    for each in shown:
        for column, style in {"accuracy": "-", "client_accuracy": "--"}.items():
            y = numbers(each.run.rounds, column).dropna()
            if len(y):
                label = "server's test set" if column == "accuracy" else "clients' held-out data"
                if len(shown) > 1:
                    label = "" if each.name in drawn else each.short
                _line(axes, each, each.run.rounds["round"][y.index], y, style, label)
                drawn.add(each.name)
    if drawn:
        _counts(axes.xaxis)
        _accuracies(axes.yaxis)
    caption = "Share of samples that the round's global model classifies correctly; round 0 is the initial model. "
    return drawn, caption + "Solid: the server's test set. Dashed: the clients' own held-out data."


def _accuracy_by_bytes(axes: Axes, shown: Sequence[Shown]) -> tuple[set[str], str]:
    drawn, sent = set(), []
    for each in shown:
        rounds = each.run.rounds
        x = (numbers(rounds, "bytes_up").fillna(0) + numbers(rounds, "bytes_down").fillna(0)).cumsum()
        y = numbers(rounds, "accuracy")[x > 0].dropna()
        if len(y):
            _line(axes, each, x[y.index], y, "-", each.short if len(shown) > 1 else "")
            sent += x[y.index].tolist()
            drawn.add(each.name)
    if drawn:
        axes.set_xscale("log", base=2)
        _bytes(axes.xaxis, min(sent), max(sent))
        _accuracies(axes.yaxis)
    caption = "Server's test set, by the payload bytes of all training messages so far (evaluation is not counted). "
    return drawn, caption + "The initial model cost nothing and is not shown."


def _memory_by_client(axes: Axes, shown: Sequence[Shown]) -> tuple[set[str], str]:
    peaks_of = {each.name: np.sort(peaks.to_numpy()) for each in shown if len(peaks := peaks_of_clients(each.run))}
    alike = len({len(peaks) for peaks in peaks_of.values()}) == 1  # else ranks are compared as shares
    for each in shown:
        if each.name in peaks_of:
            peaks = peaks_of[each.name]
            x = np.arange(1, len(peaks) + 1) if alike else (np.arange(len(peaks)) + 0.5) / len(peaks)
            size = 5.5 if len(peaks) <= 30 else 3.5 if len(peaks) <= 300 else 2.2
            axes.plot(x, peaks, each.marker, color=each.colour, ms=size, label=_told(each, shown, _spread(peaks)))
    if peaks_of:
        low, high = min(peaks[0] for peaks in peaks_of.values()), max(peaks[-1] for peaks in peaks_of.values())
        if high > 20 * max(low, 1):
            axes.set_yscale("log", base=2)
        _bytes(axes.yaxis, low, high)
        if alike:
            _counts(axes.xaxis)
        else:
            axes.set_xlim(-0.02, 1.02)
            _shares(axes.xaxis)
    caption = "One mark a client: the most bytes that one of its training steps held, over all its rounds. "
    return set(peaks_of), caption + "Clients that never reported a peak (all their rounds failed) are left out."


def _accuracy_of_clients(axes: Axes, shown: Sequence[Shown]) -> tuple[set[str], str]:
    drawn, sources = set(), {}
    for each in shown:
        values, source = accuracies_of_clients(each.run)
        if len(values):
            sources.setdefault(source, []).append(each.short)
            text = f"{len(values)} client{'s' * (len(values) > 1)}, median {format_percent(float(np.median(values)))}"
            axes.ecdf(values, color=each.colour, lw=1.9, label=_told(each, shown, text))
            drawn.add(each.name)
    if drawn:
        _accuracies(axes.xaxis)
        _shares(axes.yaxis)
        axes.set_ylim(0, 1.03)
    told = [source if len(sources) == 1 else f"{source} ({', '.join(names)})" for source, names in sources.items()]
    return drawn, f"Cumulative distribution over clients; accuracy {'; '.join(told)}."


PICTURES = {  # by file name
    "accuracy": Picture("Accuracy by round", "Round", "Accuracy", _accuracy_by_round),
    "traffic": Picture("Accuracy by bytes sent", "Sent so far, up and down", "Accuracy", _accuracy_by_bytes),
    "memory": Picture(
        "Peak memory of each client", "Clients, sorted", "Peak memory of a training step", _memory_by_client
    ),
    "clients": Picture(
        "Accuracy of the clients", "Accuracy, own held-out data", "Clients at or below", _accuracy_of_clients
    ),
}


# ---- lines and labels -----------------------------------------------------------------------------------------------


def _line(axes: Axes, each: Shown, x: pd.Series, y: pd.Series, style: str, label: str) -> None:
    marker = each.marker if len(x) == 1 or (style == "-" and len(x) <= 40) else ""
    width = 1.9 if style == "-" else 1.1
    axes.plot(x, y, ls=style, lw=width, color=each.colour, marker=marker, ms=4, label=_plain(label) or None)


def _told(each: Shown, shown: Sequence[Shown], text: str) -> str:
    """Return the label of a run: `text`, and of which run where there are several."""
    return _plain(f"{each.short}: {text}" if len(shown) > 1 else text)


def _spread(peaks: np.ndarray) -> str:
    """Say between which bytes sorted peaks lie."""
    low, high = format_bytes(peaks[0]), format_bytes(peaks[-1])
    if peaks[0] != peaks[-1]:
        return f"{low} to {high}"
    return f"all {len(peaks)} clients {high}" if len(peaks) > 1 else f"1 client {high}"


def _plain(label: str) -> str:
    """Return a label free of matplotlib's own notation."""
    label = "".join(c if c.isprintable() else "?" for c in label).replace("$", r"\$")
    return f" {label}" if label.startswith("_") else label


# ---- axes ------------------------------------------------------------------------------------------------------------


def _counts(axis: Axis) -> None:
    axis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def _accuracies(axis: Axis) -> None:
    """Fit a range of accuracies: never narrower than 4 %, never far beyond 0 or 100 %."""
    low, high = axis.get_data_interval()
    room = max(0.02, 0.06 * (high - low))
    _limit(axis, max(low - room, -0.01), min(high + room, 1.01))
    axis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    _shares(axis, decimals=0 if high - low > 0.08 else 1)


def _shares(axis: Axis, decimals: int = 0) -> None:
    axis.set_major_formatter(PercentFormatter(1, decimals=decimals, symbol=" %"))


def _bytes(axis: Axis, low: float, high: float) -> None:
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
