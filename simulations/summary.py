"""What a run came to: its numbers, and the run as the pictures and the page of a report show it.

Every number is read from the run database (`server/records.py`); none is estimated here.
"""

from __future__ import annotations

import math
import tomllib
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ..server.records import Run, read_run
from ..server.rows import AUDIT_FAILED, OVER_BUDGET
from .formats import NOTHING
from .population import AS_ASKED

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#555555")  # after Okabe & Ito
MARKERS = "osD^vPX"


def summarise(run: Run) -> dict[str, Any]:
    """Return the run in one row: Python numbers and strings, None where nothing was measured.

    Accuracy and loss are those of the last evaluated round. `peak_bytes_*` are over clients, each counting with the
    most it ever used. Totals are over the committed rounds (training; failed clients' downloads count, evaluation does
    not: that is `evaluation_bytes_total`), `*_client` is the mean of the client-rounds that ended ok. `angles`,
    `sparsity` and `separation` are lists over the blocks, of the last diagnosis.

    Every client-round is one of `client_rounds` (ok), `over_budget` and `failed`; `adapted` ones are among the ok,
    `audit_mismatches` among the failed. `simulated_seconds` is the sum of `times_of_rounds`.
    """
    rounds, ok = run.rounds, run.clients[run.clients.status == "ok"]
    over_budget = int((run.clients.status == OVER_BUDGET).sum())
    evaluated = rounds[numbers(rounds, "accuracy").notna() | numbers(rounds, "loss").notna()].tail(1)
    peaks = peaks_of_clients(run)
    totals = ("bytes_up", "bytes_down", "wire_up", "wire_down", "flops")
    return {
        "accuracy": _last(evaluated, "accuracy"),
        "loss": _last(evaluated, "loss"),
        "client_accuracy": _last(rounds, "client_accuracy"),
        "rounds": int(rounds["round"].max()) if len(rounds) else None,
        "client_rounds": len(ok),
        "failed": len(run.clients) - len(ok) - over_budget,
        "over_budget": over_budget,
        "adapted": int((ok["fit"].notna() & (ok["fit"] != AS_ASKED)).sum()),
        "audited": int(numbers(run.clients, "audited").sum()),
        "audit_mismatches": int((run.clients.status == AUDIT_FAILED).sum()),
        "peak_bytes_median": float(np.median(peaks)) if len(peaks) else None,
        "peak_bytes_max": int(peaks.max()) if len(peaks) else None,
        **{f"{name}_total": sum(int(n) for n in numbers(rounds, name).dropna()) for name in totals},
        "evaluation_bytes_total": int(
            numbers(run.evaluations, "bytes_up").sum() + numbers(run.evaluations, "bytes_down").sum()
        ),
        "bytes_up_client": _mean(numbers(ok, "bytes_up")),
        "bytes_down_client": _mean(numbers(ok, "bytes_down")),
        **_last_diagnosis(run),
        "seconds": float(numbers(rounds, "seconds").sum()),
        "simulated_seconds": float(times.sum()) if len(times := times_of_rounds(run)) else None,
        "model_sha256": next((h for h in reversed(rounds["model_sha256"].tolist()) if isinstance(h, str)), None),
        "path": str(run.folder),
    }


def _last_diagnosis(run: Run) -> dict[str, list[float | None] | None]:
    """Return what was last found of the blocks, a list over them; None where nothing was."""
    last = run.diagnoses[run.diagnoses["round"] == run.diagnoses["round"].max()]
    found = {"angles": "angle", "sparsity": "hoyer", "separation": "separation"}
    lists = {key: [None if math.isnan(v) else v for v in numbers(last, column)] for key, column in found.items()}
    return {key: values if any(v is not None for v in values) else None for key, values in lists.items()}


def numbers(frame: pd.DataFrame, column: str) -> pd.Series:
    """Return a column as numbers; NULL, NaN and infinities (a diverged loss) become NaN."""
    return pd.to_numeric(frame[column], errors="coerce").replace([math.inf, -math.inf], math.nan)


