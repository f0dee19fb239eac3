"""The command line: fedforward run | compare | plan | rules | papers | report | bench.

Results go to standard output (one JSON object with `--json`), everything else to standard error. Exit code 0 is a
finished run, 2 a mistake in what was asked (one line says which and what to do), 130 an interrupted run. With
FEDFORWARD_DEBUG=1 the tracebacks behind such lines are printed too.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shlex
import sys
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, get_type_hints

# Set before Flower, Hugging Face or OpenMP are loaded: no telemetry, no progress bars of theirs among ours.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import typer
from rich.console import Console
from rich.markup import escape

from .. import __version__
from ..algorithms import RULES
from ..server.records import NotARun, RunInUse, read_run
from ..server.rounds import RunFailed
from . import describing, parts
from .benchmarks.bench import PARTS as BENCH_PARTS
from .benchmarks.bench import bench as run_bench
from .benchmarks.settings import Settings
from .benchmarks.show import show as show_bench
from .comparison.comparing import Request
from .comparison.comparing import compare as compare_rules
from .comparison.settings import chosen_rules as rules_named
from .comparison.settings import own_settings
from .comparison.terminal import as_object, show
from .engines.choice import choose
from .experiment import Experiment, ExperimentError, from_toml
from .papers import telling
from .papers.pages import OTHERS, RECORDED, ours, pages, rows
from .papers.script import run_of
from .planning.picture import draw_plan
from .planning.question import plan_for
from .planning.table import plan_text
from .report import write_report
from .run import RUNS, execute, reopen, start
from .summary import summarise
from .terminal import Watcher, final_table, headline, say

MISTAKES = (*parts.MISTAKES, RunFailed, RunInUse)

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
    model: Annotated[str | None, _flag("model", "mlp, lenet, cnn, resnet, or module:object.")] = None,
    init: Annotated[str | None, _flag("init", "Folder of a run whose last model to begin with.")] = None,
    partition: Annotated[str | None, _flag("partition", "iid, dirichlet:0.3, pathological:2, shard, ...")] = None,
    clients: Annotated[int | None, _flag("clients", "Number of clients.")] = None,
    clients_per_round: Annotated[int | None, _flag("clients_per_round", "Clients sampled each round (0: all).")] = None,
    clients_per_evaluation: Annotated[
        int | None, _flag("clients_per_evaluation", "Clients that judge a new model (0: all, or 1000 of more).")
    ] = None,
    resample: Annotated[
        bool | None, _flag("resample", "Every client draws its own samples: clients may be millions.")
    ] = None,
    samples_per_client: Annotated[
        int | None, _flag("samples_per_client", "Samples that a client draws (0: 100); with --resample.")
    ] = None,
    rounds: Annotated[int | None, _flag("rounds", "Number of rounds.")] = None,
    epochs: Annotated[int | None, _flag("epochs", "Local epochs a round.")] = None,
    local_steps: Annotated[int | None, _flag("local_steps", "Local steps a round, at most (0: all epochs).")] = None,
    batch_size: Annotated[int | None, _flag("batch_size", "Samples in a local step.")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate; the rule's own if not given.")] = None,
    lr_schedule: Annotated[str | None, _flag("lr_schedule", "constant, cosine, linear or half-linear.")] = None,
    strategy: Annotated[str | None, _flag("strategy", "fedavg, fedadam, krum, ..., or module:object.")] = None,
    fleet: Annotated[str | None, _flag("fleet", "Devices of the clients, as mcu-1m:0.6,phone:0.4.")] = None,
    adapt: Annotated[str | None, _flag("adapt", "What a client may change to fit its device: none or rule.")] = None,
    micro_batch: Annotated[int | None, _flag("micro_batch", "Samples in a part of a step's batch (0: whole).")] = None,
    audit: Annotated[float | None, _flag("audit", "Part of client rounds whose memory is measured.")] = None,
    holdout: Annotated[float | None, _flag("holdout", "Part of a client's samples kept to evaluate it.")] = None,
    evaluate_every: Annotated[int | None, _flag("evaluate_every", "Rounds between evaluations.")] = None,
    diagnose_every: Annotated[
        int | None, _flag("diagnose_every", "Rounds between diagnoses of the blocks, from 0 to the last (0: none).")
    ] = None,
    seed: Annotated[int | None, _flag("seed", "The one seed of everything.")] = None,
    engine: Annotated[str | None, _flag("engine", "Where clients run: auto, inline, cohort, pool or flower.")] = None,
    devices: Annotated[str | None, _flag("devices", "Workers: cpu:2 is two processes; or cuda:0,cuda:1.")] = None,
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
        "rule": rule, "data": data, "model": model, "init": init, "partition": partition, "clients": clients,
        "clients-per-round": clients_per_round, "clients-per-evaluation": clients_per_evaluation,
        "resample": resample, "samples-per-client": samples_per_client,
        "rounds": rounds, "epochs": epochs, "local-steps": local_steps, "batch-size": batch_size,
        "lr": lr, "lr-schedule": lr_schedule, "strategy": strategy, "fleet": fleet, "adapt": adapt,
        "micro-batch": micro_batch, "audit": audit, "holdout": holdout,
        "evaluate-every": evaluate_every, "diagnose-every": diagnose_every, "seed": seed, "engine": engine,
        "devices": devices, "timeout": timeout, "threads": threads, "name": name,
    }  # fmt: skip
    flags = {key: value for key, value in flags.items() if value is not None}
    console, folder = Console(stderr=True), resume
    try:
        if resume is not None:
            _refuse_flags_with_resume(flags, options, experiment)
            world, folder = reopen(resume)
        else:
            chosen = from_toml(experiment, flags, options or [])
            world, folder = start(chosen, runs_dir)
        say(console, headline(world.experiment))
        choice = choose(world)
        say(console, world.chosen or str(choice))
        done = summarise(read_run(folder))["rounds"] or 0
        with Watcher(console, world.experiment, done, world.admissions()) as watcher:
            execute(world, folder, watcher, watcher.client_done, choice)
    except RunFailed as failure:
        if as_json:
            with suppress(NotARun):  # a disk that fails may take the run with it: the line below is said then alone
                _show_result(world.experiment, folder, as_json, failure)
        raise
    except KeyboardInterrupt:
        say(console, _interrupted(folder))
        raise typer.Exit(130) from None
    _show_result(world.experiment, folder, as_json)


@app.command()
def plan(
    model: Annotated[str, _flag("model", "mlp, lenet, cnn, resnet, or module:object.")] = Experiment.model,
    data: Annotated[
        str | None, _flag("data", "digits, mnist, cifar10, ...: known shapes, nothing is downloaded; or as in `run`.")
    ] = None,
    shape: Annotated[str | None, typer.Option(help="Shape of a sample instead of data, as 1x28x28.")] = None,
    classes: Annotated[int | None, typer.Option(help="Number of classes, with --shape.")] = None,
    batch_size: Annotated[int, typer.Option(help="Samples in a step.")] = 32,
    micro_batch: Annotated[int, typer.Option(help="Samples in a part, for backprop that takes the batch so.")] = 1,
    rules: Annotated[str, typer.Option(help="all, or names with commas, or module:object.")] = "all",
    fleet: Annotated[str, typer.Option(help="Find the largest batch for these devices, as mcu-1m,phone.")] = "",
    options: Annotated[
        list[str] | None, typer.Option("--set", help="An option of a part, as model.hidden=[64]; repeatable.")
    ] = None,
    granule: Annotated[int, typer.Option(help="Round every storage up to so many bytes (CUDA: 512).")] = 1,
    picture: Annotated[Path | None, typer.Option(help="Draw the bytes during a step to this PNG file.")] = None,
    as_json: Json = False,
) -> None:
    """Say what a training step of every rule would need: memory, arithmetic, bytes sent, devices. Nothing is run."""
    if picture and picture.suffix.lower() != ".png":
        raise ExperimentError(f"--picture writes a PNG: name a file that ends in .png, not {picture}")
    found = plan_for(
        model=model, data=data, shape=shape, classes=classes, batch_size=batch_size, micro_batch=micro_batch,
        rules=rules, fleet=fleet, options=options or [], granule=granule, timeline=picture is not None,
    )  # fmt: skip
    if picture:
        try:
            picture.write_bytes(draw_plan(found))
        except OSError as error:
            raise ExperimentError(f"cannot write {picture} ({error.strerror}): choose another --picture") from None
    if as_json:
        _print_json(found.to_dict() | {"picture": picture and str(picture)})
        return
    console = Console()
    say(console, plan_text(found, console.width))
    if picture:
        print(f"picture: {picture}")


@app.command()
def rules(
    describe: Annotated[
        str | None, typer.Option(help="One rule: its equations, what it stores and sends, its options.")
    ] = None,
    as_json: Json = False,
) -> None:
    """List the learning rules, or describe one."""
    if describe is not None:
        told = describing.page(parts.rule_named(describe))
        _print_json(told) if as_json else print(describing.page_text(told))
    elif as_json:
        _print_json({"rules": [describing.facts(rule) for rule in RULES.values()]})
    else:
        describing.print_list(Console())


@app.command()
def papers(
    names: Annotated[
        list[str] | None, typer.Argument(help="Rules or pages; all that have a page if none is named.")
    ] = None,
    wanted: Annotated[bool, typer.Option("--run", help="Run what is not there yet, or go on with it.")] = False,
    data_dir: Annotated[
        Path | None,
        typer.Option(exists=True, file_okay=False, help="Folder that holds data sets by their names; else the hub's."),
    ] = None,
    runs_dir: Annotated[Path, typer.Option(help="Folder that holds the runs.")] = RECORDED,
    as_json: Json = False,
) -> None:
    """Lay each rule's published accuracy beside that of our recorded runs, with one client and with ten."""
    found = pages(names or [], data_dir)
    for page in found if wanted else ():
        for line in page.lines.values():
            if ours(line, runs_dir)["status"] == OTHERS:
                raise ExperimentError(f"{runs_dir / line.name} is a run of {OTHERS}: remove it, or choose --runs-dir")
            run_of(line, runs_dir)
    lines = [row for page in found for row in rows(page, runs_dir)]
    if as_json:
        _print_json({"papers": lines})
        return
    for page in found if names else ():
        print(telling.text(page, data_dir), end="\n\n")
    Console().print(telling.table(lines))


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


