"""A run, or several runs over one another, as one page: `report.html` with its pictures inside it.

The page works offline and can be mailed: pictures are embedded, nothing is loaded from elsewhere. The same pictures lie
beside it as PNG files. Every number is read from the run database (`server/records.py`); none is estimated here.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import shlex
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from ..server.records import EXPERIMENT, Run, read_run, write_atomically

COLOURS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#555555",
)  # Okabe & Ito, colour-blind safe
MARKERS = "osD^vPX"
MOST_ROWS = 2000  # of one table of the page; the database holds the rest
NOTHING = "–"


def format_bytes(n: float | None) -> str:
    """Return `n` bytes for a human: `312 B`, `1.5 MiB`; `–` for None."""
    return _scaled(n, 1024, ("B", "KiB", "MiB", "GiB", "TiB", "PiB"))


def format_percent(x: float | None) -> str:
    """Return the share `x` for a human: `97.3 %`; `–` for None and NaN."""
    return NOTHING if _missing(x) else f"{100 * x:.1f} %"


def summarise(run: Run) -> dict[str, Any]:
    """Return the run in one row: Python numbers and strings, None where nothing was measured.

    Accuracy and loss are those of the last evaluated round. `peak_bytes_*` are over clients, each counting with the
    most it ever used. Totals are over the committed rounds, `*_client` is the mean of the client-rounds that ended ok.
    """
    rounds, ok = run.rounds, run.clients[run.clients.status == "ok"]
    evaluated = rounds[_numbers(rounds, "accuracy").notna() | _numbers(rounds, "loss").notna()].tail(1)
    peaks = _peaks(run)
    totals = ("bytes_up", "bytes_down", "wire_up", "wire_down", "flops")
    return {
        "accuracy": _last(evaluated, "accuracy"),
        "loss": _last(evaluated, "loss"),
        "client_accuracy": _last(rounds, "client_accuracy"),
        "rounds": int(rounds["round"].max()) if len(rounds) else None,
        "client_rounds": len(ok),
        "failed": len(run.clients) - len(ok),
        "peak_bytes_median": float(np.median(peaks)) if len(peaks) else None,
        "peak_bytes_max": int(peaks.max()) if len(peaks) else None,
        **{f"{name}_total": sum(int(n) for n in _numbers(rounds, name).dropna()) for name in totals},
        "bytes_up_client": _mean(_numbers(ok, "bytes_up")),
        "bytes_down_client": _mean(_numbers(ok, "bytes_down")),
        "seconds": float(_numbers(rounds, "seconds").sum()),
        "model_sha256": next((h for h in reversed(rounds["model_sha256"].tolist()) if isinstance(h, str)), None),
        "path": str(run.folder),
    }


def write_report(folders: Sequence[Path], output: Path | None = None) -> Path:
    """Write the report of one run, or of several runs over one another, and return the path of its `report.html`.

    Args:
        folders: the folders of the runs.
        output: the folder to write to. Default: the run's own; for several, `report-<a>-vs-<b>` beside the first run.
    """
    if not folders:
        raise ValueError("name at least one run to report")
    shown = [_Shown.read(Path(folder), index) for index, folder in enumerate(folders)]
    output = _default_output([each.run.folder for each in shown]) if output is None else Path(output)
    output.mkdir(parents=True, exist_ok=True)
    pictures = []
    for name, (title, draw) in PICTURES.items():
        figure, caption = draw(shown)
        (output / f"{name}.png").unlink(missing_ok=True)  # a picture without data must not leave an older one behind
        image = f"<p class=empty>{escape(caption)}</p>"
        if figure is not None:
            png = io.BytesIO()
            figure.savefig(png, format="png")
            write_atomically(output / f"{name}.png", png.getvalue())
            data = base64.b64encode(png.getvalue()).decode()
            image = f'<img alt="{escape(title)}" src="data:image/png;base64,{data}"><figcaption>{escape(caption)}'
            image += "</figcaption>"
        pictures.append(f"<figure><h3>{escape(title)}</h3>{image}</figure>")
    write_atomically(output / "report.html", _page(shown, pictures).encode())
    return output / "report.html"


@dataclass(frozen=True)
class _Shown:
    """A run with what every part of the page needs of it."""

    run: Run
    name: str
    experiment: dict[str, Any]
    summary: dict[str, Any]
    colour: str
    marker: str

    @classmethod
    def read(cls, folder: Path, index: int) -> _Shown:
        run = read_run(folder)
        try:
            experiment = tomllib.loads(run.info.get("experiment") or "")
        except tomllib.TOMLDecodeError:  # still printed as it stands
            experiment = {}
        name = str(run.info.get("name") or folder.resolve().name)
        colour, marker = COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]
        return cls(run, name, experiment, summarise(run), colour, marker)

    @property
    def label(self) -> str:
        """The name as a picture shows it: short, and free of matplotlib's own notation."""
        short = self.name if len(self.name) <= 36 else f"{self.name[:18]}…{self.name[-17:]}"
        return "".join(c if c.isprintable() else "?" for c in short).replace("$", r"\$")

    def setting(self, key: str) -> str:
        """Return what the experiment says of `key`, with the values of its table in [set]."""
        tables = self.experiment.get("set")
        table = tables.get(key) if isinstance(tables, dict) else None
        values = ", ".join(f"{k} = {v}" for k, v in table.items()) if isinstance(table, dict) else ""
        return f"{self.experiment.get(key, NOTHING)}" + (f" ({values})" if values else "")

    def standing(self) -> str | None:
        """Return how far an unfinished run got, or None for a finished one."""
        status = self.run.info.get("status")
        if status == "finished":
            return None
        last = self.summary["rounds"]
        where = "before its first round" if last is None else f"after round {last}"
        state = "failed" if status == "failed" else "running, or interrupted,"
        return f"{self.name}: {state} {where} of {self.experiment.get('rounds', 'an unknown number')}."


