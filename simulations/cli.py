"""The command line: fedforward run | rules | report.

Results go to standard output (one JSON object with `--json`), everything else to standard error. Exit code 0 is a
finished run, 2 a mistake in what was asked (one line says which and what to do), 130 an interrupted run. With
FEDFORWARD_DEBUG=1 the tracebacks behind such lines are printed too.
"""

from __future__ import annotations

import json
import logging
import math
import os
import sys
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any

# Set before Flower, Hugging Face or OpenMP are loaded: no telemetry, no progress bars of theirs among ours.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from .. import __version__
from ..algorithms import RULES
from ..server.records import NotARun, RunInUse, read_run
from ..server.rounds import RunFailed
from . import world as worlds
from .experiment import Experiment, ExperimentError, from_toml
from .report import write_report
from .run import RUNS, execute, reopen, start
from .summary import summarise
from .terminal import Watcher, final_table, headline, say

MISTAKES = (*worlds.MISTAKES, RunFailed, RunInUse)

app = typer.Typer(
    help="Federated edge learning without backpropagation: true memory, bytes and accuracy of every client.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object to standard output.")]


def _flag(field: str, text: str) -> Any:
    """Return the option of one of an experiment's fields, which shows the field's default."""
    return typer.Option(help=text, show_default=str(getattr(Experiment(), field)))


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
    rule: Annotated[str | None, _flag("rule", "Learning rule; see `fedforward rules`.")] = None,
    data: Annotated[str | None, _flag("data", "digits, a folder, a .npz file, or a hub data set.")] = None,
    model: Annotated[str | None, _flag("model", "mlp, lenet, cnn, or module:object.")] = None,
    partition: Annotated[str | None, _flag("partition", "iid, dirichlet:0.3, pathological:2, shard, ...")] = None,
    clients: Annotated[int | None, _flag("clients", "Number of clients.")] = None,
    clients_per_round: Annotated[int | None, _flag("clients_per_round", "Clients sampled each round (0: all).")] = None,
    rounds: Annotated[int | None, _flag("rounds", "Number of rounds.")] = None,
    epochs: Annotated[int | None, _flag("epochs", "Local epochs a round.")] = None,
    batch_size: Annotated[int | None, _flag("batch_size", "Samples in a local step.")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate; the rule's own if not given.")] = None,
    lr_schedule: Annotated[str | None, _flag("lr_schedule", "constant, cosine, linear or half-linear.")] = None,
    strategy: Annotated[str | None, _flag("strategy", "fedavg, fedadam, krum, ..., or module:object.")] = None,
    holdout: Annotated[float | None, _flag("holdout", "Part of a client's samples kept to evaluate it.")] = None,
    evaluate_every: Annotated[int | None, _flag("evaluate_every", "Rounds between evaluations.")] = None,
    seed: Annotated[int | None, _flag("seed", "The one seed of everything.")] = None,
    engine: Annotated[str | None, _flag("engine", "Where clients run: inline.")] = None,
    timeout: Annotated[float | None, _flag("timeout", "Seconds to wait for a round's replies (0: all).")] = None,
    threads: Annotated[int | None, _flag("threads", "PyTorch threads.")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the run's folder.")] = None,
    options: Annotated[
        list[str] | None, typer.Option("--set", help="An option of a part, as rule.momentum=0.9; repeatable.")
    ] = None,
    runs_dir: Annotated[Path, typer.Option(help="Folder that holds the runs.")] = RUNS,
    resume: Annotated[Path | None, typer.Option(help="Go on with the unfinished run in this folder.")] = None,
    as_json: Json = False,
) -> None:
    """Train one model over simulated clients, record every client of every round, and write a report.

    EXPERIMENT is a file of settings, such as the experiment.toml of any run; flags override what it says.
    """
    flags = {
        "rule": rule, "data": data, "model": model, "partition": partition, "clients": clients,
        "clients-per-round": clients_per_round, "rounds": rounds, "epochs": epochs, "batch-size": batch_size,
        "lr": lr, "lr-schedule": lr_schedule, "strategy": strategy, "holdout": holdout,
        "evaluate-every": evaluate_every, "seed": seed, "engine": engine, "timeout": timeout,
        "threads": threads, "name": name,
    }  # fmt: skip
    flags = {key: value for key, value in flags.items() if value is not None}
    console, folder = Console(stderr=True), resume
    try:
        if resume is not None:
            _refuse_flags_with_resume(flags, options, experiment)
            world, folder = reopen(resume)
        else:
            chosen = from_toml(experiment, flags, options or [])
            if chosen.engine == "flower":
                raise ExperimentError("engine flower is Flower's own runtime, started by `flwr run .`: use inline here")
            world, folder = start(chosen, runs_dir)
        say(console, headline(world.experiment))
        with Watcher(console, world.experiment, summarise(read_run(folder))["rounds"] or 0) as watcher:
            execute(world, folder, watcher, watcher.client_done)
    except KeyboardInterrupt:
        say(console, _interrupted(folder))
        raise typer.Exit(130) from None
    _show_result(world.experiment, folder, as_json)


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
        _print_json({"rules": described})
        return
    for family, members in groupby(described, key=lambda rule: rule["family"]):
        table = Table.grid(padding=(0, 2, 0, 0))
        table.add_column(min_width=max(len(rule["name"]) for rule in described), style="bold", no_wrap=True)
        for rule in members:
            facts = f"sends {rule['travels']}; autograd: {rule['autograd']}"
            table.add_row(rule["name"], Text.assemble(facts, "\n", (rule["paper"], "dim")))
        Console().print(Text(family, "cyan"), table, "", sep="\n", highlight=False)


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
        except NotARun as error:
            raise ExperimentError(f"{error}: name a folder under {RUNS}/") from None
    try:
        path = write_report(runs, output)
    except OSError as error:
        raise ExperimentError(f"cannot write the report ({error.strerror}): choose another --output") from None
    if as_json:
        _print_json({"path": str(path)})
    else:
        print(path)


def _refuse_flags_with_resume(flags: dict[str, Any], options: list[str] | None, experiment: Path | None) -> None:
    given = [f"--{key}" for key in flags] + (["--set"] if options else []) + ([str(experiment)] if experiment else [])
    if given:
        raise ExperimentError(f"--resume goes on with the run's own experiment: drop {', '.join(given)}")


def _interrupted(folder: Path | None) -> str:
    """Return what is said of an interrupted run; it may have been the report that was interrupted."""
    try:
        finished = folder is not None and read_run(folder).info.get("status") == "finished"
    except NotARun:
        folder = None
    if folder is None:
        return "interrupted"
    command = f"fedforward report {folder}" if finished else f"fedforward run --resume {folder}"
    return f"interrupted; go on with: {command}"


def _show_result(experiment: Experiment, folder: Path, as_json: bool) -> None:
    summary = summarise(read_run(folder)) | {"name": experiment.name}
    page = folder / "report.html"
    if as_json:
        _print_json(summary | {"path": str(folder), "report": str(page)})
        return
    Console().print(final_table(experiment, summary))
    print(f"report: {page}")


def _print_json(values: dict[str, Any]) -> None:
    """Print one JSON object; what is not finite is null, since JSON knows no NaN."""
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
    print(json.dumps(finite, allow_nan=False))


def main() -> None:
    """Run the command line; a mistake is one line on standard error and exit code 2."""
    logging.getLogger("flwr").setLevel(logging.ERROR)
    logging.basicConfig(format="%(message)s")
    logging.getLogger("fedforward").setLevel(logging.DEBUG if os.environ.get("FEDFORWARD_DEBUG") else logging.INFO)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a terminal that knows no "–"
    try:
        try:
            app()
        finally:
            sys.stdout.flush()
    except MISTAKES as mistake:
        logging.getLogger("fedforward").debug("%s", mistake, exc_info=True)
        Console(stderr=True, soft_wrap=True).print(f"[red]error:[/red] {escape(' '.join(str(mistake).split()))}")
        sys.exit(2)
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
