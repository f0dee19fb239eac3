"""LeNet on MNIST from nothing but numbers: accuracy against forward passes and against bytes, beside FedAvg.

Claim (Feng et al., BAFFLE, arXiv 2301.12195): 95.17 % in 20 epochs of FedSGD with 10 clients, 1000 directions of all
clients together in a step of 32 samples each, on images of 32 × 32. Question: what do forward passes and bytes buy, and
when does FedAvg with backpropagation, which sends models, stand there?

    network     BAFFLE's LeNet, 26,730 parameters, with tanh; standardised images, scaled to 14 × 14
    clients     10, IID; the scalar rules one step of 64 samples a round, along directions of each client's own
    forward     a sample through the network once: a client's FLOPs over those of one such pass
    bytes       payload of all training messages, up and down, as recorded

Run it: python -m fedforward.simulations.papers.mnist_scalars --data FOLDER-OF-MNIST
Every line is a recorded run under `--runs-dir`; one that is there is not run again, one that was stopped goes on. The
courses of all are left there as `courses.csv` and `courses.png`.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import typer
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from ...client.plan import Planner
from ..axes import accuracy_axis, byte_axis, styled
from ..experiment import Experiment
from ..formats import format_bytes
from ..parts import build_data, build_network
from ..summary import COLOURS, MARKERS
from .script import asked, run_of

MODEL = {"activation": "tanh"}
DATA = {"standardize": True, "resize": 14}
SCALARS: dict[str, Any] = {
    "rounds": 1250, "local_steps": 1, "batch_size": 64, "lr_schedule": "cosine", "evaluate_every": 50,
}  # fmt: skip
HALF = {**SCALARS, "rounds": 625}  # as many passes a round, and fewer hours for those who follow
WEIGHTS: dict[str, Any] = {"rounds": 30, "batch_size": 32}
OWN = {"own": True, "chunk": 32768}  # a slice is the whole network: a tenth of the time, and memory is not asked here
UNIT: dict[str, Any] = {"strategy": {"normalize": True}}  # steps of length η: the noise of K directions has any
# One setting each. Looked for with baffle alone, by test accuracy, in its first rounds and on an estimate of its course
# (the gradient and the noise that K directions add); the others' are made of that.
SETTINGS: dict[str, dict[str, Any]] = {
    "backprop": {"lr": 0.1, **WEIGHTS},
    "local-forward-gradient": {**WEIGHTS},
    "baffle": {"lr": 0.15, **SCALARS, **UNIT, "rule": {**OWN, "directions": 20, "sigma": 1e-4}},
    "spsa": {"lr": 0.12, **HALF, **UNIT, "rule": {**OWN, "directions": 10}},
    "forward-gradient": {"lr": 0.12, **HALF, **UNIT, "rule": {**OWN, "directions": 10}},
    "evolution": {"lr": 0.8, **HALF, "rule": {**OWN, "directions": 10, "sigma": 0.01}},
}
GOALS = (0.5, 0.8, 0.9, 0.93)


def experiment(rule: str, data: str) -> Experiment:
    """Return the experiment of one line."""
    settings = dict(SETTINGS[rule])
    options = {part: settings.pop(part) for part in ("rule", "strategy") if part in settings}
    options |= {"model": MODEL, "data": DATA}
    common = {"clients": 10, "epochs": 1, "holdout": 0.0, "clients_per_evaluation": 1, "model": "lenet"}
    return Experiment(name=rule, rule=rule, data=data, set=options, **common, **settings)


def course(cell: Experiment, runs: Path) -> pd.DataFrame:
    """Run a cell unless it is there; return accuracy, forward passes and bytes so far, a row an evaluated round."""
    rounds = run_of(cell, runs).rounds
    one = Planner(build_network(cell, build_data(cell))).forward(1).flops
    so_far = pd.DataFrame({
        "round": rounds["round"],
        "accuracy": rounds["accuracy"],
        "forward": rounds["flops"].cumsum() / one,
        "bytes": (rounds["bytes_up"] + rounds["bytes_down"]).cumsum(),
    })  # fmt: skip
    return so_far.dropna(subset="accuracy")


def draw(courses: pd.DataFrame) -> Figure:
    """Return the picture: accuracy against forward passes, and against bytes, a line a rule."""
    figure = Figure(figsize=(12, 4.6), dpi=130, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    right.set_xscale("log")
    courses = courses[courses["bytes"] > 0]
    for i, (rule, seen) in enumerate(courses.groupby("rule", sort=False)):
        for axes, key, unit in ((left, "forward", 1e6), (right, "bytes", 1)):
            look = {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)], "markevery": 0.1}
            axes.plot(seen[key] / unit, seen["accuracy"], label=rule, lw=1.6, markersize=5, **look)
    styled(left, "million forward passes of a sample, all clients", "test accuracy").legend(frameon=False)
    styled(right, "bytes up and down, all clients", "")
    byte_axis(right.xaxis, courses["bytes"].min(), courses["bytes"].max())
    accuracy_axis(left.yaxis)
    return figure


def main(
    data: Annotated[str, typer.Option(help="Folder or name of the MNIST data set.")] = "mnist",
    runs_dir: Annotated[Path, typer.Option(help="Folder that holds the runs.")] = Path("runs/mnist-scalars"),
    rules: Annotated[str, typer.Option(help="Comma-separated; all by default.")] = ",".join(SETTINGS),
) -> None:
    """Print when each rule first reaches a test accuracy: round, million forward passes of a sample, bytes."""
    logging.getLogger("flwr").setLevel(logging.ERROR)
    table = Table(title="LeNet on MNIST: round | million forward passes | bytes, when a test accuracy is first seen")
    for heading in ("rule", *(f"{goal:.0%}" for goal in GOALS), "best"):
        table.add_column(heading, no_wrap=True, justify="left" if heading == "rule" else "right")
    courses = []
    for rule in asked(rules, SETTINGS):
        seen = course(experiment(rule, data), runs_dir)
        courses.append(seen.assign(rule=rule))
        cells = []
        for goal in GOALS:
            first = seen[seen["accuracy"] >= goal].head(1)
            said = [f"{r.round} | {r.forward / 1e6:.1f} | {format_bytes(r.bytes)}" for r in first.itertuples()]
            cells += said or ["–"]
        table.add_row(rule, *cells, f"{100 * seen['accuracy'].max():.2f} %")
    console = Console(file=sys.stdout)
    console.width = max(console.width, 132)  # what it takes
    console.print(table)
    every = pd.concat(courses)
    every.to_csv(runs_dir / "courses.csv", index=False, float_format="%.6g")
    draw(every).savefig(runs_dir / "courses.png")


if __name__ == "__main__":
    typer.run(main)
