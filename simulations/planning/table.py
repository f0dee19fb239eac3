"""What a plan looks like in a terminal: a row a rule, in tables that fit its width."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from textwrap import wrap

from ..formats import NOTHING, format_bytes, format_flops
from .rooms import MOST, Room
from .rows import INFERENCE, Outlook, Row

GAPS = ("  ", " ")  # between columns; the narrow one where the wide one does not fit
WIDEST = 120  # a line of text that is still read with ease
KEPT = ("state", "optimizer", "gradients")

# heading, value of a row
Column = tuple[str, Callable[[Row], str]]


def plan_text(outlook: Outlook, width: int) -> str:
    """Return the plan's tables and what their words mean, in lines of at most `width` characters."""
    shape = "×".join(map(str, outlook.shape))
    title = (
        f"{outlook.model} on {outlook.data} ({shape}, {outlook.classes} classes): {outlook.parameters:,} parameters,"
        f" batches of {outlook.batch}"
    )
    lines = [
        *wrap(title, width),
        "",
        *_table(outlook.rows, _memory(outlook, each=True), width, or_else=_memory(outlook, each=False)),
        "",
        *_table(outlook.rows, _costs(outlook), width),
    ]
    if outlook.fleet:
        lines += ["", f"largest batch in one piece{_besides(outlook)}", *_table(outlook.rows, _rooms(outlook), width)]
    return "\n".join([*(_clipped(line, width) for line in lines), "", *wrap(_meaning(outlook), min(width, WIDEST))])


def _memory(outlook: Outlook, each: bool) -> list[Column]:
    """Return the columns of the peak, with each of its parts or with those that a rule keeps as one."""
    part = lambda *names: lambda row: _short(sum(row.plan.parts[name] for name in names))  # noqa: E731
    kept = (
        [(heading, part(name)) for heading, name in zip(("state", "optim.", "grads"), KEPT, strict=True)]
        if each
        else [("kept", part(*KEPT))]
    )
    return [
        ("peak", lambda row: format_bytes(row.plan.peak)),
        ("× inf.", lambda row: _times(row.plan.peak / outlook.inference)),
        ("× BP", lambda row: _times(row.plan.peak / outlook.naive.peak)),
        ("params", part("parameters")),
        *kept,
        ("batch", part("batch")),
        ("activ.", part("activations")),
    ]


def _times(ratio: float) -> str:
    """Return a ratio with two decimals, or from 10 on with as many as leave it three digits."""
    return f"{ratio:.2f}" if ratio < 9.995 else f"{ratio:.1f}" if ratio < 99.95 else f"{ratio:.0f}"


def _costs(outlook: Outlook) -> list[Column]:
    """Return the columns of arithmetic and traffic, and the smallest device that a step fits."""
    sent = lambda n: format_bytes(n) if n else NOTHING  # noqa: E731
    return [
        ("FLOP/sample", lambda row: format_flops(row.plan.flops / outlook.batch)),
        ("down", lambda row: sent(row.plan.bytes_down)),
        ("up", lambda row: sent(row.plan.bytes_up)),
        ("fits from", lambda row: row.fits[0] if row.fits else NOTHING),
    ]


def _rooms(outlook: Outlook) -> list[Column]:
    """Return a column a device, of the largest batch there."""
    cell = lambda i: lambda row: _room(row.rooms[i])  # noqa: E731
    return [(device.name, cell(i)) for i, device in enumerate(outlook.fleet)]


def _room(room: Room) -> str:
    size = f"{room.largest:,}" + "+" * (room.largest == MOST)
    return (size if room.largest else NOTHING) + "*" * room.in_parts


def _besides(outlook: Outlook) -> str:
    split = any(room.in_parts for row in outlook.rows for room in row.rooms)
    return f" (*: a batch of {outlook.batch} fits in parts)" if split else ""


def _meaning(outlook: Outlook) -> str:
    """Return what the words of the tables mean."""
    devices = "device of the fleet" if outlook.fleet else "built-in device"
    return (
        "peak: bytes of all live tensors at a step's most demanding operation; ×\u00a0inf., ×\u00a0BP: relative to"
        f" {INFERENCE} (one pass of the plain network) and to plain backprop. Its parts: parameters, what a rule keeps"
        " (its state, optimizer memory, sums of gradients), the batch, and all that the step makes itself. FLOP: of"
        " matrix products and convolutions. down, up: payload of a client's round of one step."
        f" fits from: the smallest {devices} that holds the peak of the whole batch."
    )


def _table(rows: Sequence[Row], columns: list[Column], width: int, or_else: list[Column] | None = None) -> list[str]:
    """Return the lines of a table that fits `width`, with fewer columns if need be; a rule that cannot train says why.

    Names are cut short where even then there is no room.
    """
    cells = [[heading, *(value(row) for row in rows if row.plan)] for heading, value in columns]
    widths = [max(map(len, column)) for column in cells]
    taken = {gap: sum(widths) + len(widths) * len(gap) for gap in GAPS}
    longest = max(len(row.name) for row in rows)
    gap = next((gap for gap in GAPS if longest + taken[gap] <= width), GAPS[-1])
    if or_else and gap != GAPS[0]:
        return _table(rows, or_else, width)
    name = max(min(longest, width - taken[gap]), 8)
    lines = iter(gap.join(map(str.rjust, line, widths)) for line in zip(*cells, strict=True))
    table = [" " * name + gap + next(lines)]
    for row in rows:
        told = next(lines) if row.plan else row.reason.partition(":")[0].removeprefix(f"{row.name} ")
        table.append(_clipped(row.name, name).ljust(name) + gap + told)
    return table


def _short(n: int) -> str:
    """Return bytes with the first letter of their unit: `1.5 M` for MiB."""
    return format_bytes(n).removesuffix("iB") if n else NOTHING


def _clipped(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"