# Pictures. Each takes the runs and returns a figure with its caption, or None with the reason why there is no figure.


def _accuracy_by_round(shown: list[_Shown]) -> tuple[Figure | None, str]:
    figure, axes = _figure("Round", "Accuracy")
    with_data = set()
    for each in shown:
        rounds = each.run.rounds
        for column, style in {"accuracy": "-", "client_accuracy": "--"}.items():
            y = _numbers(rounds, column)
            if not y.notna().any():
                continue
            with_data.add(each.name)
            name = f"{each.label}, " if len(shown) > 1 else ""
            label = f"{name}server's test set" if column == "accuracy" else f"{name}clients' held-out data"
            _line(axes, each, rounds["round"][y.notna()], y.dropna(), style, label)
    if not with_data:
        return None, "No round has been evaluated yet."
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _percent(axes.yaxis)
    caption = "Share of samples classified correctly by the round's global model; round 0 is the initial model. "
    caption += "Solid: the server's test set. Dashed: mean over clients of their own held-out data."
    return _legend(figure), caption + _without(shown, with_data)


def _accuracy_by_bytes(shown: list[_Shown]) -> tuple[Figure | None, str]:
    figure, axes = _figure("Sent so far, up and down (log scale)", "Accuracy, server's test set")
    axes.set_xscale("log", base=2)
    with_data, sent = set(), []
    for each in shown:
        rounds = each.run.rounds
        x = (_numbers(rounds, "bytes_up").fillna(0) + _numbers(rounds, "bytes_down").fillna(0)).cumsum()
        y = _numbers(rounds, "accuracy")
        keep = y.notna() & (x > 0)
        if keep.any():
            with_data.add(each.name)
            sent += [x[keep].min(), x[keep].max()]
            _line(axes, each, x[keep], y[keep], "-", each.label)
    if not with_data:
        return None, "No round that sent anything has been evaluated on the server's test set yet."
    _bytes(axes.xaxis, min(sent), max(sent))
    _percent(axes.yaxis)
    caption = "Payload bytes of all messages of all clients, summed over rounds. The initial model cost nothing and is "
    return _legend(figure, len(shown) > 1), caption + "not shown." + _without(shown, with_data)


