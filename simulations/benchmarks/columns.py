"""How the rows of every part are shown: which columns its table has, and what its picture draws as bars."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ..formats import format_bytes, format_flops, format_integer, format_number, format_seconds, format_text, is_missing


class Column(NamedTuple):
    """A column of a table."""

    key: str
    heading: str
    write: Callable[[Any], str] = format_text


class Look(NamedTuple):
    """How a part is shown.

    Attributes:
        title: of the table.
        columns: of the table; a column that no row has is left out.
        bars: (key of a panel, key of a bar's name, key of its length, what the length is) of the picture.
    """

    title: str
    columns: tuple[Column, ...]
    bars: tuple[str, str, str, str]


def times(x: float | None) -> str:
    """Return a ratio: `1.24 ×`."""
    return "–" if is_missing(x) else f"{x:.2f} ×"


def pace(x: float | None) -> str:
    """Return so many a second, with three digits at least."""
    return "–" if is_missing(x) else f"{x:,.0f}" if x >= 1000 else f"{x:.3g}"


def flops_per_second(x: float | None) -> str:
    """Return a speed: `12.3 GFLOP/s`."""
    return f"{format_flops(x)}/s"


RUNNERS = (
    Column("model", "model"),
    Column("runner", "runner"),
    Column("rounds_per_s", "rounds/s", pace),
    Column("of_plain", "pace of plain", times),
    Column("start_s", "start-up", format_seconds),
    Column("reason", ""),
)
LOOKS: Mapping[str, Look] = {
    "engines": Look("Rounds a second: hand-written loops, and our whole stack", RUNNERS,
                    ("model", "runner", "rounds_per_s", "rounds/s")),
    "overhead": Look(
        "What engines cost: their time over a bare loop's",
        (
            Column("model", "model"),
            Column("runner", "runner"),
            Column("floor", "bare loop"),
            Column("time_of_floor", "time of it", times),
            Column("added_ms_a_client", "ms/client", format_number),
            Column("time_of_plain", "time of plain", times),
            Column("time_of_hand", "time of by hand", times),
        ),
        ("model", "runner", "time_of_floor", "time over the bare loop's"),
    ),
    "scaling": Look(
        "Clients that exist, clients of a round: seconds and resident memory",
        (
            Column("what", "grows"),
            Column("clients", "clients", format_integer),
            Column("clients_per_round", "a round", format_integer),
            Column("start_s", "start", format_seconds),
            Column("round_s", "round", format_seconds),
            Column("client_ms", "ms/client", format_number),
            Column("peak_resident_bytes", "resident", format_bytes),
            Column("above_start_bytes", "grown", format_bytes),
            Column("above_start_models", "models", format_number),
        ),
        ("what", "size", "peak_resident_mib", "MiB resident at most"),
    ),
    "flops": Look(
        "Planned FLOPs a second of a rule's step, beside a matrix product's",
        (
            Column("network", "network"),
            Column("rule", "step"),
            Column("flops", "planned", format_flops),
            Column("step_ms", "ms", format_number),
            Column("flops_per_s", "achieved", flops_per_second),
            Column("of_product", "of product", times),
        ),
        ("network", "rule", "of_product", "of a matrix product's FLOP/s"),
    ),
    "probes": Look(
        "Directions of one step, one after another and several abreast",
        (
            Column("network", "network"),
            Column("rule", "rule"),
            Column("abreast", "abreast", format_integer),
            Column("direction_ms", "ms/direction", format_number),
            Column("pace_of_alone", "pace of one by one", times),
            Column("peak_bytes", "peak", format_bytes),
        ),
        ("network", "rule", "pace_of_alone", "pace of one by one"),
    ),
    "compile": Look(
        "A rule's step compiled by torch.compile, beside the step as it is",
        (
            Column("model", "model"),
            Column("rule", "rule"),
            Column("compile_s", "compiling", format_seconds),
            Column("eager_ms", "as it is, ms", format_number),
            Column("compiled_ms", "compiled, ms", format_number),
            Column("time_of_eager", "time of it", times),
            Column("pays_after_rounds", "pays after rounds", format_integer),
            Column("reason", ""),
        ),
        ("model", "rule", "time_of_eager", "time over the step's as it is"),
    ),
    "metering": Look(
        "Client rounds with a plan and with an audit, over the same without",
        (
            Column("rule", "rule"),
            Column("model", "model"),
            Column("planned", "planned", times),
            Column("audited", "audited", times),
            Column("first_plan_ms", "first plan, ms", format_number),
            Column("bare_ms", "bare round, ms", format_number),
        ),
        ("model", "rule", "audited", "time of an audited round over a bare one's"),
    ),
    "rules": Look(
        "Clients a second of every rule on every engine",
        (
            Column("rule", "rule"),
            Column("hidden", "hidden"),
            Column("inline", "inline", pace),
            Column("cohort", "cohort", pace),
            Column("cohort(2)", "cohort(2)", pace),
            Column("pool(2)", "pool(2)", pace),
            Column("fastest", "fastest"),
            Column("auto", "auto"),
            Column("auto_of_fastest", "reaches", times),
            Column("of_fastest_rule", "of best rule", times),
            Column("reason", ""),
        ),
        ("", "rule", "best", "clients/s on the fastest engine"),
    ),
    "flower": Look("The same workload on Flower's Ray simulation", RUNNERS,
                   ("model", "runner", "rounds_per_s", "rounds/s")),
    "peers": Look("The same workload on other simulators", RUNNERS, ("model", "runner", "rounds_per_s", "rounds/s")),
}  # fmt: skip