@app.command()
def bench(
    only: Annotated[str, typer.Option(help=f"Parts with commas between, of {', '.join(BENCH_PARTS)}.")] = "",
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each; medians are told.")] = Settings.repeats,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds that are timed in a run.")] = Settings.rounds,
    device: Annotated[str, typer.Option(help="Where to train: cpu or cuda.")] = Settings.device,
    picture: Annotated[Path | None, typer.Option(help="Draw the figures to this PNG file.")] = None,
    as_json: Json = False,
) -> None:
    """Measure speed and memory beside hand-written loops, in one run; a quarter of an hour without --only."""
    console = Console(stderr=True)
    found = run_bench(only, Settings(repeats, rounds, device, tell=lambda line: say(console, line)), picture)
    _print_json(found) if as_json else show_bench(found, Console())


# `compare` takes the flags of `run`, word for word.
_of_run = SimpleNamespace(**get_type_hints(run, include_extras=True))


@app.command()
def compare(
    experiment: _of_run.experiment = None,
    rules: Annotated[str, typer.Option(help="Rules with commas between, or all.")] = "all",
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds, from --seed on.")] = 3,
    own: Annotated[
        list[str] | None, typer.Option("--for", help="A setting of one rule, as baffle.lr=0.3; repeatable.")
    ] = None,
    data: _of_run.data = None,
    model: _of_run.model = None,
    init: _of_run.init = None,
    partition: _of_run.partition = None,
    clients: _of_run.clients = None,
    clients_per_round: _of_run.clients_per_round = None,
    clients_per_evaluation: _of_run.clients_per_evaluation = None,
    resample: _of_run.resample = None,
    samples_per_client: _of_run.samples_per_client = None,
    rounds: _of_run.rounds = None,
    epochs: _of_run.epochs = None,
    local_steps: _of_run.local_steps = None,
    batch_size: _of_run.batch_size = None,
    lr: _of_run.lr = None,
    lr_schedule: _of_run.lr_schedule = None,
    strategy: _of_run.strategy = None,
    fleet: _of_run.fleet = None,
    adapt: _of_run.adapt = None,
    micro_batch: _of_run.micro_batch = None,
    audit: _of_run.audit = None,
    holdout: _of_run.holdout = None,
    evaluate_every: _of_run.evaluate_every = None,
    diagnose_every: _of_run.diagnose_every = None,
    seed: Annotated[int | None, _flag("seed", "The first seed.")] = None,
    threads: _of_run.threads = None,
    name: Annotated[str | None, typer.Option(help="Name of the comparison's folder.")] = None,
    options: _of_run.options = None,
    runs_dir: _of_run.runs_dir = RUNS,
    as_json: Json = False,
) -> None:
    """Run the same experiment with several rules and seeds: accuracy beside memory, bytes and compute.

    Each rule has its own learning rate unless --lr or --for says otherwise. The same command again goes on.
    """
    flags = {
        "data": data, "model": model, "init": init, "partition": partition, "clients": clients,
        "clients-per-round": clients_per_round, "clients-per-evaluation": clients_per_evaluation,
        "resample": resample, "samples-per-client": samples_per_client,
        "rounds": rounds, "epochs": epochs, "local-steps": local_steps, "batch-size": batch_size,
        "lr": lr, "lr-schedule": lr_schedule, "strategy": strategy, "fleet": fleet, "adapt": adapt,
        "micro-batch": micro_batch, "audit": audit, "holdout": holdout, "evaluate-every": evaluate_every,
        "diagnose-every": diagnose_every, "seed": seed, "threads": threads, "name": name,
    }  # fmt: skip
    common = from_toml(experiment, {key: value for key, value in flags.items() if value is not None}, options or [])
    command = shlex.join(["fedforward", *sys.argv[1:]])
    console = Console(stderr=True)
    try:
        request = Request(common, own_settings(own or [], rules_named(rules)), seeds, runs_dir, command)
        comparison = compare_rules(request, console)
    except KeyboardInterrupt:
        console.print(f"interrupted; go on with: {command}", soft_wrap=True, highlight=False, markup=False)
        raise typer.Exit(130) from None
    if as_json:
        _print_json(as_object(comparison))
    else:
        show(comparison, Console())


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


def _show_result(experiment: Experiment, folder: Path, as_json: bool, failure: RunFailed | None = None) -> None:
    """Print what a run came to, and in JSON whether it finished or why not."""
    summary = summarise(read_run(folder)) | {"name": experiment.name}
    page = folder / "report.html"
    if as_json:
        ended = {"status": "failed", "error": _one_line(failure)} if failure else {"status": "finished"}
        _print_json(ended | summary | {"path": str(folder), "report": str(page)})
        return
    Console().print(final_table(experiment, summary))
    print(f"report: {page}")


def _print_json(values: dict[str, Any]) -> None:
    """Print one JSON object; what is not finite is null, since JSON knows no NaN."""
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
    print(json.dumps(finite, allow_nan=False))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


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
        Console(stderr=True, soft_wrap=True).print(f"[red]error:[/red] {escape(_one_line(mistake))}")
        sys.exit(2)
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