def _memory_by_client(shown: list[_Shown]) -> tuple[Figure | None, str]:
    figure, axes = _figure("Clients, sorted by peak memory", "Peak memory of a training step")
    with_data, seen = set(), []
    for each in shown:
        peaks = np.sort(_peaks(each.run).to_numpy())
        if not len(peaks):
            continue
        with_data.add(each.name)
        seen += [peaks[0], peaks[-1]]
        low, high = format_bytes(peaks[0]), format_bytes(peaks[-1])
        text = f"{low} to {high}" if peaks[0] != peaks[-1] else f"all {len(peaks)} clients {high}"
        text = f"1 client {high}" if len(peaks) == 1 else text
        label = f"{each.label}: {text}" if len(shown) > 1 else text
        size = 5.5 if len(peaks) <= 50 else 3 if len(peaks) <= 300 else 1.8
        axes.plot(np.arange(1, len(peaks) + 1), peaks, each.marker, color=each.colour, ms=size, label=label)
    if not with_data:
        return None, "No client has reported its peak memory yet."
    if max(seen) > 20 * max(min(seen), 1):
        axes.set_yscale("log", base=2)
    _bytes(axes.yaxis, max(min(seen), 1), max(seen))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    caption = "One mark a client: the most bytes that one of its training steps held, over all rounds it took part in. "
    return _legend(figure), caption + "Failed clients that reported no peak are left out." + _without(shown, with_data)


def _accuracy_of_clients(shown: list[_Shown]) -> tuple[Figure | None, str]:
    figure, axes = _figure("Accuracy on the client's own held-out data", "Share of clients at or below")
    with_data, sources = set(), {}
    for each in shown:
        values, source = _client_accuracies(each.run)
        if not len(values):
            continue
        with_data.add(each.name)
        sources.setdefault(source, []).append(each.name)
        text = f"{len(values)} client{'s' * (len(values) > 1)}, median {format_percent(float(np.median(values)))}"
        label = f"{each.label}: {text}" if len(shown) > 1 else text
        axes.ecdf(values, color=each.colour, lw=1.8, label=label)
        if len(values) <= 50:
            share = np.arange(1, len(values) + 1) / len(values)
            axes.plot(np.sort(values), share, each.marker, color=each.colour, ms=4)
    if not with_data:
        return None, "No client has reported its accuracy yet."
    _percent(axes.xaxis)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
    axes.set_ylim(0, 1.03)
    told = [source if len(sources) == 1 else f"{source} ({', '.join(names)})" for source, names in sources.items()]
    caption = f"Cumulative distribution over clients. Accuracy {'; '.join(told)}."
    return _legend(figure), caption + _without(shown, with_data)


PICTURES: dict[str, tuple[str, Callable[[list[_Shown]], tuple[Figure | None, str]]]] = {
    "accuracy": ("Accuracy by round", _accuracy_by_round),
    "traffic": ("Accuracy by bytes sent", _accuracy_by_bytes),
    "memory": ("Peak memory of each client", _memory_by_client),
    "clients": ("Accuracy of the clients", _accuracy_of_clients),
}


