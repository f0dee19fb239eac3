"""The picture of a plan: the bytes that are alive as a training step goes on, a panel a rule over plain backprop."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from textwrap import fill

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ...client.budget import Device
from ...client.plan import MemoryPlan
from ..axes import byte_axis, plain, share_axis, styled
from ..formats import format_bytes
from ..summary import COLOURS
from .rows import Outlook

ACROSS = 3  # panels in a row
TALLEST = 1.5  # a budget above so many times the largest peak is told in words: it would flatten every line


def draw_plan(outlook: Outlook) -> bytes:
    """Return the picture as PNG; the plans must hold their timelines."""
    planned = [row for row in outlook.rows[1:] if row.plan]
    highest = max([outlook.inference, outlook.naive.peak, *(row.plan.peak for row in planned)])
    shown = [device for device in outlook.fleet if device.budget <= TALLEST * highest]
    columns = max(min(len(planned), ACROSS), 1)
    rows = max(math.ceil(len(planned) / columns), 1)
    figure = Figure(figsize=(6, 1 + (1.45 if rows > 1 else 2.6) * rows), dpi=150, layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for i, axes in enumerate(panels.flat):
        styled(axes, "", "").tick_params(labelsize=9)
        axes.plot(*_alive(outlook.naive), drawstyle="steps-post", color="#bbbbbb", lw=1.2)
        axes.axhline(outlook.inference, ls="--", lw=1.1, color="black")
        for device in shown:
            axes.axhline(device.budget, ls=":", lw=1.2, color="#666666")
        if i < len(planned):
            _line(axes, planned[i].plan, COLOURS[i % len(COLOURS)])
            axes.set_title(plain(planned[i].name), fontsize=9.5)
        elif planned:
            axes.set_visible(False)
            panels[rows - 2, i % columns].tick_params(labelbottom=True)
    byte_axis(panels[0, 0].yaxis, 0, max([highest, *(device.budget for device in shown)]))
    panels[0, 0].set_xlim(0, 1)
    panels[0, 0].set_xticks([0, 0.5, 1])
    share_axis(panels[0, 0].xaxis)
    figure.supylabel("bytes of live tensors", fontsize=10)
    figure.supxlabel(_caption(outlook, shown), fontsize=8.5)
    png = io.BytesIO()
    figure.savefig(png, format="png")
    return png.getvalue()


def _line(axes: Axes, plan: MemoryPlan, colour: str) -> None:
    x, alive = _alive(plan)
    axes.plot(x, alive, drawstyle="steps-post", color=colour, lw=1.4)
    axes.fill_between(x, alive, step="post", color=colour, alpha=0.15, lw=0)


def _alive(plan: MemoryPlan) -> tuple[list[float], list[int]]:
    """Return how far a step is after each operation, 0 to 1, and the bytes alive then."""
    # Fake tensors are asked for their device; a step on real ones has no such operation.
    alive = [live for op, live in plan.timeline if not op.startswith("prim")]
    return [i / max(len(alive) - 1, 1) for i in range(len(alive))], alive


def _caption(outlook: Outlook, shown: Sequence[Device]) -> str:
    shape = "×".join(map(str, outlook.shape))
    budgets = {
        "Dotted": shown,
        "Higher up": [device for device in outlook.fleet if device not in shown],
    }
    text = (
        f"progress through the operations of a step: {outlook.model} on {shape}, {outlook.classes} classes,"
        f" a batch of {outlook.batch}, as planned. Grey: plain backprop. Dashed: the peak of inference."
    )
    for where, devices in budgets.items():
        told = ", ".join(f"{device.name} ({format_bytes(device.budget)})" for device in devices)
        text += f" {where}: {told}." if told else ""
    text += (
        " Of a rule's random directions, and of a batch's equal parts, two are planned; the others repeat the second."
    )
    return fill(plain(text), 96)
