"""What an engine costs beside the bare arithmetic: its time over a hand-written loop's, in the turns of one run.

Every engine has a loop to answer for: `inline` and `pool(1)` the rule's own step and nothing else, those with two
workers the two hand-written ones, `cohort` a round's clients in hand-written batched products or, where there are none,
in PyTorch's own batching. Below 1 our side is the faster one.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from . import bare, engines
from .settings import Row, Settings, ratio

FLOORS = {
    "inline": ("{rule} alone",), "pool(1)": ("{rule} alone",), "pool(2)": ("two workers",),
    "cohort": ("bmm", "vmap"), "cohort(2)": ("two workers",),
}  # fmt: skip
BY_HAND = ("by hand", "cpu aware")


def measure(settings: Settings, engine_rows: Sequence[Row] = ()) -> list[Row]:
    """Return a row for each engine of each model, of figures that are there already or are measured now."""
    return [row for model in engines.RULES for row in _rows(model, engine_rows or engines.measure(settings))]


def _rows(model: str, engine_rows: Sequence[Row]) -> list[Row]:
    paces = {row["runner"]: row["each"] for row in engine_rows if row["model"] == model}
    rows = []
    for rule in engines.RULES[model]:
        for engine, floors in FLOORS.items():
            ours = paces.get(f"{rule} {engine}")
            floor = next((known for name in floors if (known := name.format(rule=rule)) in paces), None)
            if ours and floor:
                rows.append({"model": model, "runner": f"{rule} {engine}", **_beside(floor, ours, paces)})
    return rows


def _beside(floor: str, ours: list[float], paces: Mapping[str, list[float]]) -> Row:
    """Return what a pace costs beside its floor and beside the plain loop."""
    added = (1 / pace - 1 / bound for pace, bound in zip(ours, paces[floor], strict=True))
    return {
        "floor": floor,
        "time_of_floor": ratio(paces[floor], ours),
        "time_of_plain": ratio(paces[engines.PLAIN], ours),
        "time_of_hand": next((ratio(paces[name], ours) for name in BY_HAND if name in paces), None),
        "added_ms_a_client": 1000 * statistics.median(added) / bare.SAMPLED,
    }
