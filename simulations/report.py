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
from collections.abc import Callable, Sequence
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

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#555555")  # after Okabe & Ito
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
    most it ever used. Totals are over the committed rounds (training; failed clients' downloads count, evaluation does
    not), `*_client` is the mean of the client-rounds that ended ok. `failed` counts every client-round that is not ok.
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
    shown: list[_Shown] = []
    for folder in folders:
        shown.append(_Shown.read(Path(folder), len(shown), {each.name for each in shown}))
    if output is None:
        names = "-vs-".join(each.run.folder.resolve().name for each in shown)
        if len(names) > 100:  # a file name has its limits
            names = f"{names[:88]}-{hashlib.sha256(names.encode()).hexdigest()[:8]}"
        first = shown[0].run.folder
        output = first if len(shown) == 1 else first.resolve().parent / f"report-{names}"
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    pictures = []
    for name, (title, *axes_and_draw) in PICTURES.items():
        png, caption = _draw(shown, *axes_and_draw)
        if png is None:
            (output / f"{name}.png").unlink(missing_ok=True)  # an older one would show what this page denies
            content = f"<p class=empty>{escape(caption)}</p>"
        else:
            write_atomically(output / f"{name}.png", png)
            data = base64.b64encode(png).decode()
            content = f'<img alt="{escape(title)}" src="data:image/png;base64,{data}">'
            content += f"<figcaption>{escape(caption)}</figcaption>"
        pictures.append(f"<figure><h3>{escape(title)}</h3>{content}</figure>")
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
    def read(cls, folder: Path, index: int, taken: set[str]) -> _Shown:
        run = read_run(folder)
        try:
            experiment = tomllib.loads(run.info.get("experiment") or "")
        except tomllib.TOMLDecodeError:  # still printed as it stands
            experiment = {}
        name = str(run.info.get("name") or folder.resolve().name)
        name += f" ({index + 1})" * (name in taken)
        colour, marker = COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]
        return cls(run, name, experiment, summarise(run), colour, marker)

    @property
    def short(self) -> str:
        """The name where there is little room."""
        return self.name if len(self.name) <= 36 else f"{self.name[:18]}…{self.name[-17:]}"

    def heading(self) -> str:
        return f'<i style="background:{self.colour}"></i><span title="{escape(self.name)}">{escape(self.short)}</span>'

    def setting(self, key: str) -> str:
        """Return what the experiment says of `key`, with the values of its table in [set]."""
        tables = self.experiment.get("set")
        table = tables.get(key) if isinstance(tables, dict) else None
        values = ", ".join(f"{k} = {v}" for k, v in table.items()) if isinstance(table, dict) else ""
        return f"{self.experiment.get(key, NOTHING)}" + (f" ({values})" if values else "")

    def standing(self) -> str | None:
        """Return how far an unfinished run got, or None for a finished one."""
        status, last = self.run.info.get("status"), self.summary["rounds"]
        state = "failed" if status == "failed" else "running/interrupted"
        where = "before its first round" if last is None else f"after round {last}"
        return None if status == "finished" else f"{self.short}: {state} {where} of {self.setting('rounds')}."


# Pictures. Each draws the runs that have data, and returns the names of those runs and a caption.


def _accuracy_by_round(axes: Axes, shown: list[_Shown]) -> tuple[set[str], str]:
    drawn = set()
    for each in shown:
        for column, style in {"accuracy": "-", "client_accuracy": "--"}.items():
            y = _numbers(each.run.rounds, column).dropna()
            if len(y):
                label = "server's test set" if column == "accuracy" else "clients' held-out data"
                if len(shown) > 1:
                    label = "" if each.name in drawn else each.short
                _line(axes, each, each.run.rounds["round"][y.index], y, style, label)
                drawn.add(each.name)
    if drawn:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        _percent(axes.yaxis)
    caption = "Share of samples that the round's global model classifies correctly; round 0 is the initial model. "
    return drawn, caption + "Solid: the server's test set. Dashed: the clients' own held-out data."


