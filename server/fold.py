"""A round's updates, folded into one running mean as they come: memory does not grow with clients per round.

    w = Σ n_i w_i / Σ n_i        (McMahan et al., arXiv 1602.05629, 2017, FedAvg)

The order of the sum is the same on every engine: most work first. Clients that are too small to be worth a message of
their own are summed in groups of consecutive ones, and then the groups: a worker process can sum a group by itself, and
the sum has the same bits wherever it is taken.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAdagrad, FedAdam, FedAvg, FedAvgM, FedYogi, Strategy
from torch import Tensor

from .. import protocol
from ..algorithms.rule import Tensors

# What these make of a round is a function of the mean; of FedAvg.aggregate_train it is the mean itself.
OF_THE_MEAN = {kind.aggregate_train for kind in (FedAvg, FedAvgM, FedAdagrad, FedAdam, FedYogi)}
WORTH = 1e8  # FLOPs of a client that is worth a message: some milliseconds, beside which that costs little
T = TypeVar("T")


def folds(strategy: Strategy) -> bool:
    """Return whether a strategy's aggregation needs no more of a round than the mean of its models by samples."""
    return (
        getattr(type(strategy), "aggregate_train", None) in OF_THE_MEAN
        and strategy.weighted_by_key == protocol.SAMPLES
        and strategy.train_metrics_aggr_fn is FedAvg().train_metrics_aggr_fn
    )


def groups_of(clients: Sequence[T], work: Callable[[T], float]) -> list[list[T]]:
    """Return a round's clients in 2, 4, 8, ... groups of consecutive ones of equal work, about four times `WORTH`.

    Clients that are worth a message themselves, or whose work is not known, are groups of one.

    Args:
        clients: in the order in which they are folded.
        work: of a client, in FLOPs.
    """
    total = sum(map(work, clients))
    if not 0 < total < WORTH * len(clients):
        return [[client] for client in clients]
    count = 2 ** max(1, round(math.log2(total / (4 * WORTH))))
    return [[client] for client in clients] if 2 * count > len(clients) else shares(clients, work, count)


def shares(clients: Sequence[T], work: Callable[[T], float], count: int) -> list[list[T]]:
    """Return clients in at most `count` groups of consecutive ones, of about equal work."""
    costs = [float(work(client)) for client in clients]
    if not any(costs):
        costs = [1.0] * len(clients)
    groups: list[list[T]] = [[] for _ in range(count)]
    before, total = 0.0, sum(costs)
    for client, cost in zip(clients, costs, strict=True):
        groups[min(int((before + cost / 2) * count / total), count - 1)].append(client)
        before += cost
    return [group for group in groups if group]


class Sum:
    """A running sum of models.

    Args:
        memory: where it is taken; None for new memory.

    Attributes:
        samples: how many samples it holds.
    """

    def __init__(self, memory: Tensors | None = None) -> None:
        self.memory, self.models, self.samples = memory or {}, 0, 0.0

    def add(self, params: Mapping[str, Tensor], samples: float, weight: float | None = None) -> None:
        """Add weight · params, of so many samples; the weight is their number unless told otherwise.

        Raises:
            ValueError: if there are no parameters, or they are not those of the models before.
        """
        weight = samples if weight is None else weight
        if not params or (self.memory and params.keys() != self.memory.keys()):
            raise ValueError(f"a reply holds {', '.join(params) or 'no model'}, and the first held {self._names()}")
        for key, values in params.items():
            if self.models:
                self.memory[key].add_(values, alpha=weight)
            else:
                self.memory[key] = torch.mul(values, weight, out=self.memory.get(key))
        self.models, self.samples = self.models + 1, self.samples + samples

    def clear(self) -> None:
        """Begin anew, in the same memory."""
        self.models, self.samples = 0, 0.0

    def _names(self) -> str:
        return ", ".join(self.memory) or "one"


class Fold:
    """The running sum of a round's models, weighted by samples."""

    def __init__(self) -> None:
        self._total, self._group = Sum(), Sum()
        self._open: int | None = None  # the group that is being summed

    @property
    def samples(self) -> float:
        """How many samples the models were trained on, each client's counted once."""
        return self._total.samples + self._group.samples

    def add(self, reply: Message) -> None:
        """Add the model of a reply, or the sum that it holds of its group; nothing of it is kept.

        Raises:
            ValueError: if its arrays are not those of the models before it.
        """
        params, group = protocol.model_of(reply), protocol.group_of(reply)
        samples, summed = float(protocol.measured(reply)[protocol.SAMPLES]), protocol.summed_of(reply)
        if summed == 0:  # in the sum of another
            return
        if group is None or summed or group != self._open:
            self._close()
        if summed:
            self._total.add(params, summed, weight=1)
        elif group is None:
            self._total.add(params, samples)
        else:
            self._group.add(params, samples)
            self._open = group

    def _close(self) -> None:
        """Add the group that is being summed to the total."""
        if self._open is not None:
            self._total.add(self._group.memory, self._group.samples, weight=1)
            self._group.clear()
            self._open = None

    def mean(self) -> ArrayRecord:
        """Return the mean model, in the memory of the sum: nothing can be added after."""
        self._close()
        samples = self._total.samples
        return protocol.encode_params({key: total.div_(samples) for key, total in self._total.memory.items()})

    def aggregate(self, strategy: Strategy, server_round: int, first: Message, errors: list[Message]) -> ArrayRecord:
        """Return the new model: what the strategy makes of one reply that holds the mean and all samples.

        Args:
            strategy: one that `folds`.
            server_round: the round.
            first: the message that one of the replies answers.
            errors: the replies that hold none.
        """
        mean = self.mean()
        if type(strategy).aggregate_train is FedAvg.aggregate_train:
            return mean
        metrics = MetricRecord({protocol.SAMPLES: self.samples})
        reply = Message(RecordDict({protocol.ARRAYS: mean, protocol.METRICS: metrics}), reply_to=first)
        return strategy.aggregate_train(server_round, [reply, *errors])[0]
