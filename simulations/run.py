"""Start, resume and finish a run: the folder it lives in, and the engine it runs on."""

from __future__ import annotations

import json
import os
import pickle
import platform
import shutil
import sqlite3
import sys
import tomllib
from collections.abc import Callable
from dataclasses import replace
from logging import getLogger
from pathlib import Path

import flwr
import numpy as np
import torch
from flwr.app import ArrayRecord, Context

from .. import __version__
from ..server.checkpoint import load as load_checkpoint
from ..server.job import Job, Observer
from ..server.records import EXPERIMENT, NotARun, Records, read_run, write_atomically
from ..server.rounds import RunFailed, model_hash, run_rounds
from .engines.choice import Choice, choose, grid_of
from .engines.pool import PoolFailed
from .experiment import Experiment, ExperimentError, from_mapping, from_run_config
from .population import Admission
from .report import write_report
from .world import World, build, resolved

RUNS = Path("runs")
COMMIT_SECONDS = 0.5  # most work that a killed process loses, beside the round that was under way
log = getLogger("fedforward")


def start(experiment: Experiment, runs: Path = RUNS) -> tuple[World, Path]:
    """Check an experiment, make its run folder and return (world, folder).

    The folder appears whole or not at all: it is made beside its place and renamed.

    Raises:
        ExperimentError, DataError, RuleError, NetworkError: before anything is written.
    """
    experiment = resolved(experiment)
    if not experiment.name:
        experiment = experiment.replace(name=_free_name(experiment, runs))
    folder = runs / experiment.name
    if os.path.lexists(folder):
        raise ExperimentError(
            f"{folder} exists: choose another --name, or go on with it by `fedforward run --resume {folder}`"
        )
    world = build(experiment)
    world.initial()  # before anything is written: the run it begins with may not be there
    if experiment.engine == "auto":  # recorded as chosen, since the last bits of a cohort's numbers are its own
        choice = choose(world)
        devices = choice.named() if choice.engine == "cohort" else experiment.devices
        experiment = experiment.replace(engine=choice.engine, devices=devices)
        world = replace(world, experiment=experiment, chosen=str(choice))
    admissions = world.admissions()
    if admissions and not any(admission.fit for admission in admissions):
        raise ExperimentError(_nobody_fits(admissions[0], experiment))
    _make(folder, experiment)
    return world, folder


def reopen(folder: Path) -> tuple[World, Path]:
    """Return (world, folder) of an unfinished run.

    Raises:
        ExperimentError: if the folder holds no run, another's, or a finished one.
        RunInUse: if another process is at it.
    """
    try:
        info = read_run(folder).info
    except NotARun as error:
        raise ExperimentError(f"{error}: name a folder under {RUNS}/") from None
    if not info:
        raise ExperimentError(f"{folder} cannot go on: its database has no run in it")
    if info["status"] == "finished":
        raise ExperimentError(
            f"{folder} is finished: to run it again, `fedforward run {folder / EXPERIMENT} --name NEW-NAME`"
        )
    file = folder / EXPERIMENT
    if file.is_file() and file.read_text(errors="replace") != info["experiment"]:
        raise ExperimentError(f"{file} differs from the experiment this run began with: restore it, or start anew")
    records = Records(folder)  # first of all the lock: a run that goes on cannot be judged
    try:
        world = build(from_mapping(tomllib.loads(info["experiment"])))  # imports what the checkpoint may name
        _warn_of_other_versions(folder, info)
        _check_checkpoint(folder, records)
    finally:
        records.close()
    return world, folder


def execute(
    world: World,
    folder: Path,
    observer: Observer | None = None,
    on_reply: Callable[[], None] | None = None,
    choice: Choice | None = None,
) -> None:
    """Run a world's experiment to its end on its engine, and write the report.

    Args:
        world: what to run.
        folder: the run's folder.
        observer: whoever wants to watch.
        on_reply: called after each client.
        choice: where clients run; None leaves it to the experiment.

    Raises:
        RunFailed: if a round ended without a single update, or the disk is full; the run can be resumed.
        RunInUse: if another process is at it.
    """
    choice = choice or choose(world)
    job = _job(world, folder, observer)
    remedy = f"go on with fedforward run --resume {folder}"
    try:
        with grid_of(world, choice, on_reply) as grid:
            run_rounds(job, grid)
        job.records.finish()
        remedy = f"the run is finished, and its report wants fedforward report {folder}"
        write_report([folder])
    except RunFailed:
        job.records.finish("failed")
        write_report([folder])
        raise
    except (TimeoutError, PoolFailed) as error:  # the former an OSError too, but of the network
        job.records.finish("failed")
        raise RunFailed(str(error)) from error
    except BrokenPipeError:  # nobody reads what the observer prints
        raise
    except (OSError, sqlite3.OperationalError) as error:
        raise RunFailed(f"cannot write {folder} ({error}): {remedy}") from error
    finally:
        job.records.close()


