"""What the scripts of peers share: the workload, a clock, and the check that they did the work.

They run in environments without FedForward, so `bare` is loaded from its file.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import torch

ATOL = 1e-2  # of the CNN, where rounding decides near ties of pooling; steps that are not the same are far beyond it


def _loaded():
    spec = importlib.util.spec_from_file_location("bare", Path(__file__).parents[1] / "bare.py")
    sys.modules["bare"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


bare = _loaded()


class Work:
    """The workload that a script's command line names: MODEL ROUNDS."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        self.workload, self.rounds = sys.argv[1], int(sys.argv[2])
        self.model = getattr(bare, self.workload)
        self.x, self.y = bare.synthetic()
        # Of each client that is visited, in order, its samples in the order of its batches.
        self.visits = [rows.flatten() for clients in bare.schedule(self.rounds) for rows in clients]
        self.done: list[float] = []
        self.began = time.perf_counter()

    def net(self) -> torch.nn.Sequential:
        """Return the network with the weights that every loop starts from."""
        net = self.model(bare.SHAPE, bare.CLASSES)
        with torch.no_grad():
            for p, value in zip(net.parameters(), bare.initial(self.model), strict=True):
                p.copy_(value)
        return net

    def round_done(self) -> None:
        """Note that a round is over."""
        self.done.append(time.perf_counter())

    def tell(self, runner: str, weights: Iterable[torch.Tensor]) -> None:
        """Print the figures, if the weights are those of the plain loop."""
        total = bare.WARM_UP + self.rounds
        if len(self.done) != total:
            sys.exit(f"{runner} ran {len(self.done)} rounds, not {total}")
        steady = self.done[-1] - self.done[bare.WARM_UP - 1]
        _, wanted = bare.plain(self.x, self.y, self.rounds, self.model)
        off = max(float((p.detach() - q).abs().max()) for p, q in zip(weights, wanted, strict=True))
        if off > ATOL:
            sys.exit(f"{runner} came to other weights than the plain loop: {off:.2g} apart")
        start = max(0.0, self.done[-1] - self.began - steady * total / self.rounds)
        pace = self.rounds / steady
        print(json.dumps({"runner": runner, "workload": self.workload, "rounds_per_s": pace, "start_s": start}))
