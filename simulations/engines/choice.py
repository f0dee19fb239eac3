"""Which engine an experiment runs on: the one it names, or, for `auto`, a fast one that suits it.

Workers give the very numbers of this process and begin in a few seconds, so they pay for all but short runs: a short
probe trains one client and takes the time. The last bits of a cohort's numbers are its own, so no clock may decide for
it: the experiment alone does, and whether there is a GPU. Side by side pay scalar rules, whose clients share their
random directions, and small clients whose steps are a few products.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import current_process
from typing import NamedTuple

import torch
from flwr.app import Message, RecordDict

from ... import protocol
from ...algorithms import RULES, ScalarRule
from ...server.fold import WORTH as SMALL  # larger clients, side by side, are too much for a CPU's caches
from ..experiment import Experiment, ExperimentError
from ..world import World
from .cohort import CohortGrid
from .flower import FlowerGrid
from .flower import check as check_flower
from .inline import InlineGrid
from .local import LocalGrid
from .pool import PoolGrid

WORTH = 15.0  # seconds of one core's work from which on workers pay
FEW = 5  # clients that save more side by side than two workers do
LONG = 5e11  # FLOPs of a run of small clients from which on workers pay
PROBED = 2.0  # seconds of a probe that need not be repeated


class Choice(NamedTuple):
    """An engine, the devices it uses, and why."""

    engine: str
    devices: tuple[str, ...]  # "cpu", "cuda:0", …: one a worker
    why: str

    def named(self) -> str:
        """Return the devices as `--devices` takes them; nothing for the one that needs no name."""
        kinds = Counter(self.devices) if self.devices != ("cpu",) else {}
        return ",".join(f"cpu:{n}" if device == "cpu" else ",".join([device] * n) for device, n in kinds.items())

    def __str__(self) -> str:
        several = f" × {len(self.devices)}" if len(self.devices) > 1 else ""
        return f"engine {self.engine} on {', '.join(sorted(set(self.devices)))}{several}: {self.why}"


def choose(world: World) -> Choice:
    """Return where a world's clients run.

    Raises:
        ExperimentError: if its devices are not there, or its engine cannot use them.
    """
    e = world.experiment
    devices = devices_named(e.devices)
    if e.engine != "auto":
        if e.engine == "flower":
            check_flower(e, devices)
        if e.engine in ("pool", "flower"):
            devices = devices or ("cpu",) * _most_workers(e)
        elif len(devices) > 1 and e.engine == "inline":
            raise ExperimentError(f"engine inline uses one device, not {e.devices}: use --engine pool")
        return Choice(e.engine, devices or ("cpu",), "as asked")
    if len(devices) > 1:
        return Choice("pool", devices, "a worker for each of --devices")
    if not devices and torch.cuda.is_available():
        devices = ("cuda:0",)
    if devices and devices[0] != "cpu":
        batched = world.trainer.rule.vmappable
        why = "its clients are batched" if batched else f"{e.rule} cannot be batched over clients"
        return Choice("cohort" if batched else "inline", devices, why)
    reason, work = _side_by_side(world)
    if reason:
        workers = _most_workers(e) if not devices and work * e.rounds > LONG and not _is_worker() else 1
        return Choice("cohort", ("cpu",) * workers, reason)
    most = 1 if devices or _is_worker() else _most_workers(e)
    alone = seconds_of_a_client(world)
    total = alone * e.sampled() * e.rounds
    if e.sampled() == 1 or total < WORTH:
        few = "one client a round" if e.sampled() == 1 else f"about {max(total, 1):.0f} s of training"
        return Choice("inline", ("cpu",), f"{few}, not worth workers")
    if most == 1:
        return Choice("inline", ("cpu",), "there is one core to use")
    return Choice("pool", ("cpu",) * most, f"about {_duration(total)} of training for one core")


def grid_of(world: World, choice: Choice, on_reply: Callable[[], None] | None = None) -> LocalGrid | FlowerGrid:
    """Return the grid of a choice, to be used as a context manager."""
    e, common = world.experiment, (world.experiment.clients, on_reply, world.work)
    if choice.engine == "pool" or (len(choice.devices) > 1 and choice.engine == "cohort"):
        params = world.trainer.initial_params()
        return PoolGrid(e.to_run_config(), choice.devices, params, *common)
    if choice.engine == "flower":
        return FlowerGrid(e, len(choice.devices), on_reply)
    world.trainer.to(choice.devices[0])
    if choice.engine == "cohort":
        return CohortGrid(world, on_reply)
    return InlineGrid(world.app(), e.clients, e.to_run_config(), *common[1:])


def devices_named(text: str) -> tuple[str, ...]:
    """Return the devices of a list such as "cpu:2" (two workers) or "cuda:0,cuda:1": one name a worker.

    Raises:
        ExperimentError: if the text is no such list, or a GPU is not there.
    """
    found: list[str] = []
    for name in filter(None, (part.strip() for part in text.split(","))):
        kind, _, number = name.partition(":")
        if kind not in ("cpu", "cuda") or not (number.isdigit() or not number):
            raise ExperimentError(f"--devices wants cpu:WORKERS or cuda:GPU, with commas between, not '{name}'")
        if kind == "cpu":
            found += ["cpu"] * int(number or 1)
            continue
        if int(number or 0) >= torch.cuda.device_count():
            there = f"{torch.cuda.device_count()} GPU(s)" if torch.cuda.is_available() else "no GPU"
            raise ExperimentError(f"--devices {name}: PyTorch sees {there} here")
        found.append(f"cuda:{number or 0}")
    if text.strip() and not found:
        raise ExperimentError(f"--devices {text} names no worker: write cpu:2 or cuda:0")
    return tuple(found)


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _most_workers(experiment: Experiment) -> int:
    """Return how many workers have a client to train, and cores for their threads."""
    return min(max(cores() // experiment.threads, 1), experiment.sampled())


def _is_worker() -> bool:
    """Return whether this process may have no children."""
    return current_process().daemon


def _side_by_side(world: World) -> tuple[str, float]:
    """Return why clients side by side cost less than one by one, and the FLOPs of a round; no reason if they do not.

    Of rules that are not ours, those that say so of their steps.
    """
    e, trainer = world.experiment, world.trainer
    rule, work = trainer.rule, 0.0
    ours = type(rule) in RULES.values() and rule.vmappable and trainer.net.is_dense
    alone = isinstance(rule, ScalarRule) and rule.own  # no two steps look along the same directions
    if e.sampled() < FEW or alone or not (ours or rule.stackable(trainer.net)):
        return "", 0.0
    with suppress(Exception):  # of a user's rule: its clients will say what is wrong
        work = trainer.flops(world.samples(0), world.asked, None)
    if rule.exchange == "scalars":
        return "its clients share their random directions", work * e.sampled()
    small = 0 < work < SMALL and rule.autograd != "whole network"
    return ("its clients are small and need no graph of the network" if small else ""), work * e.sampled()


def seconds_of_a_client(world: World) -> float:
    """Return how long a client trains for a round, the second time or, if that is long, the first; it is forgotten."""
    grid = InlineGrid(world.app(), world.experiment.clients, world.experiment.to_run_config())
    plan, seconds = world.plan(), 0.0
    config = protocol.train_config(
        server_round=1,
        lr=plan.lr,
        epochs=plan.epochs,
        batch_size=plan.batch_size,
        steps=plan.steps,
        evaluate=False,
    )
    content = RecordDict({protocol.ARRAYS: world.initial(), protocol.CONFIG: config})
    for _ in range(2):
        started = time.perf_counter()
        grid.send_and_receive([Message(content, dst_node_id=1, message_type="train")])
        seconds = time.perf_counter() - started
        if seconds > PROBED:
            break
    return seconds


def _duration(seconds: float) -> str:
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"
