"""How time and memory grow with the clients that exist, and with those of a round.

Digits, resampled; every figure is of a process of its own, on the inline engine:

    registered      100 … 1,000,000 clients, 100 of them a round, mono-forward
    a round         10 … 1,000 of 10,000 clients a round, mono-forward
    in models       1,000 clients a round that send a model of a million parameters, backprop: what is resident at the
                    most above what was when the world stood, in units of that model. Clients in flight may take
                    memory; a round's answers may not.
"""

from __future__ import annotations

import json
import logging
import resource
import statistics
import subprocess
import sys
import threading
import time
from typing import Any

import psutil
import torch

from ...server.rounds import RunFailed
from ..engines.choice import choose
from ..experiment import Experiment
from ..world import build
from . import workload
from .settings import Row, Settings

REGISTERED = (100, 1_000, 10_000, 100_000, 1_000_000)
SAMPLED = (10, 100, 1_000)
WARM_UP, ROUNDS, LOOK = 1, 3, 0.002  # rounds, rounds, seconds between two looks at the memory
COMMON = {
    "clients": 10_000, "clients_per_round": 100, "clients_per_evaluation": 1, "resample": True, "epochs": 1,
    "rounds": WARM_UP + ROUNDS + 1, "evaluate_every": WARM_UP + ROUNDS + 1, "engine": "inline",
}  # fmt: skip
MILLION = {"clients_per_round": 1_000, "samples_per_client": 20, "rule": "backprop", "lr": 0.01, "rounds": 2}
WIDE = {"model": {"hidden": [960, 960]}}  # 994,570 parameters


def measure(settings: Settings) -> list[Row]:
    """Return a row for each size."""
    asked: list[tuple[str, dict[str, Any]]] = [
        *(("registered", {"clients": n}) for n in REGISTERED),
        *(("a round", {"clients_per_round": n}) for n in SAMPLED),
        ("in models", MILLION | {"set": WIDE}),
    ]
    rows = []
    for what, changes in asked:
        chosen = COMMON | {"devices": settings.device if settings.device != "cpu" else ""} | changes
        settings.tell(f"scaling: {chosen['clients']:,} clients, {chosen['clients_per_round']:,} a round")
        row = {"what": what, "clients": chosen["clients"], "clients_per_round": chosen["clients_per_round"]}
        found = in_a_process(chosen)
        if what == "in models":
            found["above_start_models"] = found["above_start_bytes"] / found["model_bytes"]
        rows.append(row | found)
    return rows


def in_a_process(changes: dict[str, Any]) -> Row:
    """Return what `observe` finds in a process of its own.

    Raises:
        RunFailed: if it ends without an answer, with the last line that it wrote.
    """
    command = [sys.executable, "-m", __name__, json.dumps(changes)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        why = (done.stderr.strip() or "it said nothing").splitlines()[-1]
        raise RunFailed(f"a process of the scaling benchmark ended with exit code {done.returncode}: {why}")
    return json.loads(done.stdout.splitlines()[-1])


def observe(changes: dict[str, Any]) -> Row:
    """Run an experiment here and return its seconds and its memory; the first rounds are not timed."""
    began = time.perf_counter()
    world = build(Experiment(**changes))
    choice = choose(world)
    ready = time.perf_counter()
    with Resident() as resident:
        done = workload.run(world, choice)
    first = min(WARM_UP, len(done) - 1)
    paces = [later - earlier for earlier, later in zip(done[first - 1 :], done[first:], strict=False)]
    seconds = statistics.median(paces) if paces else done[0] - ready
    return {
        "start_s": ready - began,
        "round_s": seconds,
        "client_ms": 1000 * seconds / world.experiment.sampled(),
        "model_bytes": sum(p.nbytes for p in world.trainer.initial_params().values()),
        "peak_resident_bytes": peak_resident(),
        "above_start_bytes": resident.peak - resident.start,
    }


class Resident:
    """Looks at this process's resident memory until it is left. Use as a context manager."""

    def __enter__(self) -> Resident:
        self._process, self._over = psutil.Process(), threading.Event()
        self.start = self.peak = self._process.memory_info().rss
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._over.wait(LOOK):
            self.peak = max(self.peak, self._process.memory_info().rss)


def peak_resident() -> int:
    """Return the most bytes that this process ever had resident; macOS counts bytes, Linux KiB."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most


if __name__ == "__main__":
    logging.getLogger("flwr").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    print(json.dumps(observe(json.loads(sys.argv[1]))))
