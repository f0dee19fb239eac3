"""What a message and its reply leave in the run database: columns of a client's row, and their sums over a round."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from flwr.app import Message

from .. import message_bytes, protocol
from ..algorithms import LADDER

Row = dict[str, Any]
OVER_BUDGET, AUDIT_FAILED = "over budget", "audit failed"
STATUS = {protocol.OVER_BUDGET: OVER_BUDGET, protocol.AUDIT_FAILED: AUDIT_FAILED}  # else "failed"


class Sizes:
    """Sizes of messages, measured once for a content that many messages share."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[int, int]] = {}

    def of(self, message: Message) -> tuple[int, int]:
        """Return (payload bytes, wire bytes) of a message's content."""
        content = protocol.sent(message)
        key = id(content)
        if key not in self._known:
            self._known[key] = message_bytes.payload_bytes(content), message_bytes.wire_bytes(content)
        return self._known[key]


def answer_columns(reply: Message | None, rule: str, refused: str | None = None) -> Row:
    """Return the columns that a client's reply fills.

    Args:
        reply: None if there was none in time.
        rule: what it was asked to train with.
        refused: why its answer does not count, if so.
    """
    if reply is None:
        return {"status": "dropped", "reason": "no reply in time", "bytes_up": 0, "wire_up": 0}
    if not reply.has_content():
        status = STATUS.get(reply.error.code, "failed")
        return {"status": status, "reason": _first_line(reply.error.reason), "bytes_up": 0, "wire_up": 0}
    payload, wire = message_bytes.reply_bytes(reply)
    if refused:
        return {"status": "failed", "reason": refused, "bytes_up": payload, "wire_up": wire}
    metrics = protocol.measured(reply)
    micro_batch, abreast, chunk, rank = map(int, metrics["fit"])
    return {
        "status": "ok",
        "rule": LADDER[rank - 1] if rank else rule,
        "micro_batch": micro_batch,
        "abreast": abreast,
        "chunk": chunk,
        "samples": int(metrics[protocol.SAMPLES]),
        "loss": number(metrics["loss"]),
        "train_accuracy": number(metrics["accuracy"]),
        "accuracy_before": number(metrics["accuracy-before"]),
        "accuracy_after": number(metrics["accuracy-after"]),
        **{name: int(metrics[name]) for name in ("steps", "batch", "flops")},
        "peak_bytes": int(metrics["peak-bytes"]),
        "bytes_up": payload,
        "wire_up": wire,
        "seconds": metrics["seconds"],
    }


def totals(clients: list[Row]) -> Row:
    """Return a round's sums over its clients."""
    ok = [row for row in clients if row["status"] == "ok"]
    refused = sum(row["status"] == OVER_BUDGET for row in clients)
    sums = {
        name: sum(row.get(name, 0) for row in clients)
        for name in ("bytes_down", "bytes_up", "wire_down", "wire_up", "flops")
    }
    return {
        "clients": len(ok),
        "over_budget": refused,
        "failed": len(clients) - len(ok) - refused,
        "train_loss": mean(ok, "loss"),
        "train_accuracy": mean(ok, "train_accuracy"),
        **sums,
    }


def mean(rows: Iterable[Row], column: str) -> float | None:
    """Return the mean of a column weighted by samples, over the rows that have it."""
    pairs = [(row["samples"], row[column]) for row in rows if row.get(column) is not None]
    weight = sum(n for n, _ in pairs)
    return sum(n * value for n, value in pairs) / weight if weight else None


def number(value: float) -> float | None:
    """Return a number as the database keeps it: NULL where it is not finite."""
    return float(value) if math.isfinite(value) else None


def _first_line(reason: str) -> str:
    lines = [line.strip() for line in reason.strip().splitlines() if line.strip()]
    return lines[-1] if lines else "no reason given"
