"""A run, or several runs over one another, as one page: `report.html` with its pictures inside it.

The page works offline and can be mailed: pictures are embedded, nothing is loaded from elsewhere. The same pictures lie
beside it as PNG files.
"""

from __future__ import annotations

import base64
import hashlib
import json
import shlex
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from ..server.records import EXPERIMENT, write_atomically
from .formats import (
    NOTHING,
    format_bytes,
    format_flops,
    format_integer,
    format_number,
    format_percent,
    format_seconds,
)
from .groups import by_device, by_reason
from .pictures import PICTURES, draw
from .style import STYLE
from .summary import Shown, summarise, times_of_rounds
from .tables import CLIENTS, DEVICES, FAILURES, ROUNDS, table

__all__ = ["format_bytes", "format_percent", "summarise", "write_report"]


def write_report(folders: Sequence[Path], output: Path | None = None) -> Path:
    """Write the report of one run, or of several runs over one another, and return the path of its `report.html`.

    Args:
        folders: the folders of the runs.
        output: the folder to write to. Default: the run's own; for several, `report-<a>-vs-<b>` beside the first run.
    """
    if not folders:
        raise ValueError("name at least one run to report")
    shown: list[Shown] = []
    for folder in folders:
        shown.append(Shown.read(Path(folder), len(shown), {each.name for each in shown}))
    output = _place(shown) if output is None else Path(output)
    output.mkdir(parents=True, exist_ok=True)
    figures = [_figure(shown, name, output) for name in PICTURES]
    write_atomically(output / "report.html", _page(shown, figures).encode())
    return output / "report.html"


def _place(shown: list[Shown]) -> Path:
    """Return the folder where a report is expected."""
    first = shown[0].run.folder
    if len(shown) == 1:
        return first
    names = "-vs-".join(each.run.folder.resolve().name for each in shown)
    if len(names) > 100:  # a file name has its limits
        names = f"{names[:88]}-{hashlib.sha256(names.encode()).hexdigest()[:8]}"
    return first.resolve().parent / f"report-{names}"


def _figure(shown: list[Shown], name: str, output: Path) -> str:
    """Write a picture into `output` and return it as HTML, or what is said in its place."""
    title = escape(PICTURES[name].title)
    png, caption = draw(PICTURES[name], shown)
    if png is None:
        (output / f"{name}.png").unlink(missing_ok=True)  # an older one would show what this page denies
        empty = f"<figure><h3>{title}</h3><p class=empty>{escape(caption)}</p></figure>"
        return "" if PICTURES[name].optional else empty
    write_atomically(output / f"{name}.png", png)
    image = f'<img alt="{title}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'
    return f"<figure><h3>{title}</h3>{image}<figcaption>{escape(caption)}</figcaption></figure>"


# ---- the page --------------------------------------------------------------------------------------------------------


def _page(shown: list[Shown], figures: list[str]) -> str:
    title = " vs ".join(each.short for each in shown) if len(shown) > 1 else shown[0].name
    notes = [f"<p class=note>{escape(note)}</p>" for each in shown if (note := each.standing())]
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)} · FedForward</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head><body><main>'
        f"<header><p class=brand>FedForward report</p><h1>{escape(title)}</h1>"
        f"<p class=lead>{escape(_lead(shown))}</p>{''.join(notes)}</header>"
        f"<section><h2>Summary</h2>{_summary_table(shown)}</section>"
        f"{''.join(_devices(each, len(shown) > 1) for each in shown)}"
        f"<section><h2>Pictures</h2><div class=pictures>{''.join(figures)}</div></section>"
        f"{''.join(_details(each, len(shown) > 1) for each in shown)}</main></body></html>\n"
    )


def _lead(shown: list[Shown]) -> str:
    """Describe the experiment in one line; of several runs, say in what they differ."""
    if len(shown) > 1:
        keys = {key: None for each in shown for key in each.experiment if key not in ("name", "set")}
        differ = [key for key in keys if len({str(each.experiment.get(key)) for each in shown}) > 1]
        tables = {json.dumps(each.experiment.get("set", {}), sort_keys=True, default=str) for each in shown}
        differ += ["[set]"] * (len(tables) > 1)
        return f"{len(shown)} runs over one another. They differ in: {', '.join(differ) or 'nothing that is set'}."
    rule, model, data, partition, clients, some, rounds, strategy, engine, seed = map(shown[0].setting, LEAD)
    line = f"Rule {rule} trains model {model} on data {data}, partition {partition}: {clients} clients, {some} of them "
    line += f"a round, {rounds} rounds, strategy {strategy}, engine {engine}, seed {seed}."
    fleet, rules = shown[0].experiment.get("fleet"), ", then rule" * (shown[0].experiment.get("adapt") == "rule")
    return line + (
        f" Fleet {fleet}; to fit, clients change slices of directions, parts of a batch{rules}." * bool(fleet)
    )


LEAD = ("rule", "model", "data", "partition", "clients", "clients-per-round", "rounds", "strategy", "engine", "seed")


def _summary_table(shown: list[Shown]) -> str:
    rows = [f"<tr><th></th>{''.join(f'<th class=n>{each.heading()}</th>' for each in shown)}</tr>"]
    more = tuple(row for key, *row in IF_ANY if any(each.summary[key] for each in shown))
    for label, meaning, write in SUMMARY[:-1] + more + SUMMARY[-1:]:
        cells = "".join(f"<td class=n>{escape(write(each))}</td>" for each in shown)
        rows.append(f"<tr><th scope=row>{label} <small>{escape(meaning)}</small></th>{cells}</tr>")
    return f"<div class='scroll fit'><table class=summary>{''.join(rows)}</table></div>"


