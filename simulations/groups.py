"""Clients of a run in groups: what became of them on their devices, and why some failed.

A run of a thousand clients has few kinds of them. A report shows the kinds, with how many clients are of each.
"""

from __future__ import annotations

from collections.abc import Iterable

import pandas as pd

from ..server.records import Run
from ..server.rows import OVER_BUDGET
from .population import AS_ASKED
from .refusal import listed
from .summary import numbers


def by_device(run: Run) -> pd.DataFrame:
    """Return a row for each way in which clients of a device train, or do not; none without devices.

    A client counts in every way it ever trained, with all its rounds: a client that fails now and then counts twice.

    Returns:
        device, budget_bytes, how (in words), clients, peak_bytes (the largest), share (of the budget), audited (client
        rounds), simulated_seconds (median of the rounds), accuracy_after (mean over clients, each in its last round).
        Devices with the least memory come first; on each, the ways that need most, and who does not train last.
    """
    rows = run.clients[run.clients["device"].notna()]
    if not len(rows):
        return pd.DataFrame()
    rows = rows.assign(how=[_how(*words) for words in zip(rows["status"], rows["fit"], rows["reason"], strict=True)])
    found = []
    for (device, budget, how), group in rows.groupby(["device", "budget_bytes", "how"]):
        last = group.sort_values("round").drop_duplicates("client", keep="last")
        peak = numbers(group, "peak_bytes").max()
        found.append({
            "device": device, "budget_bytes": budget, "how": how, "clients": len(last),
            "peak_bytes": peak, "share": peak / budget,
            "audited": numbers(group, "audited").sum(),
            "simulated_seconds": numbers(group, "simulated_seconds").median(),
            "accuracy_after": numbers(last, "accuracy_after").mean(),
        })  # fmt: skip
    return pd.DataFrame(found).sort_values(
        ["budget_bytes", "device", "peak_bytes", "clients"], ascending=[True, True, False, False]
    )


def by_reason(run: Run) -> pd.DataFrame:
    """Return a row for each reason why admitted clients gave no update: how often, in which rounds, which clients.

    Returns:
        status, reason, device, rounds and clients (in words), count (client rounds); the most frequent first.
    """
    rows = run.clients[~run.clients["status"].isin(["ok", OVER_BUDGET])]
    found = [
        {
            "status": status, "device": device, "reason": reason, "count": len(group),
            "rounds": _listed(group["round"]), "clients": _listed(group["client"]),
        }
        for (status, device, reason), group in rows.groupby(["status", "device", "reason"], dropna=False)
    ]  # fmt: skip
    return pd.DataFrame(found).sort_values("count", ascending=False, kind="stable") if found else pd.DataFrame()


def _how(status: str, fit: str | None, reason: str | None) -> str:
    if status == "ok":
        return "admitted as asked" if fit == AS_ASKED else f"adapted: {fit}"
    return f"refused: {reason}" if status == OVER_BUDGET else status


def _listed(items: Iterable[int]) -> str:
    return listed(str(item) for item in sorted(set(items)))
