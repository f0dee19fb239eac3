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

import pandas as pd

from ..server.records import EXPERIMENT, write_atomically
from .formats import (
    NOTHING,
    format_bytes,
    format_flops,
    format_integer,
    format_number,
    format_percent,
    format_seconds,
    format_text,
)
from .pictures import PICTURES, draw
from .summary import Shown, summarise

__all__ = ["format_bytes", "format_percent", "summarise", "write_report"]

MOST_ROWS = 2000  # of one table of the page; the database holds the rest


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
        return f"<figure><h3>{title}</h3><p class=empty>{escape(caption)}</p></figure>"
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
    return line + f"a round, {rounds} rounds, strategy {strategy}, engine {engine}, seed {seed}."


LEAD = ("rule", "model", "data", "partition", "clients", "clients-per-round", "rounds", "strategy", "engine", "seed")


def _summary_table(shown: list[Shown]) -> str:
    rows = [f"<tr><th></th>{''.join(f'<th class=n>{each.heading()}</th>' for each in shown)}</tr>"]
    for label, meaning, write in SUMMARY:
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


def _details(each: Shown, several: bool) -> str:
    """Return what is folded away of one run: its tables, its experiment and how to run it again."""
    run = each.run
    failures = run.clients[run.clients.status != "ok"]
    last = run.clients.drop_duplicates("client", keep="last").sort_values("client")
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
        text = f"Failed client-rounds ({len(failures):,})"
        parts.append(_folded(text, _table(failures, FAILURES), opened=len(failures) <= 10))
    parts += [
        _folded(f"Rounds ({len(run.rounds):,})", _table(run.rounds, ROUNDS)),
        _folded(f"Clients, the last round each took part in ({len(last):,})", _table(last, CLIENTS)),
        _folded("Experiment", f"<pre>{escape(toml)}</pre>"),
        f"<h3>Run it again</h3><pre>fedforward {escape(again)}</pre>",
        f"<p class=small>{escape(' · '.join(ran))}</p></section>",
    ]
    return "".join(parts)


def _folded(summary: str, content: str, opened: bool = False) -> str:
    return f"<details{' open' * opened}><summary>{escape(summary)}</summary>{content}</details>"


def _table(frame: pd.DataFrame, columns: Sequence[tuple[str, str, str, Callable[[Any], str]]]) -> str:
    """Return the rows of `frame` as a table; `columns` are (column, heading, meaning, how to write a value)."""
    if not len(frame):
        return "<p class=small>No rows yet.</p>"
    sides = ["" if write is format_text else " class=n" for *_, write in columns]
    head = "".join(
        f'<th{side} title="{escape(meaning)}">{heading}</th>'
        for side, (_, heading, meaning, _) in zip(sides, columns, strict=True)
    )
    rows = []
    for values in frame.tail(MOST_ROWS).to_dict("records"):
        cells = zip(sides, columns, strict=True)
        rows.append("".join(f"<td{side}>{escape(write(values.get(key)))}</td>" for side, (key, _, _, write) in cells))
    left_out = len(frame) - len(rows)
    more = f"<p class=small>{left_out:,} more rows are in run.sqlite.</p>" if left_out > 0 else ""
    return f"{more}<div class='scroll tall'><table><tr>{head}</tr><tr>{'</tr><tr>'.join(rows)}</tr></table></div>"


