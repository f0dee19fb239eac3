"""The pictures of a report: each draws one question over all runs that can answer it."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .axes import accuracy_axis, byte_axis, count_axis, plain, share_axis, styled
from .formats import format_percent
from .memory_pictures import memory_by_client, memory_by_device, parts_of_peaks
from .summary import Shown, accuracies_of_clients, numbers

# What draws a picture: it draws the runs that have data, and returns the names of those runs and a caption.
Draw = Callable[[Axes, Sequence[Shown]], tuple[set[str], str]]


class Picture(NamedTuple):
    """A picture by name."""

    title: str
    x: str  # label of the axis
    y: str
    draw: Draw
    optional: bool = False  # left out of a report that has nothing to show in it


def draw(picture: Picture, shown: Sequence[Shown]) -> tuple[bytes | None, str]:
    """Return a picture of some runs as PNG with its caption, or None with the reason why there is no picture."""
    figure = Figure(figsize=(5.6, 3.8), dpi=132, layout="constrained")
    axes = styled(figure.add_subplot(), picture.x, picture.y)
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


# ---- accuracy -------------------------------------------------------------------------------------------------------


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
        count_axis(axes.xaxis)
        accuracy_axis(axes.yaxis)
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
        byte_axis(axes.xaxis, min(sent), max(sent))
        accuracy_axis(axes.yaxis)
    caption = "Server's test set, by the payload bytes of all training messages so far (evaluation is not counted). "
    return drawn, caption + "The initial model cost nothing and is not shown."


def _accuracy_of_clients(axes: Axes, shown: Sequence[Shown]) -> tuple[set[str], str]:
    drawn, sources = set(), {}
    for each in shown:
        values, source = accuracies_of_clients(each.run)
        if len(values):
            sources.setdefault(source, []).append(each.short)
            text = f"{len(values)} client{'s' * (len(values) > 1)}, median {format_percent(float(np.median(values)))}"
            axes.ecdf(values, color=each.colour, lw=1.9, label=plain(each.told(text, len(shown) > 1)))
            drawn.add(each.name)
    if drawn:
        accuracy_axis(axes.xaxis)
        share_axis(axes.yaxis)
        axes.set_ylim(0, 1.03)
    told = [source if len(sources) == 1 else f"{source} ({', '.join(names)})" for source, names in sources.items()]
    return drawn, f"Cumulative distribution over clients; accuracy {'; '.join(told)}."


# ---- diagnoses ------------------------------------------------------------------------------------------------------


def _by_block(axes: Axes, shown: Sequence[Shown], column: str) -> set[str]:
    """Draw what was found of each block over the rounds: a line a block, the darker the farther up."""
    drawn = set()
    for each in shown:
        found = each.run.diagnoses.assign(y=numbers(each.run.diagnoses, column)).dropna(subset="y")
        blocks = sorted(found["block"].unique())
        for rank, block in enumerate(blocks):
            of_block = found[found["block"] == block]
            label = each.told(f"block {block}", len(shown) > 1)
            fading = 0.35 + 0.65 * (rank + 1) / len(blocks)
            axes.plot(
                of_block["round"], of_block["y"], color=each.colour, alpha=fading, marker=each.marker, ms=4, lw=1.6,
                label=plain(label),
            )  # fmt: skip
            drawn.add(each.name)
    if drawn:
        count_axis(axes.xaxis)
    return drawn


def _angles(axes: Axes, shown: Sequence[Shown]) -> tuple[set[str], str]:
    axes.axhline(90, color="#999999", lw=0.8, ls=":")
    caption = "Between what one step takes from a block's weights and the true gradient of the rule's own cross-entropy"
    return _by_block(axes, shown, "angle"), f"{caption}, on the server's test set: 0° follows it, 90° is chance."


def _sparsity(axes: Axes, shown: Sequence[Shown]) -> tuple[set[str], str]:
    return _by_block(
        axes, shown, "hoyer"
    ), "Hoyer's measure of a hidden block's activity: 1 is one active unit, 0 all alike."


def _separation(axes: Axes, shown: Sequence[Shown]) -> tuple[set[str], str]:
    caption = "How far the goodness of samples lies above that of their negatives, in standard deviations"
    return _by_block(axes, shown, "separation"), f"{caption}: 0 tells nothing."


PICTURES = {  # by file name
    "accuracy": Picture("Accuracy by round", "Round", "Accuracy", _accuracy_by_round),
    "traffic": Picture("Accuracy by bytes sent", "Sent so far, up and down", "Accuracy", _accuracy_by_bytes),
    "memory": Picture(
        "Peak memory of each client", "Clients, sorted", "Peak memory of a training step", memory_by_client
    ),
    "devices": Picture("Peak memory against the budget", "", "Memory for tensors", memory_by_device, optional=True),
    "parts": Picture("What a peak is made of", "Peak memory of a training step", "", parts_of_peaks),
    "clients": Picture(
        "Accuracy of the clients", "Accuracy, own held-out data", "Clients at or below", _accuracy_of_clients
    ),
    "angles": Picture("Angle with the gradient", "Round", "Degrees", _angles, optional=True),
    "sparsity": Picture("Sparsity of activity", "Round", "Hoyer's measure", _sparsity, optional=True),
    "separation": Picture("Separation of goodness", "Round", "Standard deviations", _separation, optional=True),
}


# ---- lines and labels -----------------------------------------------------------------------------------------------


def _line(axes: Axes, each: Shown, x: pd.Series, y: pd.Series, style: str, label: str) -> None:
    marker = each.marker if len(x) == 1 or (style == "-" and len(x) <= 40) else ""
    width = 1.9 if style == "-" else 1.1
    axes.plot(x, y, ls=style, lw=width, color=each.colour, marker=marker, ms=4, label=plain(label) or None)