def _figure(x: str, y: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(5.6, 3.8), dpi=132, layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel(x, fontsize=11)
    axes.set_ylabel(y, fontsize=11)
    axes.tick_params(labelsize=10, color="#bbbbbb")
    axes.grid(color="#e6e6e6", lw=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#bbbbbb")
    return figure, axes


def _line(axes: Axes, each: _Shown, x: pd.Series, y: pd.Series, style: str, label: str) -> None:
    marker = each.marker if len(x) == 1 or (style == "-" and len(x) <= 40) else ""
    width = 1.9 if style == "-" else 1.1
    axes.plot(x, y, ls=style, lw=width, color=each.colour, marker=marker, ms=4, label=label)


def _legend(figure: Figure, wanted: bool = True) -> Figure:
    """Put the legend below the picture, which grows by it, so that no name, however long, covers data."""
    handles, _ = figure.axes[0].get_legend_handles_labels()
    if wanted and handles:
        columns = 1 if sum(len(str(h.get_label())) for h in handles[:2]) > 60 else 2
        figure.set_figheight(figure.get_figheight() + 0.2 * math.ceil(len(handles) / columns))
        figure.legend(handles=handles, loc="outside lower center", ncols=columns, fontsize=10, frameon=False)
    return figure


def _percent(axis: Axis) -> None:
    """Fit a range of accuracies: never narrower than 4 %, never far beyond 0 or 100 %."""
    low, high = axis.get_data_interval()
    room = max(0.02, 0.06 * (high - low))
    (axis.axes.set_xlim if axis.axis_name == "x" else axis.axes.set_ylim)(
        max(low - room, -0.01), min(high + room, 1.01)
    )
    axis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    axis.set_major_formatter(PercentFormatter(1, decimals=None if high - low > 0.1 else 1, symbol=" %"))


def _bytes(axis: Axis, low: float, high: float) -> None:
    """Set ticks that are round numbers of bytes; a linear axis starts at 0."""
    if axis.get_scale() == "log":
        first, last = math.floor(math.log2(low)), math.ceil(math.log2(high))
        last += first == last
        ticks = [2.0**power for power in range(first, last + 1, math.ceil((last - first) / 5))]
        limits = (2.0**first / 1.1, 2.0**last * 1.1)
    else:
        unit = 1024 ** int(math.log(max(high, 1), 1024))
        ticks = [tick * unit for tick in MaxNLocator(5, integer=unit == 1).tick_values(0, 1.1 * max(high, 1) / unit)]
        limits = (0, ticks[-1])
    axis.set_ticks(ticks, [format_bytes(tick).replace(".0 ", " ") for tick in ticks])
    axis.axes.minorticks_off()
    (axis.axes.set_xlim if axis.axis_name == "x" else axis.axes.set_ylim)(*limits)


def _without(shown: list[_Shown], with_data: set[str]) -> str:
    missing = [each.name for each in shown if each.name not in with_data]
    return f" No data yet: {', '.join(missing)}." if missing else ""


# The page.


def _page(shown: list[_Shown], pictures: list[str]) -> str:
    title = " vs ".join(each.name for each in shown)
    notes = [f"<p class=note>{escape(note)}</p>" for each in shown if (note := each.standing())]
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)} · FedForward</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head><body><main>'
        f"<header><p class=brand>FedForward report</p><h1>{escape(title)}</h1>"
        f"<p class=lead>{escape(_lead(shown))}</p>{''.join(notes)}</header>"
        f"<section><h2>Summary</h2>{_summary_table(shown)}</section>"
        f"<section><h2>Pictures</h2><div class=pictures>{''.join(pictures)}</div></section>"
        f"{''.join(_details(each, len(shown) > 1) for each in shown)}</main></body></html>\n"
    )


def _lead(shown: list[_Shown]) -> str:
    """Describe the experiment in one line; of several runs, say in what they differ."""
    if len(shown) > 1:
        keys = {key: None for each in shown for key in each.experiment if key not in ("name", "set")}
        differ = [key for key in keys if len({str(each.experiment.get(key)) for each in shown}) > 1]
        tables = {json.dumps(each.experiment.get("set", {}), sort_keys=True, default=str) for each in shown}
        differ += ["[set]"] * (len(tables) > 1)
        return f"{len(shown)} runs over one another. They differ in: {', '.join(differ) or 'nothing that is set'}."
    said = {key: shown[0].setting(key) for key in ("rule", "model", "data", "partition", *LEAD)}
    line = f"Rule {said['rule']} trains model {said['model']} on data {said['data']}, partition {said['partition']}; "
    line += ", ".join(text.format(said[key]) for key, text in LEAD.items() if said[key] != NOTHING)
    return line.strip().rstrip(";") + "."


LEAD = {
    "clients": "{} clients",
    "clients-per-round": "{} of them a round",
    "rounds": "{} rounds",
    "epochs": "local epochs: {}",
    "strategy": "strategy {}",
    "engine": "engine {}",
    "seed": "seed {}",
}


