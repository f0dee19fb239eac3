"""The pictures of memory: who used how much, against which budget, and what it was made of."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from ..client.memory import PARTS
from ..server.rows import OVER_BUDGET
from .axes import byte_axis, count_axis, plain, share_axis
from .formats import format_bytes
from .population import AS_ASKED
from .summary import Shown, numbers, peaks_of_clients

COLOURS_OF_PARTS = dict(zip(PARTS, ("#0072B2", "#CC79A7", "#E69F00", "#56B4E9", "#009E73", "#D55E00"), strict=True))
MOST_BARS = 10


def memory_by_client(axes: Axes, shown: Sequence[Shown]) -> tuple[set[str], str]:
    """Draw a mark a client: its most bytes."""
    peaks_of = {each.name: np.sort(peaks.to_numpy()) for each in shown if len(peaks := peaks_of_clients(each.run))}
    alike = len({len(peaks) for peaks in peaks_of.values()}) == 1  # else ranks are compared as shares
    for each in shown:
        if each.name in peaks_of:
            peaks = peaks_of[each.name]
            x = np.arange(1, len(peaks) + 1) if alike else (np.arange(len(peaks)) + 0.5) / len(peaks)
            label = plain(each.told(_spread(peaks), len(shown) > 1))
            axes.plot(x, peaks, each.marker, color=each.colour, ms=_size(len(peaks)), label=label)
    if peaks_of:
        low, high = min(peaks[0] for peaks in peaks_of.values()), max(peaks[-1] for peaks in peaks_of.values())
        _scale(axes, low, high)
        if alike:
            count_axis(axes.xaxis)
        else:
            axes.set_xlim(-0.02, 1.02)
            share_axis(axes.xaxis)
    caption = "One mark a client: the most bytes that one of its training steps held, over all its rounds. "
    return set(peaks_of), caption + "Clients that reported no peak (refused, or failed in all rounds) are left out."


def memory_by_device(axes: Axes, shown: Sequence[Shown]) -> tuple[set[str], str]:
    """Draw the budget of every device, and under it the clients that train there."""
    rows = {each.name: each.run.clients[each.run.clients["device"].notna()] for each in shown}
    rows = {name: frame for name, frame in rows.items() if len(frame)}
    if not rows:
        return set(), ""
    together = pd.concat(rows.values())
    devices = list(together.groupby(["budget_bytes", "device"]).groups)  # the least memory first
    budgets = [budget for budget, _ in devices]
    for each in shown:
        if each.name in rows:
            place = 0.5 if len(rows) == 1 else (list(rows).index(each.name) + 0.5) / len(rows)
            _clients_by_device(axes, each, rows[each.name], devices, place, len(rows))
    axes.hlines(budgets, np.arange(len(devices)) - 0.4, np.arange(len(devices)) + 0.4, color="#1c2733", lw=2)
    _scale(axes, min([*budgets, *numbers(together, "peak_bytes").dropna()]), max(budgets))
    axes.set_xlim(-0.6, len(devices) - 0.4)
    names = [plain(name) for _, name in devices]
    if len(rows) == 1:
        told = [_admitted(together[together["device"] == name]) for _, name in devices]
        names = [f"{name}\n{words}" for name, words in zip(names, told, strict=True)]
    axes.set_xticks(range(len(devices)), names, rotation=0 if len(devices) <= 5 else 30)
    return set(rows), "A line is the budget of a device, a mark a client that trains there: the most bytes it needed."


def parts_of_peaks(axes: Axes, shown: Sequence[Shown]) -> tuple[set[str], str]:
    """Draw a bar for each way in which clients train: what the largest peak of it is made of."""
    bars: dict[str, pd.Series] = {}
    drawn = set()
    for each in shown:
        ok = each.run.clients[(each.run.clients["status"] == "ok") & each.run.clients["parameters_bytes"].notna()]
        ways = pd.Series([_way(*words) for words in zip(ok["rule"], ok["fit"], strict=True)], ok.index, dtype=str)
        for way in ways.value_counts().index[:MOST_BARS]:
            group = ok[ways == way]
            label = "\n".join(map(plain, each.told(way, len(shown) > 1).splitlines()))
            bars[label] = group.loc[group["peak_bytes"].idxmax()]
            drawn.add(each.name)
    bars = dict(sorted(bars.items(), key=lambda bar: bar[1]["peak_bytes"])[-MOST_BARS:])
    ends = np.zeros(len(bars))
    for part in PARTS:
        widths = np.array([row[f"{part}_bytes"] for row in bars.values()], dtype=float)
        if widths.any():
            label = "activations, temporaries" if part == "activations" else part
            axes.barh(list(bars), widths, 0.62, left=ends, color=COLOURS_OF_PARTS[part], label=label)
            ends += widths
    if drawn:
        byte_axis(axes.xaxis, 0, ends.max())
        axes.grid(visible=False, axis="y")
    caption = "Of every way in which clients train, the most demanding step of all: what is alive at its peak. "
    return drawn, caption + "All but the last part is there before the step; what the step makes itself is the last."


def _clients_by_device(
    axes: Axes, each: Shown, rows: pd.DataFrame, devices: list[tuple[int, str]], place: float, runs: int
) -> None:
    peaks = numbers(rows, "peak_bytes").groupby([rows["budget_bytes"], rows["device"], rows["client"]]).max().dropna()
    peaks_of = {device: group.sort_values() for device, group in peaks.groupby(level=[0, 1])}
    label = plain(each.short) if runs > 1 else None
    for device, here in peaks_of.items():
        spread = (np.arange(len(here)) + 0.5) / len(here) - 0.5
        x = devices.index(device) - 0.4 + 0.8 * (place + 0.9 * spread / runs)
        axes.plot(x, here, each.marker, color=each.colour, ms=_size(len(here)), label=label)
        label = None


def _way(rule: str, fit: str | None) -> str:
    """Return in few words how a client trained: its rule, and what it changed besides."""
    changes = "" if fit is None or fit == AS_ASKED else fit.removeprefix(f"rule {rule}").removeprefix(", ")
    return f"{rule}\n{changes}" if changes else rule


def _admitted(rows: pd.DataFrame) -> str:
    """Say how many of a device's clients train."""
    clients, refused = rows["client"].nunique(), rows[rows["status"] == OVER_BUDGET]["client"].nunique()
    return f"{refused} of {clients} refused" if refused else f"{clients} client{'s' * (clients > 1)}"


def _spread(peaks: np.ndarray) -> str:
    """Say between which bytes sorted peaks lie."""
    low, high = format_bytes(peaks[0]), format_bytes(peaks[-1])
    if peaks[0] != peaks[-1]:
        return f"{low} to {high}"
    return f"all {len(peaks)} clients {high}" if len(peaks) > 1 else f"1 client {high}"


def _scale(axes: Axes, low: float, high: float) -> None:
    """Choose a logarithmic axis where a linear one would hide the small."""
    if high > 20 * max(low, 1):
        axes.set_yscale("log", base=2)
    byte_axis(axes.yaxis, low, high)


def _size(count: int) -> float:
    return 5.5 if count <= 30 else 3.5 if count <= 300 else 2.2
