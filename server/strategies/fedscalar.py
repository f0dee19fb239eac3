"""FedScalar: clients send scalars along shared directions, the server applies their average.

The averaging of FedSGD (McMahan et al., arXiv 1602.05629, 2017, section 3) carried over to scalars, as BAFFLE
(arXiv 2301.12195) and DeComFL (arXiv 2405.15861, ICLR 2025) use it. With s_i,j the K scalars of client i in local step
j and n_i its samples, over the clients that took step j:

    s̄_j = Σ_i n_i s_i,j / Σ_i n_i            w ← apply(w, directions of (seed, round, j), s̄_j)      j = 0, 1, …

The model never travels up, and any replica repeats the update from the averaged scalars (see server/scalars.py).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg
from torch import Tensor

from ... import protocol
from ...algorithms.rule import ScalarRule
from ..scalars import apply_round


class FedScalar(FedAvg):
    """Average scalars by samples and apply them to the server's model.

    Args:
        rule: the scalar rule that all clients run.
        seed: the run seed, from which directions are made.
        **fedavg: FedAvg's own options (fractions, minimum nodes, ...).

    Attributes:
        averaged: the averaged scalars of the last round, (steps · K,) float32, or None.
    """

    def __init__(self, rule: ScalarRule, seed: int, **fedavg) -> None:
        super().__init__(**fedavg)
        self.rule, self.seed = rule, seed
        self.averaged: Tensor | None = None

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Send the model and remember it: aggregation starts from it."""
        self._sent, self._lr = arrays, float(config["lr"])
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Return the model after the averaged scalars, and the clients' metrics averaged by samples."""
        self.averaged = None
        valid, _ = self._check_and_log_replies(replies, is_train=True, validate=False)
        if not valid:
            self._sent = None
            return None, None
        contents = [reply.content for reply in valid]
        answers = [protocol.decode_scalars(content[protocol.SCALARS]) for content in contents]
        samples = [protocol.only(content.metric_records)[self.weighted_by_key] for content in contents]
        self.averaged = average(answers, samples)
        params = protocol.decode_params(self._sent)
        self._sent = None  # or every checkpoint would hold the model twice
        apply_round(self.rule, params, self.seed, server_round, self.averaged, self._lr)
        return protocol.encode_params(params), self.train_metrics_aggr_fn(contents, self.weighted_by_key)


def average(answers: list[Tensor], samples: list[float]) -> Tensor:
    """Return the sample-weighted mean of scalars; a client that took fewer steps has no say in the later ones.

    The sum runs in float64 over clients in the order given, so that it does not depend on who answered first.
    """
    total = torch.zeros(max(len(answer) for answer in answers), dtype=torch.float64)
    weight = torch.zeros_like(total)
    for answer, n in zip(answers, samples, strict=True):
        total[: len(answer)] += n * answer.double()
        weight[: len(answer)] += n
    return (total / weight).float()
