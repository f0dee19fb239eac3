"""The command line: fedforward run | rules | report.

Results go to standard output (one JSON object with `--json`), everything else to standard error. Exit code 0 is a
finished run, 2 a mistake in what was asked (one line says which and what to do), 130 an interrupted run.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Any

# Set before Flower, Hugging Face or OpenMP are loaded: no telemetry, no progress bars of theirs among ours.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .. import __version__
from ..algorithms import RULES, NetworkError, RuleError
from ..server.records import read_run
from ..server.rounds import AllClientsFailed
from .datasets import DataError
from .experiment import Experiment, ExperimentError, from_mapping, from_toml, parse_options
from .report import summarise, write_report
from .run import RUNS, execute, reopen, start
from .terminal import Watcher, final_table

MISTAKES = (ExperimentError, DataError, RuleError, NetworkError, AllClientsFailed)

app = typer.Typer(
    help="Federated edge learning without backpropagation: true memory, bytes and accuracy of every client.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object to standard output.")]


def _version(wanted: bool) -> None:
    if wanted:
        print(f"fedforward {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    """Federated edge learning without backpropagation: true memory, bytes and accuracy of every client."""


@app.command()
def run(
    experiment: Annotated[Path | None, typer.Argument(help="An experiment file (TOML); flags override it.")] = None,
    rule: Annotated[str | None, typer.Option(help="Learning rule; see `fedforward rules`.")] = None,
    data: Annotated[str | None, typer.Option(help="digits, a folder, a .npz file, or a hub data set.")] = None,
    model: Annotated[str | None, typer.Option(help="mlp, lenet, cnn, or module:object.")] = None,
    partition: Annotated[str | None, typer.Option(help="iid, dirichlet:0.3, pathological:2, shard, ...")] = None,
    clients: Annotated[int | None, typer.Option(help="Number of clients.")] = None,
    clients_per_round: Annotated[int | None, typer.Option(help="Clients sampled each round (0: all).")] = None,
    rounds: Annotated[int | None, typer.Option(help="Number of rounds.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Local epochs a round.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Samples in a local step.")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate; the rule's own if not given.")] = None,
    lr_schedule: Annotated[str | None, typer.Option(help="constant, cosine, linear or half-linear.")] = None,
    strategy: Annotated[str | None, typer.Option(help="fedavg, fedadam, krum, ..., or module:object.")] = None,
    holdout: Annotated[float | None, typer.Option(help="Part of a client's samples kept to evaluate it.")] = None,
    evaluate_every: Annotated[int | None, typer.Option(help="Rounds between evaluations.")] = None,
    seed: Annotated[int | None, typer.Option(help="The one seed of everything.")] = None,
    engine: Annotated[str | None, typer.Option(help="Where clients run: inline.")] = None,
    threads: Annotated[int | None, typer.Option(help="PyTorch threads.")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the run's folder.")] = None,
    options: Annotated[
        list[str] | None, typer.Option("--set", help="An option of a part, as rule.momentum=0.9; repeatable.")
    ] = None,
    runs_dir: Annotated[Path, typer.Option(help="Folder that holds the runs.")] = RUNS,
    resume: Annotated[Path | None, typer.Option(help="Go on with the unfinished run in this folder.")] = None,
    as_json: Json = False,
) -> None:
    """Train one model over simulated clients, record every client of every round, and write a report."""
    flags = {
        "rule": rule, "data": data, "model": model, "partition": partition, "clients": clients,
        "clients-per-round": clients_per_round, "rounds": rounds, "epochs": epochs, "batch-size": batch_size,
        "lr": lr, "lr-schedule": lr_schedule, "strategy": strategy, "holdout": holdout,
        "evaluate-every": evaluate_every, "seed": seed, "engine": engine, "threads": threads, "name": name,
    }  # fmt: skip
    flags = {key: value for key, value in flags.items() if value is not None}
    console = Console(stderr=True)
    if resume is not None:
        _refuse_flags_with_resume(flags, options, experiment)
        world, folder = reopen(resume)
    else:
        world, folder = start(_experiment(experiment, flags, options or []), runs_dir)
    done = read_run(folder).rounds["round"].max() if resume else 0
    e = world.experiment
    console.print(
        f"{e.rule} on {e.data} ({e.partition}), {e.model}: {e.sampled()} of {e.clients} clients,"
        f" {e.rounds} rounds of {e.epochs} epochs, {e.strategy}, seed {e.seed}",
        highlight=False,
        markup=False,
    )
    try:
        with Watcher(console, e, 0 if done != done else int(done)) as watcher:
            execute(world, folder, watcher, watcher.client_done)
    except KeyboardInterrupt:
        console.print(f"interrupted; go on with: fedforward run --resume {folder}", highlight=False, markup=False)
        raise typer.Exit(130) from None
    _show_result(console, e, folder, as_json)


@app.command()
def rules(as_json: Json = False) -> None:
    """List the learning rules."""
    described = [
        {
            "name": rule.name,
            "family": rule.family,
            "travels": rule.travels,
            "autograd": rule.autograd,
            "paper": rule.paper,
            "lr": rule.lr,
        }
        for rule in RULES.values()
    ]
    if as_json:
        print(json.dumps({"rules": described}))
        return
    table = Table(expand=False)
    for heading in ("name", "family", "what travels", "autograd", "paper"):
        table.add_column(heading, no_wrap=heading == "name", overflow="fold")
    for rule in described:
        table.add_row(*(rule[key] for key in ("name", "family", "travels", "autograd", "paper")))
    Console().print(table)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders; several are laid over each other.")],
    output: Annotated[Path | None, typer.Option(help="Folder to write to.")] = None,
    as_json: Json = False,
) -> None:
    """Write a self-contained report.html with pictures of one run or several."""
    for folder in runs:
        try:
            read_run(folder)
        except FileNotFoundError as error:
            raise ExperimentError(f"{error}: name a folder under {RUNS}/") from None
    path = write_report(runs, output)
    print(json.dumps({"path": str(path)}) if as_json else path)


def _experiment(path: Path | None, flags: dict[str, Any], options: list[str]) -> Experiment:
    """Return the experiment of a file (or the defaults) with flags and options laid over it."""
    base = from_toml(path) if path else Experiment()
    flagged = from_mapping(flags)  # checks types and names, before it is merged
    merged = {part: dict(table) for part, table in base.set.items()}
    for part, table in parse_options(options).items():
        merged.setdefault(part, {}).update(table)
    fields = {key.replace("-", "_") for key in flags}
    return base.replace(**{key: getattr(flagged, key) for key in fields}, set=merged)


def _refuse_flags_with_resume(flags: dict[str, Any], options: list[str] | None, experiment: Path | None) -> None:
    given = [f"--{key}" for key in flags] + (["--set"] if options else []) + ([str(experiment)] if experiment else [])
    if given:
        raise ExperimentError(f"--resume goes on with the run's own experiment: drop {', '.join(given)}")


def _show_result(console: Console, experiment: Experiment, folder: Path, as_json: bool) -> None:
    summary = summarise(read_run(folder)) | {"name": experiment.name}
    page = folder / "report.html"
    if as_json:
        print(json.dumps(summary | {"path": str(folder), "report": str(page)}))
        return
    Console().print(final_table(experiment, summary))
    print(f"report: {page}")


def main() -> None:
    """Run the command line; a mistake is one line on standard error and exit code 2."""
    logging.getLogger("flwr").setLevel(logging.ERROR)
    logging.basicConfig(format="%(message)s")
    logging.getLogger("fedforward").setLevel(logging.INFO)
    try:
        app()
    except MISTAKES as mistake:
        Console(stderr=True, soft_wrap=True).print(f"[red]error:[/red] {escape(' '.join(str(mistake).split()))}")
        sys.exit(2)