def prepare(context: Context) -> Job:
    """Return the job of a Flower run: our ServerApp's beginning."""
    runs = Path(str(context.run_config.get("runs-dir", RUNS)))
    return _job(*start(from_run_config(context.run_config).replace(engine="flower"), runs), observer=None)


def finish(job: Job) -> None:
    """Mark a Flower run finished, write its report and say where it is: our ServerApp's end."""
    job.records.finish()
    print(f"finished: {write_report([job.records.folder])}", file=sys.stderr)


def environment() -> dict[str, str]:
    """Return the versions that a run's numbers may depend on."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "flwr": flwr.__version__,
        "machine": platform.machine(),
    }


def _nobody_fits(first: Admission, experiment: Experiment) -> str:
    remedy = "" if experiment.adapt == "rule" else " or try --adapt rule"
    return (
        f"no client fits its device; the first, on {first.device.name}, is {first.words}:"
        f" choose a larger --fleet or a smaller --model{remedy}"
    )


def _make(folder: Path, experiment: Experiment) -> None:
    """Make the folder of a new run, whole or not at all."""
    making = folder.parent / f".{folder.name}.{os.getpid()}"
    try:
        records = Records(making)
        records.start(experiment.name, experiment.to_toml(), __version__, environment())
        records.close()
        write_atomically(making / EXPERIMENT, experiment.to_toml().encode())
        making.rename(folder)
    except BaseException as error:
        shutil.rmtree(making, ignore_errors=True)
        if not isinstance(error, OSError | sqlite3.Error):
            raise
        reason = getattr(error, "strerror", None) or error
        raise ExperimentError(f"cannot write {folder} ({reason}): choose another --runs-dir or --name") from None


def _job(world: World, folder: Path, observer: Observer | None) -> Job:
    records = Records(folder, delay=COMMIT_SECONDS)
    begun = records.last_round() >= 0  # it goes on from its checkpoint
    initial = ArrayRecord() if begun else world.initial()
    records.go_on()
    return Job(
        world.plan(), world.strategy(), initial, world.evaluate, records, observer, world.complete, world.diagnose
    )


def _check_checkpoint(folder: Path, records: Records) -> None:
    """Raise ExperimentError unless the checkpoint is the one of the last committed round."""
    done = records.last_round()
    if done < 0:
        return
    path = records.checkpoint_path(done)
    if not path.is_file():
        raise ExperimentError(f"{folder} cannot go on: its checkpoint {path.name} is missing, so start anew")
    try:
        same = model_hash(load_checkpoint(path.read_bytes()).arrays) == records.model_sha256(done)
    except (pickle.UnpicklingError, EOFError, AttributeError, ImportError, IndexError, TypeError, ValueError):
        same = False
    if not same:
        raise ExperimentError(
            f"{folder} cannot go on: {path.name} is not the model that round {done} ended with, so start anew"
        )


def _warn_of_other_versions(folder: Path, info: dict[str, str]) -> None:
    """Say so if the run began under other versions: its numbers may then differ from an undisturbed run's."""
    before = json.loads(info["environment"] or "{}")
    changed = [f"{name} {before[name]} → {now}" for name, now in environment().items() if before.get(name, now) != now]
    if changed:
        log.warning("%s began under other versions: %s", folder, ", ".join(changed))


def _free_name(experiment: Experiment, runs: Path) -> str:
    """Return rule-data, or the first rule-data-2, -3, … that is free."""
    parts = (experiment.rule.rpartition(":")[2], Path(experiment.data.rpartition(":")[2]).resolve().stem)
    stem = "-".join(part.lower().replace("/", "-") for part in parts)
    name, number = stem, 2
    while (runs / name).exists():
        name, number = f"{stem}-{number}", number + 1
    return name