ROUNDS = (
    ("round", "Round", "0 is the initial model", format_integer),
    ("accuracy", "Accuracy", "of the global model on the server's test set", format_percent),
    ("loss", "Loss", "of the global model on the server's test set", format_number),
    ("client_accuracy", "Client accuracy", "clients' own held-out data, mean weighted by samples", format_percent),
    ("train_loss", "Training loss", "mean over the clients of the round, weighted by samples", format_number),
    ("learning_rate", "Learning rate", "of the round", format_number),
    ("clients", "Ok", "clients that ended ok", format_integer),
    ("failed", "Failed", "clients that failed or dropped out", format_integer),
    ("bytes_up", "Up", "payload bytes of training, all clients", format_bytes),
    ("bytes_down", "Down", "payload bytes of training, all clients", format_bytes),
    ("flops", "Compute", "floating-point operations, all clients", format_flops),
    ("seconds", "Time", "of this machine", format_seconds),
)
CLIENTS = (
    ("client", "Client", "its partition of the data", format_integer),
    ("round", "Round", "the last one it took part in", format_integer),
    ("rule", "Rule", "how it learnt", format_text),
    ("status", "Status", "ok, failed or dropped", format_text),
    ("samples", "Samples", "of its training data", format_integer),
    ("steps", "Steps", "minibatches learnt from", format_integer),
    ("batch", "Batch", "samples of a minibatch", format_integer),
    ("loss", "Loss", "training loss", format_number),
    ("accuracy_before", "Before", "accuracy on its own held-out data before training", format_percent),
    ("accuracy_after", "After", "accuracy on its own held-out data after training", format_percent),
    ("peak_bytes", "Peak", "memory: most bytes of a training step of that round", format_bytes),
    ("base_bytes", "Base", "memory held before the step: parameters, state and batch", format_bytes),
    ("bytes_up", "Up", "payload bytes", format_bytes),
    ("bytes_down", "Down", "payload bytes", format_bytes),
    ("flops", "Compute", "floating-point operations", format_flops),
    ("seconds", "Time", "of this machine", format_seconds),
)
FAILURES = (
    ("round", "Round", "in which it failed", format_integer),
    ("client", "Client", "its partition of the data", format_integer),
    ("rule", "Rule", "how it would have learnt", format_text),
    ("reason", "Reason", "why it failed", format_text),
)
STYLE = """
:root{--ink:#1c2733;--soft:#5b6875;--line:#e1e6eb;--page:#f6f7f9;--card:#fff;color-scheme:light}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:15px/1.5 system-ui,"Segoe UI",Roboto,sans-serif}
main{max-width:1160px;margin:auto;padding:24px 20px 56px}
h1{font-size:26px;line-height:1.25;margin:2px 0 6px;overflow-wrap:anywhere}
h2{font-size:18px;margin:36px 0 10px;overflow-wrap:anywhere} h3{font-size:15px;margin:0 0 8px}
p{margin:0 0 8px}
.brand,.small,small,figcaption,.empty{color:var(--soft);font-size:13px} .lead{overflow-wrap:anywhere}
.note{background:#fff6df;border-left:4px solid #e69f00;padding:8px 12px;margin-top:12px;overflow-wrap:anywhere}
.scroll{overflow-x:auto;background:var(--card);border:1px solid var(--line);border-radius:8px}
.tall{max-height:460px;overflow-y:auto;margin:10px 0}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{padding:6px 12px;text-align:left;border-bottom:1px solid var(--line);vertical-align:top}
tr:last-child>*{border-bottom:0}
th{font-weight:600} .n{text-align:right} .tall td,.tall th{white-space:nowrap;font-size:13px;padding:4px 7px}
.tall td:last-child:not(.n){white-space:pre-wrap;min-width:240px}
.tall tr:first-child th{position:sticky;top:0;background:var(--card)}
.summary .n{min-width:165px;max-width:340px} .summary span{overflow-wrap:anywhere}
.summary th:first-child{min-width:270px;position:sticky;left:0;background:var(--card)}
small{font-weight:400;margin-left:4px} .fit{width:fit-content;max-width:100%}
th i,h2 i{display:inline-block;width:11px;height:11px;border-radius:50%;margin-right:7px}
.pictures{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,460px),1fr));gap:16px}
figure{margin:0;padding:14px 16px;background:var(--card);border:1px solid var(--line);border-radius:8px;min-width:0}
img{display:block;width:100%;height:auto}
figcaption{margin-top:8px;overflow-wrap:anywhere}
details{margin:8px 0} summary{cursor:pointer;font-weight:600;padding:4px 0} section>h3{margin-top:16px}
pre{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:12px;overflow-x:auto;margin:8px 0;
  font-size:13px}
@media(max-width:640px){small{display:block;margin:0}
  .summary .n,.summary th:first-child{min-width:120px;padding:6px 8px}}
@media print{.tall{max-height:none}}
"""