def _said(*keys: str) -> Callable[[Shown], str]:
    return lambda each: " / ".join(each.setting(key) for key in keys)


def _measured(write: Callable[[Any], str], *keys: str) -> Callable[[Shown], str]:
    return lambda each: " / ".join(write(each.summary[key]) for key in keys)


SUMMARY = (  # label, meaning, what writes the value
    ("Rule", "how a client learns", _said("rule")),
    ("Data", "data set", _said("data")),
    ("Model", "the network that is trained", _said("model")),
    ("Partition", "how data is spread over clients", _said("partition")),
    ("Clients", "that exist / in a round", _said("clients", "clients-per-round")),
    (
        "Rounds",
        "committed / planned",
        lambda each: f"{format_integer(each.summary['rounds'])} / {each.setting('rounds')}",
    ),
    ("Accuracy", "server's test set, last evaluated round", _measured(format_percent, "accuracy")),
    ("Loss", "server's test set, same round", _measured(format_number, "loss")),
    ("Client accuracy", "own held-out data, weighted by samples", _measured(format_percent, "client_accuracy")),
    (
        "Peak memory",
        "training step; median / max of clients",
        _measured(format_bytes, "peak_bytes_median", "peak_bytes_max"),
    ),
    (
        "Bytes per client-round",
        "payload, training; up / down",
        _measured(format_bytes, "bytes_up_client", "bytes_down_client"),
    ),
    ("Bytes in total", "payload, training; up / down", _measured(format_bytes, "bytes_up_total", "bytes_down_total")),
    (
        "Bytes serialised",
        "by Flower, training; up / down",
        _measured(format_bytes, "wire_up_total", "wire_down_total"),
    ),
    (
        "Bytes for evaluation",
        "payload, up and down together, besides",
        _measured(format_bytes, "evaluation_bytes_total"),
    ),
    ("Training compute", "counted operations, all clients", _measured(format_flops, "flops_total")),
    ("Time", "of this machine, all rounds", _measured(format_seconds, "seconds")),
    ("Client-rounds", "that ended ok / that failed", _measured(format_integer, "client_rounds", "failed")),
    ("Model hash", "SHA-256 of the last model, 16 digits", _measured(lambda h: (h or NOTHING)[:16], "model_sha256")),
)


IF_ANY = (  # key of the summary; the row is there if any run has a value of it
    (
        "simulated_seconds",
        "Simulated time",
        "of the devices; a round lasts as long as its slowest",
        _measured(format_seconds, "simulated_seconds"),
    ),
    ("over_budget", "Refused", "client-rounds over the device's budget", _measured(format_integer, "over_budget")),
    ("adapted", "Adapted", "client-rounds that changed how they train", _measured(format_integer, "adapted")),
    (
        "audited",
        "Audited",
        "client-rounds measured / not as planned",
        _measured(format_integer, "audited", "audit_mismatches"),
    ),
)


def _devices(each: Shown, several: bool) -> str:
    """Return what became of the clients on their devices, or nothing for a run without."""
    kinds = by_device(each.run)
    if not len(kinds):
        return ""
    title = f"Devices of {each.heading()}" if several else "Devices"
    note = "A client is admitted by its plan: what a step needs, counted before anything runs."
    return f"<section><h2>{title}</h2><p class=small>{note}</p>{table(kinds, DEVICES)}</section>"


def _details(each: Shown, several: bool) -> str:
    """Return what is folded away of one run: its tables, its experiment and how to run it again."""
    run = each.run
    failures = by_reason(run)
    last = run.clients.drop_duplicates("client", keep="last").sort_values("client")
    rounds = run.rounds.assign(simulated_seconds=run.rounds["round"].map(times_of_rounds(run)))
    path = run.folder / EXPERIMENT
    path = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
    again = shlex.join(["run", path.as_posix(), "--name", f"{run.folder.name}-again"])
    environment = json.loads(run.info.get("environment") or "{}")
    ran = [f"FedForward {run.info.get('version') or '?'}"] + [f"{name} {value}" for name, value in environment.items()]
    ran += [f"{word} {run.info[word]}" for word in ("created", "finished") if run.info.get(word)]
    toml = run.info.get("experiment") or "(not recorded)"
    title = each.heading() if several else "Details"
    parts = [f"<section><h2>{title}</h2>"]
    if len(failures):
        text = f"Failed client-rounds ({each.summary['failed']:,})"
        parts.append(_folded(text, table(failures, FAILURES), opened=len(failures) <= 10))
    parts += [
        _folded(f"Rounds ({len(run.rounds):,})", table(rounds, ROUNDS)),
        _folded(f"Clients, the last round each took part in ({len(last):,})", table(last, CLIENTS)),
        _folded("Experiment", f"<pre>{escape(toml)}</pre>"),
        f"<h3>Run it again</h3><pre>fedforward {escape(again)}</pre>",
        f"<p class=small>{escape(' · '.join(ran))}</p></section>",
    ]
    return "".join(parts)


def _folded(summary: str, content: str, opened: bool = False) -> str:
    return f"<details{' open' * opened}><summary>{escape(summary)}</summary>{content}</details>"
