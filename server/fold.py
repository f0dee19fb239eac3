"""A round's updates, folded into one running mean as they come: memory does not grow with clients per round.

    w = Σ n_i w_i / Σ n_i        (McMahan et al., arXiv 1602.05629, 2017, FedAvg)

The sum is taken in the order in which replies are added, which is the same on every engine: most work first.
"""

from __future__ import annotations

from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAdagrad, FedAdam, FedAvg, FedAvgM, FedYogi, Strategy

from .. import protocol
from ..algorithms.rule import Tensors

# What these make of a round is a function of the mean; of FedAvg.aggregate_train it is the mean itself.
OF_THE_MEAN = {kind.aggregate_train for kind in (FedAvg, FedAvgM, FedAdagrad, FedAdam, FedYogi)}


def folds(strategy: Strategy) -> bool:
    """Return whether a strategy's aggregation needs no more of a round than the mean of its models by samples."""
    return (
        getattr(type(strategy), "aggregate_train", None) in OF_THE_MEAN
        and strategy.weighted_by_key == protocol.SAMPLES
        and strategy.train_metrics_aggr_fn is FedAvg().train_metrics_aggr_fn
    )


class Fold:
    """The running sum of a round's models, weighted by samples."""

    def __init__(self) -> None:
        self.sums: Tensors = {}
        self.samples = 0.0

    def add(self, reply: Message) -> None:
        """Add the model of a reply; nothing of it is kept.

        Raises:
            ValueError: if its arrays are not those of the models before it.
        """
        params, samples = protocol.model_of(reply), float(protocol.measured(reply)[protocol.SAMPLES])
        if self.sums and params.keys() != self.sums.keys():
            raise ValueError(f"a reply holds {', '.join(params)}, and the first held {', '.join(self.sums)}")
        for key, values in params.items():
            if key in self.sums:
                self.sums[key].add_(values, alpha=samples)
            else:
                self.sums[key] = values * samples
        self.samples += samples

    def mean(self) -> ArrayRecord:
        """Return the mean model, in the memory of the sum: nothing can be added after."""
        return protocol.encode_params({key: total.div_(self.samples) for key, total in self.sums.items()})

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