def _summary_table(shown: list[_Shown]) -> str:
    head = "".join(f"<th class=n>{_swatch(each)}{escape(each.name)}</th>" for each in shown)
    rows = []
    for label, meaning, cell in SUMMARY:
        cells = "".join(f"<td class=n>{escape(cell(each))}</td>" for each in shown)
        rows.append(
            f'<tr title="{escape(meaning)}"><th scope=row>{label}<small>{escape(meaning)}</small></th>{cells}</tr>'
        )
    return f"<div class=scroll><table class=summary><tr><th></th>{head}</tr>{''.join(rows)}</table></div>"


def _pair(name: str, kind: str) -> Callable[[_Shown], str]:
    keys = [name.format(way) for way in kind.split("/")]
    return lambda each: " / ".join(format_bytes(each.summary[key]) for key in keys)


SUMMARY: tuple[tuple[str, str, Callable[[_Shown], str]], ...] = (
    ("Rule", "how a client learns", lambda each: each.setting("rule")),
    ("Data", "data set", lambda each: each.setting("data")),
    ("Model", "the network that is trained", lambda each: each.setting("model")),
    ("Partition", "how data is spread over clients", lambda each: each.setting("partition")),
    ("Clients", "that exist / in a round", lambda s: f"{s.setting('clients')} / {s.setting('clients-per-round')}"),
    ("Rounds", "committed / planned", lambda s: f"{_integer(s.summary['rounds'])} / {s.setting('rounds')}"),
    ("Accuracy", "server's test set, last evaluated round", lambda s: format_percent(s.summary["accuracy"])),
    ("Loss", "server's test set, same round", lambda s: _loss(s.summary["loss"])),
    ("Client accuracy", "mean over clients, own held-out data", lambda s: format_percent(s.summary["client_accuracy"])),
    ("Peak memory", "of a training step; median / max over clients", _pair("peak_bytes_{}", "median/max")),
    ("Bytes per client-round", "payload, mean; up / down", _pair("bytes_{}_client", "up/down")),
    ("Bytes in total", "payload, all client-rounds; up / down", _pair("bytes_{}_total", "up/down")),
    ("Bytes serialised", "as Flower serialises them, in total; up / down", _pair("wire_{}_total", "up/down")),
    ("Training compute", "counted floating-point operations, all clients", lambda s: _flops(s.summary["flops_total"])),
    ("Time", "of this machine, all rounds", lambda s: _seconds(s.summary["seconds"])),
    (
        "Client-rounds",
        "that ended ok / that failed",
        lambda s: f"{s.summary['client_rounds']:,} / {s.summary['failed']:,}",
    ),
    (
        "Model hash",
        "SHA-256 of the last global model, first 16 digits",
        lambda s: (s.summary["model_sha256"] or NOTHING)[:16],
    ),
)


def _details(each: _Shown, several: bool) -> str:
    """Return what is folded away of one run: its tables, its experiment and how to run it again."""
    run = each.run
    failures = run.clients[run.clients.status != "ok"]
    last = run.clients.drop_duplicates("client", keep="last").sort_values("client")
    path = run.folder / EXPERIMENT
    path = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
    try:
        environment = json.loads(run.info.get("environment") or "{}")
    except json.JSONDecodeError:
        environment = {}
    ran = [f"FedForward {run.info.get('version') or '?'}"] + [f"{name} {value}" for name, value in environment.items()]
    ran += [f"{word} {run.info[word]}" for word in ("created", "finished") if run.info.get(word)]
    toml = run.info.get("experiment") or "(not recorded)"
    title = f"{_swatch(each)}{escape(each.name)}" if several else "Details"
    parts = [f"<section><h2>{title}</h2>"]
    if len(failures):
        text = f"Failed client-rounds ({len(failures):,})"
        parts.append(_folded(text, _table(failures, FAILURES), opened=len(failures) <= 10))
    parts += [
        _folded(f"Rounds ({len(run.rounds):,})", _table(run.rounds, ROUNDS)),
        _folded(f"Clients, the last round each took part in ({len(last):,})", _table(last, CLIENTS)),
        _folded("Experiment", f"<pre>{escape(toml)}</pre>"),
        f"<h3>Run it again</h3><pre>fedforward run {escape(shlex.quote(path.as_posix()))}</pre>",
        f"<p class=small>{escape(' · '.join(ran))}</p></section>",
    ]
    return "".join(parts)


