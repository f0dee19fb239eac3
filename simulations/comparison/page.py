"""A comparison as files: compare.html with its picture inside it, compare.png and compare.csv."""

from __future__ import annotations

import base64
from html import escape

import pandas as pd

from ...server.records import write_atomically
from ..formats import format_bytes, format_flops, format_integer, format_percent, format_seconds
from ..style import STYLE
from .picture import CAPTION, draw_comparison
from .rows import Comparison, Row
from .words import COLUMNS, equal_flops, front, headline, marks, notes, settings


def write_files(comparison: Comparison) -> None:
    """Write compare.html, compare.png and compare.csv into the comparison's folder."""
    folder = comparison.folder
    folder.mkdir(parents=True, exist_ok=True)
    png = draw_comparison(comparison.rows)
    if png is not None:
        write_atomically(folder / "compare.png", png)
    write_atomically(folder / "compare.csv", pd.DataFrame(comparison.rows).to_csv(index=False).encode())
    write_atomically(folder / "compare.html", _page(comparison, png).encode())


def _page(comparison: Comparison, png: bytes | None) -> str:
    title = escape(comparison.folder.name)
    below = (*notes(comparison), f"● {front(comparison)}", equal_flops(comparison))
    picture = "<p class=empty>No rule has an accuracy.</p>"
    if png is not None:
        source = f"data:image/png;base64,{base64.b64encode(png).decode()}"
        image = f'<img alt="Accuracy against memory and bytes" src="{source}">'
        picture = f"<figure>{image}<figcaption>{escape(CAPTION)}</figcaption></figure>"
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title} · FedForward</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head><body><main>'
        f"<header><p class=brand>FedForward comparison</p><h1>{title}</h1>"
        f"<p class=lead>{escape(headline(comparison))}. {escape(settings(comparison))}</p></header>"
        f"<section><h2>Rules</h2>{_table(comparison)}"
        f"{''.join(f'<p class=small>{escape(line)}</p>' for line in below)}</section>"
        f"<section><h2>Picture</h2>{picture}</section>"
        f"<section><h2>Details</h2><details><summary>Runs</summary>{_cells(comparison)}</details>"
        f"<details><summary>Common experiment</summary><pre>{escape(comparison.common.to_toml())}</pre></details>"
        f"<h3>Run it again, or go on with it</h3><pre>{escape(comparison.command)}</pre></section>"
        "</main></body></html>\n"
    )


def _table(comparison: Comparison) -> str:
    head = "".join(f"<th class=n>{c.heading} <small>{escape(c.meaning)}</small></th>" for c in COLUMNS)
    marked = marks(comparison)
    rows = "".join(_row(row, marked.get(row["rule"], "")) for row in comparison.rows)
    return f"<div class=scroll><table><tr><th>Rule</th>{head}</tr>{rows}</table></div>"


def _row(row: Row, mark: str) -> str:
    cells = "".join(f"<td class=n>{escape(column.write(row))}</td>" for column in COLUMNS)
    name = f"{'● ' if row['front'] else ''}{escape(row['rule'])}{mark}"
    return f"<tr><th scope=row>{name}</th>{cells}</tr>"


def _cells(comparison: Comparison) -> str:
    """Return the table of single runs, with the reasons of those that are not finished."""
    writes = {
        "accuracy": format_percent, "peak_bytes_max": format_bytes, "bytes_up_total": format_bytes,
        "flops_total": format_flops, "failed": format_integer, "seconds": format_seconds,
    }  # fmt: skip
    headings = ("Accuracy", "Peak memory", "Sent up", "Compute", "Failed", "Time")
    rows = ["<th>Rule</th><th class=n>Seed</th>" + "".join(f"<th class=n>{heading}</th>" for heading in headings)]
    for each in comparison.outcomes:
        for cell in each.cells:
            cells = "".join(f"<td class=n>{escape(write(cell.numbers[key]))}</td>" for key, write in writes.items())
            rows.append(f"<td>{escape(each.rule)}</td><td class=n>{cell.seed}</td>{cells}")
        for seed, reason in each.failures.items():
            rows.append(f"<td>{escape(each.rule)}</td><td class=n>{seed}</td><td colspan=6>{escape(reason)}</td>")
    return f"<div class='scroll tall'><table><tr>{'</tr><tr>'.join(rows)}</tr></table></div>"
