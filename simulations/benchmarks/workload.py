"""The shared workload as an experiment of ours, and the whole stack timed on it.

Whole means: Flower's strategy and messages, the protocol, byte counts, every row of the run database, model hashes and
checkpoints. Neither side evaluates in the rounds that are timed.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from ...server.job import Job
from ...server.records import Records
from ...server.rounds import RunFailed, run_rounds
from ..datasets import DataSet, Samples
from ..engines.choice import Choice, choose, grid_of
from ..experiment import Experiment
from ..run import COMMIT_SECONDS
from ..world import World, build
from . import bare
from .settings import Settings, Timing, timing

MLP = {"model": "mlp", "set": {"model": {"hidden": [200]}}}
CNN = {"model": f"{bare.__name__}:cnn"}
MODELS = {"mlp": MLP, "cnn": CNN}
PLAIN_SGD = {"dfa": {"momentum": 0.0}}  # options of rules whose own optimizer is another than the loops'
LONG = 10_000  # rounds of the run that `auto` chooses for: the steady pace is compared, so starting must not count


@lru_cache(maxsize=1)
def synthetic() -> DataSet:
    """Return the images of all clients; there is nothing to learn, and the test split is not used."""
    x, y = bare.synthetic()
    train = Samples(x, y, torch.arange(len(y)), 1.0)
    return DataSet("synthetic", train, train.subset(torch.arange(1)), bare.CLASSES, bare.SHAPE, {})


def experiment(settings: Settings, **changes: Any) -> Experiment:
    """Return the workload: rounds of warm-up, those that are timed, and one more, which evaluates."""
    rounds = settings.warm_up + settings.rounds + 1
    common = {
        "rule": "backprop", "data": f"{__name__}:synthetic", "clients": bare.CLIENTS,
        "clients_per_round": bare.SAMPLED, "clients_per_evaluation": 1, "epochs": 1, "batch_size": bare.BATCH,
        "lr": bare.LR, "holdout": 0.0, "rounds": rounds, "evaluate_every": rounds,
    }  # fmt: skip
    own = PLAIN_SGD.get(changes.get("rule"), {})
    return Experiment(**common | changes | {"set": changes.get("set", {}) | ({"rule": own} if own else {})})


def engines(device: str) -> dict[str, dict[str, str]]:
    """Return the settings of an experiment for every engine that a device has, by the name that tables use."""
    if device != "cpu":
        found = {name: {"engine": name, "devices": device} for name in ("inline", "cohort")}
        return found | {"pool(1)": {"engine": "pool", "devices": device}, "auto": {"devices": device}}
    pools = {f"pool({n})": {"engine": "pool", "devices": f"cpu:{n}"} for n in (1, 2)}
    cohorts = {"cohort": {"engine": "cohort"}, "cohort(2)": {"engine": "cohort", "devices": "cpu:2"}}
    return {"inline": {"engine": "inline"}, **cohorts, **pools, "auto": {"engine": "auto"}}


class Clock:
    """Notes when each round is over; a run whose clients fail is not one to be timed."""

    def __init__(self) -> None:
        self.done: list[float] = []

    def round_started(self, server_round: int, clients: int) -> None:
        """Do nothing."""

    def round_done(self, row: Mapping[str, Any], clients: list[Mapping[str, Any]]) -> None:
        """Note the time."""
        if row["failed"]:
            why = next(client["reason"] for client in clients if client["status"] != "ok")
            raise RunFailed(f"{row['failed']} clients of round {row['round']} failed: {why}")
        self.done.append(time.perf_counter())


def time_run(asked: Experiment, settings: Settings) -> Timing:
    """Run an experiment of ours, its world and its engine made anew, and return its timing."""
    began = time.perf_counter()
    world = build(asked)
    done = run(world, choice_for(world))
    first, last = done[settings.warm_up - 1], done[settings.warm_up + settings.rounds - 1]
    return timing(last - began, last - first, settings)


def choice_for(world: World) -> Choice:
    """Return the engine of a world; if it is `auto`, as for a long run."""
    return choose(replace(world, experiment=world.experiment.replace(rounds=LONG)))


def run(world: World, choice: Choice) -> list[float]:
    """Run all rounds of a world and return when each was over."""
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder, grid_of(world, choice) as grid:
        records = Records(Path(folder), delay=COMMIT_SECONDS)
        try:
            run_rounds(
                Job(world.plan(), world.strategy(), world.initial(), world.evaluate, records, clock, world.complete),
                grid,
            )
        finally:
            records.close()
    return clock.done