def _folded(summary: str, content: str, opened: bool = False) -> str:
    return f"<details{' open' * opened}><summary>{escape(summary)}</summary>{content}</details>"


def _table(frame: pd.DataFrame, columns: Sequence[tuple[str, str, str, Callable[[Any], str]]]) -> str:
    """Return the rows of `frame` as a table; `columns` are (column, heading, meaning, how to write a value)."""
    if not len(frame):
        return "<p class=small>No rows yet.</p>"
    sides = ["" if write is _text else " class=n" for *_, write in columns]
    head = "".join(
        f'<th{side} title="{escape(meaning)}">{heading}</th>'
        for side, (_, heading, meaning, _) in zip(sides, columns, strict=True)
    )
    rows = []
    for values in frame.tail(MOST_ROWS).to_dict("records"):
        cells = zip(sides, columns, strict=True)
        rows.append("".join(f"<td{side}>{escape(write(values.get(key)))}</td>" for side, (key, _, _, write) in cells))
    left_out = len(frame) - len(rows)
    more = f"<p class=small>{left_out:,} earlier rows are in run.sqlite.</p>" if left_out > 0 else ""
    return f"{more}<div class='scroll tall'><table><tr>{head}</tr><tr>{'</tr><tr>'.join(rows)}</tr></table></div>"


def _swatch(each: _Shown) -> str:
    return f'<i style="background:{each.colour}"></i>'


# Numbers: out of the tables, and for a human.


def _numbers(frame: pd.DataFrame, column: str) -> pd.Series:
    """Return a column as numbers; NULL, NaN and infinities (a diverged loss) become NaN."""
    return pd.to_numeric(frame[column], errors="coerce").replace([math.inf, -math.inf], math.nan)


def _last(frame: pd.DataFrame, column: str) -> float | None:
    values = _numbers(frame, column).dropna()
    return float(values.iloc[-1]) if len(values) else None


def _mean(values: pd.Series) -> float | None:
    return float(values.mean()) if values.notna().any() else None


def _peaks(run: Run) -> pd.Series:
    """Return every client's most bytes over its rounds; a client that never reported any is left out."""
    return _numbers(run.clients, "peak_bytes").groupby(run.clients["client"]).max().dropna()


def _client_accuracies(run: Run) -> tuple[np.ndarray, str]:
    """Return one accuracy a client and where it comes from: the last federated evaluation, else the last training."""
    values = _numbers(run.evaluations, "accuracy")[run.evaluations.status == "ok"].dropna()
    if len(values):
        rounds = run.evaluations["round"][values.index]
        return values[rounds == rounds.max()].to_numpy(), f"of the global model of round {rounds.max()}"
    values = _numbers(run.clients, "accuracy_after").dropna()
    clients = run.clients["client"][values.index]
    return values[~clients.duplicated(keep="last")].to_numpy(), "of each client's model after its last training"


def _missing(x: Any) -> bool:
    return x is None or (isinstance(x, float) and math.isnan(x))


def _scaled(n: float | None, base: int, units: Sequence[str]) -> str:
    if _missing(n):
        return NOTHING
    if n < base:
        return f"{n:.0f} {units[0]}"
    for unit in units[1:]:
        n /= base
        if round(n, 1) < base:
            break
    return f"{n:,.1f} {unit}"