def _accuracy_by_bytes(axes: Axes, shown: list[_Shown]) -> tuple[set[str], str]:
    drawn, sent = set(), []
    for each in shown:
        rounds = each.run.rounds
        x = (_numbers(rounds, "bytes_up").fillna(0) + _numbers(rounds, "bytes_down").fillna(0)).cumsum()
        y = _numbers(rounds, "accuracy")[x > 0].dropna()
        if len(y):
            _line(axes, each, x[y.index], y, "-", each.short if len(shown) > 1 else "")
            sent += x[y.index].tolist()
            drawn.add(each.name)
    if drawn:
        axes.set_xscale("log", base=2)
        _bytes(axes.xaxis, min(sent), max(sent))
        _percent(axes.yaxis)
    caption = "Server's test set, by the payload bytes of all training messages so far (evaluation is not counted). "
    return drawn, caption + "The initial model cost nothing and is not shown."


def _memory_by_client(axes: Axes, shown: list[_Shown]) -> tuple[set[str], str]:
    drawn, seen = set(), []
    sorted_peaks = [np.sort(_peaks(each.run).to_numpy()) for each in shown]
    alike = len({len(peaks) for peaks in sorted_peaks if len(peaks)}) == 1  # else ranks are compared as shares
    for each, peaks in zip(shown, sorted_peaks, strict=True):
        if len(peaks):
            x = np.arange(1, len(peaks) + 1) if alike else (np.arange(len(peaks)) + 0.5) / len(peaks)
            low, high = format_bytes(peaks[0]), format_bytes(peaks[-1])
            same = f"all {len(peaks)} clients {high}" if len(peaks) > 1 else f"1 client {high}"
            text = f"{low} to {high}" if peaks[0] != peaks[-1] else same
            label = f"{each.short}: {text}" if len(shown) > 1 else text
            size = 5.5 if len(peaks) <= 30 else 3.5 if len(peaks) <= 300 else 2.2
            axes.plot(x, peaks, each.marker, color=each.colour, ms=size, label=_plain(label))
            seen += [peaks[0], peaks[-1]]
            drawn.add(each.name)
    if drawn:
        if max(seen) > 20 * max(min(seen), 1):
            axes.set_yscale("log", base=2)
        _bytes(axes.yaxis, min(seen), max(seen))
        if alike:
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        else:
            axes.set_xlim(-0.02, 1.02)
            axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
    caption = "One mark a client: the most bytes that one of its training steps held, over all its rounds. "
    return drawn, caption + "Clients that never reported a peak (all their rounds failed) are left out."


def _accuracy_of_clients(axes: Axes, shown: list[_Shown]) -> tuple[set[str], str]:
    drawn, sources = set(), {}
    for each in shown:
        values, source = _client_accuracies(each.run)
        if len(values):
            sources.setdefault(source, []).append(each.short)
            text = f"{len(values)} client{'s' * (len(values) > 1)}, median {format_percent(float(np.median(values)))}"
            label = f"{each.short}: {text}" if len(shown) > 1 else text
            axes.ecdf(values, color=each.colour, lw=1.9, label=_plain(label))
            drawn.add(each.name)
    if drawn:
        _percent(axes.xaxis)
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
        axes.set_ylim(0, 1.03)
    told = [source if len(sources) == 1 else f"{source} ({', '.join(names)})" for source, names in sources.items()]
    return drawn, f"Cumulative distribution over clients; accuracy {'; '.join(told)}."


PICTURES = {  # file name: title, x axis, y axis, what draws it
    "accuracy": ("Accuracy by round", "Round", "Accuracy", _accuracy_by_round),
    "traffic": ("Accuracy by bytes sent", "Sent so far, up and down", "Accuracy", _accuracy_by_bytes),
    "memory": ("Peak memory of each client", "Clients, sorted", "Peak memory of a training step", _memory_by_client),
    "clients": ("Accuracy of the clients", "Accuracy, own held-out data", "Clients at or below", _accuracy_of_clients),
}