def peaks_of_clients(run: Run) -> pd.Series:
    """Return every client's most bytes over its rounds; a client that never reported any is left out."""
    return numbers(run.clients, "peak_bytes").groupby(run.clients["client"]).max().dropna()


def times_of_rounds(run: Run) -> pd.Series:
    """Return the simulated seconds of each round, by round: those of its slowest client that gave an update."""
    ok = run.clients[run.clients.status == "ok"]
    return numbers(ok, "simulated_seconds").groupby(ok["round"]).max().dropna()


def accuracies_of_clients(run: Run) -> tuple[np.ndarray, str]:
    """Return one accuracy a client and where it comes from: the last federated evaluation, else the last training."""
    values = numbers(run.evaluations, "accuracy")[run.evaluations.status == "ok"].dropna()
    if len(values):
        rounds = run.evaluations["round"][values.index]
        return values[rounds == rounds.max()].to_numpy(), f"of the global model of round {rounds.max()}"
    values = numbers(run.clients, "accuracy_after").dropna()
    clients = run.clients["client"][values.index]
    return values[~clients.duplicated(keep="last")].to_numpy(), "of each client's model after its last training"


@dataclass(frozen=True)
class Shown:
    """A run of a report, told apart from the others by its name, colour and marker.

    Attributes:
        run: its tables.
        name: its own name, numbered where another run of the report has the same.
        experiment: what its experiment says; empty if none is recorded.
        summary: its numbers, see `summarise`.
        colour: of its lines and its heading.
        marker: of its points, as matplotlib writes it.
    """

    run: Run
    name: str
    experiment: dict[str, Any]
    summary: dict[str, Any]
    colour: str
    marker: str

    @classmethod
    def read(cls, folder: Path, index: int, taken: set[str]) -> Shown:
        """Read the run in `folder`, the report's run number `index`; `taken` are the names before it."""
        run = read_run(folder)
        experiment = tomllib.loads(run.info.get("experiment") or "")
        name = str(run.info.get("name") or folder.resolve().name)
        name += f" ({index + 1})" * (name in taken)
        colour, marker = COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]
        return cls(run, name, experiment, summarise(run), colour, marker)

    @property
    def short(self) -> str:
        """The name where there is little room."""
        return self.name if len(self.name) <= 36 else f"{self.name[:18]}…{self.name[-17:]}"

    def told(self, text: str, several: bool) -> str:
        """Return `text`, and of which run it speaks if there are several."""
        return f"{self.short}: {text}" if several else text

    def heading(self) -> str:
        """Return the name as HTML, after a dot of its colour."""
        return f'<i style="background:{self.colour}"></i><span title="{escape(self.name)}">{escape(self.short)}</span>'

    def setting(self, key: str) -> str:
        """Return what the experiment says of `key`, with the values of its table in [set]."""
        table = self.experiment.get("set", {}).get(key, {})
        values = ", ".join(f"{k} = {v}" for k, v in table.items())
        value = self.experiment.get(key, NOTHING)
        if key == "clients-per-round" and value == 0:
            value = "all"
        return f"{value}" + (f" ({values})" if values else "")

    def standing(self) -> str | None:
        """Return how far an unfinished run got, or None for a finished one."""
        status, last = self.run.info.get("status"), self.summary["rounds"]
        state = "failed" if status == "failed" else "running/interrupted"
        where = "before its first round" if last is None else f"after round {last}"
        return None if status == "finished" else f"{self.short}: {state} {where} of {self.setting('rounds')}."


def _last(frame: pd.DataFrame, column: str) -> float | None:
    values = numbers(frame, column).dropna()
    return float(values.iloc[-1]) if len(values) else None


def _mean(values: pd.Series) -> float | None:
    return float(values.mean()) if values.notna().any() else None