def _flops(n: float | None) -> str:
    return _scaled(n, 1000, ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP", "EFLOP"))


def _seconds(t: float | None) -> str:
    if _missing(t) or t < 60:
        return NOTHING if _missing(t) else f"{t:.3g} s" if t < 10 else f"{t:.1f} s"
    minutes, seconds = divmod(round(t), 60)
    return f"{minutes} min {seconds} s" if minutes < 60 else f"{minutes // 60:,} h {minutes % 60} min"


def _integer(n: float | None) -> str:
    return NOTHING if _missing(n) else f"{int(n):,}"


def _loss(x: float | None) -> str:
    return NOTHING if _missing(x) else f"{x:.4g}"


def _text(x: Any) -> str:
    return NOTHING if _missing(x) else str(x)


ROUNDS = (
    ("round", "Round", "0 is the initial model", _integer),
    ("accuracy", "Accuracy", "of the global model on the server's test set", format_percent),
    ("loss", "Loss", "of the global model on the server's test set", _loss),
    ("client_accuracy", "Client accuracy", "mean over clients of their own held-out data", format_percent),
    ("train_loss", "Training loss", "mean over the clients of the round", _loss),
    ("learning_rate", "Learning rate", "of the round", _loss),
    ("clients", "Clients", "that took part", _integer),
    ("failed", "Failed", "clients that failed", _integer),
    ("bytes_up", "Up", "payload bytes, all clients", format_bytes),
    ("bytes_down", "Down", "payload bytes, all clients", format_bytes),
    ("flops", "Compute", "floating-point operations, all clients", _flops),
    ("seconds", "Time", "of this machine", _seconds),
)
CLIENTS = (
    ("client", "Client", "its partition of the data", _text),
    ("round", "Round", "the last one it took part in", _integer),
    ("rule", "Rule", "how it learnt", _text),
    ("status", "Status", "ok or failed", _text),
    ("samples", "Samples", "of its training data", _integer),
    ("steps", "Steps", "minibatches learnt from", _integer),
    ("batch", "Batch", "samples of a minibatch", _integer),
    ("loss", "Loss", "training loss", _loss),
    ("accuracy_before", "Before", "accuracy on its own held-out data before training", format_percent),
    ("accuracy_after", "After", "accuracy on its own held-out data after training", format_percent),
    ("peak_bytes", "Peak memory", "most bytes of a training step of that round", format_bytes),
    ("base_bytes", "Base memory", "bytes held before the step", format_bytes),
    ("bytes_up", "Up", "payload bytes", format_bytes),
    ("bytes_down", "Down", "payload bytes", format_bytes),
    ("flops", "Compute", "floating-point operations", _flops),
    ("seconds", "Time", "of this machine", _seconds),
)
FAILURES = (
    ("round", "Round", "in which it failed", _integer),
    ("client", "Client", "its partition of the data", _text),
    ("rule", "Rule", "how it would have learnt", _text),
    ("reason", "Reason", "why it failed", _text),
)
STYLE = """
:root{--ink:#1c2733;--soft:#5b6875;--line:#e1e6eb;--page:#f6f7f9;--card:#fff;color-scheme:light}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
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
th{font-weight:600} .n{text-align:right} .tall td,.tall th{white-space:nowrap;font-size:13px;padding:4px 10px}
.tall td:last-child{white-space:normal}
.tall tr:first-child th{position:sticky;top:0;background:var(--card)}
.summary td,.summary th.n{overflow-wrap:anywhere;min-width:130px}
small{display:block;font-weight:400}
th i,h2 i{display:inline-block;width:11px;height:11px;border-radius:50%;margin-right:7px}
.pictures{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,460px),1fr));gap:16px}
figure{margin:0;padding:14px 16px;background:var(--card);border:1px solid var(--line);border-radius:8px;min-width:0}
img{display:block;width:100%;height:auto}
figcaption{margin-top:8px;overflow-wrap:anywhere}
details{margin:8px 0} summary{cursor:pointer;font-weight:600;padding:4px 0} section>h3{margin-top:16px}
pre{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:12px;overflow-x:auto;font-size:13px;margin:8px 0}
@media print{.tall{max-height:none}}
"""


def _default_output(folders: Sequence[Path]) -> Path:
    """Return the run's own folder, or for several runs a folder beside the first one, named after all of them."""
    if len(folders) == 1:
        return folders[0]
    names = "-vs-".join(folder.resolve().name for folder in folders)
    if len(names) > 100:  # a file name has its limits
        names = f"{names[:88]}-{hashlib.sha256(names.encode()).hexdigest()[:8]}"
    return folders[0].resolve().parent / f"report-{names}"
