"""Numbers as a human reads them; `–` stands for what was not measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

NOTHING = "–"


def is_missing(x: Any) -> bool:
    """Say whether `x` is None or NaN, the two ways in which a table holds nothing."""
    return x is None or x != x


def format_bytes(n: float | None) -> str:
    """Return `n` bytes: `312 B`, `1.5 MiB`."""
    return _scaled(n, 1024, ("B", "KiB", "MiB", "GiB", "TiB", "PiB"))


def format_flops(n: float | None) -> str:
    """Return `n` floating-point operations: `1.5 GFLOP`."""
    return _scaled(n, 1000, ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP", "EFLOP"))


def format_percent(x: float | None) -> str:
    """Return the share `x`: `97.3 %`."""
    return NOTHING if is_missing(x) else f"{100 * x:.1f} %"


def format_seconds(t: float | None) -> str:
    """Return `t` seconds: `0.25 s`, `3 min 20 s`, `1 h 5 min`."""
    if is_missing(t):
        return NOTHING
    if t < 60:
        return f"{t:.3g} s" if t < 10 else f"{t:.1f} s"
    minutes, seconds = divmod(round(t), 60)
    return f"{minutes} min {seconds} s" if minutes < 60 else f"{minutes // 60:,} h {minutes % 60} min"


def format_integer(n: float | None) -> str:
    """Return a count; tables hold it as a float where some rows hold none."""
    return NOTHING if is_missing(n) else f"{int(n)}"


def format_number(x: float | None) -> str:
    """Return a loss or a rate with four digits."""
    return NOTHING if is_missing(x) else f"{x:.4g}"


def format_text(x: Any) -> str:
    """Return words as they are."""
    return NOTHING if is_missing(x) else str(x)


def _scaled(n: float | None, base: int, units: Sequence[str]) -> str:
    if is_missing(n):
        return NOTHING
    power = 0
    while round(n, min(power, 1)) >= base and power < len(units) - 1:
        n, power = n / base, power + 1
    return f"{n:,.1f} {units[power]}" if power else f"{n:.0f} {units[0]}"
