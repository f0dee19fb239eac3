"""What the inline engine costs beside the bare arithmetic.

Workload: 100 clients of 60 synthetic 28×28 images, 10 clients a round, one local epoch, batch 20, SGD 0.1 on an MLP
784-200-10, FedAvg weighted by samples. The bare loop does the same training steps and the same averaging in a plain
PyTorch loop; ours adds sampling, messages, byte counts, records, checkpoints and hashes. Neither evaluates. Both run
alternately in this process, on one thread, and their medians are compared.
"""

from __future__ import annotations

import json
import logging
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from torch import nn

from ...client import make_client_app
from ...server.job import Job
from ...server.records import Records
from ...server.rounds import run_rounds
from ..datasets import DataSet, Samples
from ..engines.inline import InlineGrid
from ..experiment import Experiment
from ..world import World, build

CLIENTS, SAMPLES, SAMPLED, BATCH, LR = 100, 60, 10, 20, 0.1


def synthetic() -> DataSet:
    """Return 6,000 random images of 10 classes; the test split is not used."""
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.standard_normal((CLIENTS * SAMPLES, 1, 28, 28), dtype=np.float32))
    y = torch.from_numpy(rng.integers(0, 10, CLIENTS * SAMPLES))
    train = Samples(x, y, torch.arange(len(y)), 1.0)
    return DataSet("synthetic", train, train.subset(torch.arange(1)), 10, (1, 28, 28), {})


def bare_rounds(rounds: int, world: World) -> float:
    """Return seconds of `rounds` rounds of a plain loop with torch.optim and in-memory averaging."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(784, 200), nn.ReLU(), nn.Linear(200, 10))
    data, rng = world.data.train, np.random.default_rng(0)
    model = [p.detach().clone() for p in net.parameters()]
    started = time.perf_counter()
    for _ in range(rounds):
        total = [torch.zeros_like(p) for p in model]
        for client in rng.choice(CLIENTS, SAMPLED, replace=False):
            rows = world.partitions[client]
            with torch.no_grad():
                for p, q in zip(net.parameters(), model, strict=True):
                    p.copy_(q)
            optimizer = torch.optim.SGD(net.parameters(), lr=LR)
            for part in torch.from_numpy(rng.permutation(len(rows))).split(BATCH):
                x, y = data.batch(rows[part])
                optimizer.zero_grad()
                nn.functional.cross_entropy(net(x), y).backward()
                optimizer.step()
            for t, p in zip(total, net.parameters(), strict=True):
                t.add_(p.detach(), alpha=1 / SAMPLED)
        model = total
    return time.perf_counter() - started


def our_rounds(rounds: int, world: World) -> float:
    """Return seconds of `rounds` rounds of our whole stack, commits and all, after one round of warm-up."""
    e = world.experiment.replace(rounds=rounds + 2, evaluate_every=rounds + 3)
    world = replace(world, experiment=e)
    app = make_client_app(lambda context: world.client(int(context.node_config["partition-id"])))
    with tempfile.TemporaryDirectory() as folder:
        records = Records(Path(folder))
        clock = _Clock()
        job = Job(world.plan(), world.strategy(), world.initial(), world.evaluate, records, clock)
        run_rounds(job, InlineGrid(app, CLIENTS, e.to_run_config()))
        records.close()
    return clock.done[rounds] - clock.done[0]  # the last round evaluates, and is not among them


class _Clock:
    """Notes when each round is on disk."""

    def __init__(self) -> None:
        self.done: list[float] = []

    def round_started(self, server_round: int, clients: int) -> None:
        """Do nothing."""

    def round_done(self, row: dict, clients: list) -> None:
        """Note the time."""
        self.done.append(time.perf_counter())


def main(
    rounds: Annotated[int, typer.Option(help="Rounds in one measurement.")] = 20,
    repeats: Annotated[int, typer.Option(help="Measurements of each.")] = 5,
    rule: Annotated[str, typer.Option(help="The rule our side runs.")] = "backprop",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Print the medians of both and their ratio."""
    logging.getLogger("flwr").setLevel(logging.ERROR)
    world = build(
        Experiment(
            rule=rule,
            data=f"{__name__}:synthetic",
            clients=CLIENTS,
            clients_per_round=SAMPLED,
            epochs=1,
            batch_size=BATCH,
            lr=LR,
            holdout=0.0,
            set={"model": {"hidden": [200]}},
        )
    )
    bare_rounds(2, world)
    pairs = [(bare_rounds(rounds, world), our_rounds(rounds, world)) for _ in range(repeats)]
    bare, ours = (statistics.median(rounds / seconds for seconds in column) for column in zip(*pairs, strict=True))
    ratio = statistics.median(o / b for b, o in pairs)
    result = {"rule": rule, "bare_rounds_per_s": bare, "inline_rounds_per_s": ours, "time_ratio": ratio}
    if as_json:
        print(json.dumps(result))
    else:
        print(f"bare loop {bare:.1f} rounds/s   inline engine {ours:.1f} rounds/s   time ratio {ratio:.2f} ({rule})")


if __name__ == "__main__":
    typer.run(main)