def _draw(shown: list[_Shown], x: str, y: str, draw: Callable[..., tuple[set[str], str]]) -> tuple[bytes | None, str]:
    """Return a picture as PNG with its caption, or None with the reason why there is no picture."""
    figure = Figure(figsize=(5.6, 3.8), dpi=132, layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel(x, fontsize=11)
    axes.set_ylabel(y, fontsize=11)
    axes.tick_params(labelsize=10, color="#bbbbbb")
    axes.grid(color="#e6e6e6", lw=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#bbbbbb")
    drawn, caption = draw(axes, shown)
    if not drawn:
        return None, "No data yet: no committed round has measured this."
    without = [each.short for each in shown if each.name not in drawn]
    if handles := axes.get_legend_handles_labels()[0]:  # below the picture, which grows by it: no name covers data
        columns = 2 if max(len(str(handle.get_label())) for handle in handles) <= 26 else 1
        figure.set_figheight(3.8 + 0.2 * math.ceil(len(handles) / columns))
        figure.legend(handles=handles, loc="outside lower center", ncols=columns, fontsize=10, frameon=False)
    png = io.BytesIO()
    figure.savefig(png, format="png")
    return png.getvalue(), caption + (f" No data yet: {', '.join(without)}." if without else "")


def _plain(label: str) -> str:
    """Return a label free of matplotlib's own notation."""
    label = "".join(c if c.isprintable() else "?" for c in label).replace("$", r"\$")
    return f" {label}" if label.startswith("_") else label


def _line(axes: Axes, each: _Shown, x: pd.Series, y: pd.Series, style: str, label: str) -> None:
    marker = each.marker if len(x) == 1 or (style == "-" and len(x) <= 40) else ""
    width = 1.9 if style == "-" else 1.1
    axes.plot(x, y, ls=style, lw=width, color=each.colour, marker=marker, ms=4, label=_plain(label) or None)


def _percent(axis: Axis) -> None:
    """Fit a range of accuracies: never narrower than 4 %, never far beyond 0 or 100 %."""
    low, high = axis.get_data_interval()
    room = max(0.02, 0.06 * (high - low))
    _limit(axis, max(low - room, -0.01), min(high + room, 1.01))
    axis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    axis.set_major_formatter(PercentFormatter(1, decimals=0 if high - low > 0.08 else 1, symbol=" %"))


def _bytes(axis: Axis, low: float, high: float) -> None:
    """Set ticks that are round numbers of bytes; a linear axis starts at 0."""
    low, high = max(low, 1), max(high, 1)
    if axis.get_scale() == "log":
        first, last = math.floor(math.log2(low)), math.ceil(math.log2(high))
        last += first == last
        ticks = [2.0**power for power in range(first, last + 1, math.ceil((last - first) / 5))]
        labels, limits = [format_bytes(tick).replace(".0 ", " ") for tick in ticks], (2.0**first / 1.1, 2.0**last * 1.1)
    else:
        unit = 1024 ** int(math.log(high, 1024))
        counts = MaxNLocator(5, integer=unit == 1).tick_values(0, 1.1 * high / unit)
        ticks, name = [count * unit for count in counts], format_bytes(unit).split()[1]
        labels, limits = [f"{count:g} {name}" for count in counts], (0, ticks[-1])
    axis.set_ticks(ticks, labels)
    axis.axes.minorticks_off()
    _limit(axis, *limits)


def _limit(axis: Axis, low: float, high: float) -> None:
    (axis.axes.set_xlim if axis.axis_name == "x" else axis.axes.set_ylim)(low, high)


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
    power = 0
    while round(n, min(power, 1)) >= base and power < len(units) - 1:
        n, power = n / base, power + 1
    return f"{n:,.1f} {units[power]}" if power else f"{n:.0f} {units[0]}"


def _flops(n: float | None) -> str:
    return _scaled(n, 1000, ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP", "EFLOP"))


def _seconds(t: float | None) -> str:
    if _missing(t) or t < 60:
        return NOTHING if _missing(t) else f"{t:.3g} s" if t < 10 else f"{t:.1f} s"
    minutes, seconds = divmod(round(t), 60)
    return f"{minutes} min {seconds} s" if minutes < 60 else f"{minutes // 60:,} h {minutes % 60} min"


def _integer(n: float | None) -> str:
    return NOTHING if _missing(n) else f"{int(n)}"


def _loss(x: float | None) -> str:
    return NOTHING if _missing(x) else f"{x:.4g}"


def _text(x: Any) -> str:
    return NOTHING if _missing(x) else str(x)


# The page.


def _page(shown: list[_Shown], pictures: list[str]) -> str:
    title = " vs ".join(each.short for each in shown) if len(shown) > 1 else shown[0].name
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
    rule, model, data, partition, clients, some, rounds, strategy, engine, seed = map(shown[0].setting, LEAD)
    line = f"Rule {rule} trains model {model} on data {data}, partition {partition}: {clients} clients, {some} of them "
    return line + f"a round, {rounds} rounds, strategy {strategy}, engine {engine}, seed {seed}."


LEAD = ("rule", "model", "data", "partition", "clients", "clients-per-round", "rounds", "strategy", "engine", "seed")


def _summary_table(shown: list[_Shown]) -> str:
    rows = [f"<tr><th></th>{''.join(f'<th class=n>{each.heading()}</th>' for each in shown)}</tr>"]
    for label, meaning, write in SUMMARY:
        cells = "".join(f"<td class=n>{escape(write(each))}</td>" for each in shown)
        rows.append(f"<tr><th scope=row>{label} <small>{escape(meaning)}</small></th>{cells}</tr>")
    return f"<div class='scroll fit'><table class=summary>{''.join(rows)}</table></div>"


def _said(*keys: str) -> Callable[[_Shown], str]:
    return lambda each: " / ".join(each.setting(key) for key in keys)


def _measured(write: Callable[[Any], str], *keys: str) -> Callable[[_Shown], str]:
    return lambda each: " / ".join(write(each.summary[key]) for key in keys)


SUMMARY = (  # label, meaning, what writes the value
    ("Rule", "how a client learns", _said("rule")),
    ("Data", "data set", _said("data")),
    ("Model", "the network that is trained", _said("model")),
    ("Partition", "how data is spread over clients", _said("partition")),
    ("Clients", "that exist / in a round", _said("clients", "clients-per-round")),
    ("Rounds", "committed / planned", lambda each: f"{_integer(each.summary['rounds'])} / {each.setting('rounds')}"),
    ("Accuracy", "server's test set, last evaluated round", _measured(format_percent, "accuracy")),
    ("Loss", "server's test set, same round", _measured(_loss, "loss")),
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
    ("Training compute", "counted operations, all clients", _measured(_flops, "flops_total")),
    ("Time", "of this machine, all rounds", _measured(_seconds, "seconds")),
    ("Client-rounds", "that ended ok / that failed", _measured(_integer, "client_rounds", "failed")),
    ("Model hash", "SHA-256 of the last model, 16 digits", _measured(lambda h: (h or NOTHING)[:16], "model_sha256")),
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
    title = each.heading() if several else "Details"
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
    more = f"<p class=small>{left_out:,} more rows are in run.sqlite.</p>" if left_out > 0 else ""
    return f"{more}<div class='scroll tall'><table><tr>{head}</tr><tr>{'</tr><tr>'.join(rows)}</tr></table></div>"


ROUNDS = (
    ("round", "Round", "0 is the initial model", _integer),
    ("accuracy", "Accuracy", "of the global model on the server's test set", format_percent),
    ("loss", "Loss", "of the global model on the server's test set", _loss),
    ("client_accuracy", "Client accuracy", "clients' own held-out data, mean weighted by samples", format_percent),
    ("train_loss", "Training loss", "mean over the clients of the round, weighted by samples", _loss),
    ("learning_rate", "Learning rate", "of the round", _loss),
    ("clients", "Ok", "clients that ended ok", _integer),
    ("failed", "Failed", "clients that failed or dropped out", _integer),
    ("bytes_up", "Up", "payload bytes of training, all clients", format_bytes),
    ("bytes_down", "Down", "payload bytes of training, all clients", format_bytes),
    ("flops", "Compute", "floating-point operations, all clients", _flops),
    ("seconds", "Time", "of this machine", _seconds),
)
CLIENTS = (
    ("client", "Client", "its partition of the data", _integer),
    ("round", "Round", "the last one it took part in", _integer),
    ("rule", "Rule", "how it learnt", _text),
    ("status", "Status", "ok, failed or dropped", _text),
    ("samples", "Samples", "of its training data", _integer),
    ("steps", "Steps", "minibatches learnt from", _integer),
    ("batch", "Batch", "samples of a minibatch", _integer),
    ("loss", "Loss", "training loss", _loss),
    ("accuracy_before", "Before", "accuracy on its own held-out data before training", format_percent),
    ("accuracy_after", "After", "accuracy on its own held-out data after training", format_percent),
    ("peak_bytes", "Peak", "memory: most bytes of a training step of that round", format_bytes),
    ("base_bytes", "Base", "memory held before the step: parameters, state and batch", format_bytes),
    ("bytes_up", "Up", "payload bytes", format_bytes),
    ("bytes_down", "Down", "payload bytes", format_bytes),
    ("flops", "Compute", "floating-point operations", _flops),
    ("seconds", "Time", "of this machine", _seconds),
)
FAILURES = (
    ("round", "Round", "in which it failed", _integer),
    ("client", "Client", "its partition of the data", _integer),
    ("rule", "Rule", "how it would have learnt", _text),
    ("reason", "Reason", "why it failed", _text),
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
