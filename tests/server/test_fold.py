"""What is folded as it comes is what Flower's strategies make of all replies together."""

import numpy as np
import pytest
import torch
from fedforward import protocol
from fedforward.server.fold import Fold, folds
from fedforward.server.strategies import STRATEGIES
from fedforward.simulations.engines.inline import InlineGrid
from fedforward.simulations.engines.local import assume_identity
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import DifferentialPrivacyServerSideFixedClipping, FedAvg

MEANS = ["fedavg", "fedavgm", "fedadam", "fedyogi", "fedprox"]


def replies(count=7):
    assume_identity()
    rng = np.random.default_rng(0)
    question = Message(RecordDict(), dst_node_id=1, message_type="train")
    for _ in range(count):
        params = {"a": torch.from_numpy(rng.standard_normal((3, 5), np.float32)), "b": torch.ones(4) * rng.random()}
        metrics = MetricRecord({protocol.SAMPLES: float(rng.integers(1, 50)), "loss": 1.0})
        yield Message(RecordDict({"arrays": protocol.encode_params(params), "metrics": metrics}), reply_to=question)


class Nodes(InlineGrid):
    """Nodes that are only counted."""

    def __init__(self):
        super().__init__(None, 2, {})


@pytest.mark.parametrize("name", MEANS)
def test_a_strategy_of_the_mean_gets_what_it_would_have_made(name):
    start = ArrayRecord({"a": Array(np.zeros((3, 5), np.float32)), "b": Array(np.zeros(4, np.float32))})
    whole, folded = STRATEGIES[name](), STRATEGIES[name]()
    for strategy in (whole, folded):
        list(strategy.configure_train(1, start, ConfigRecord(), Nodes()))
    expected, _ = whole.aggregate_train(1, list(replies()))
    fold = Fold()
    for reply in replies():
        fold.add(reply)
    made = fold.aggregate(folded, 1, reply, [])
    for key, array in expected.items():
        np.testing.assert_allclose(made[key].numpy(), array.numpy(), rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in STRATEGIES if name != "fedscalar"])
def test_only_strategies_of_the_mean_fold(name):
    assert folds(STRATEGIES[name]()) == (name in MEANS)


def test_what_looks_at_every_reply_does_not_fold():
    class Own(FedAvg):
        def aggregate_train(self, server_round, replies):
            return super().aggregate_train(server_round, list(replies)[:1])

    assert not folds(Own()) and not folds(FedAvg(weighted_by_key="steps"))
    assert not folds(FedAvg(train_metrics_aggr_fn=lambda contents, key: MetricRecord()))
    assert not folds(DifferentialPrivacyServerSideFixedClipping(FedAvg(), 1.0, 1.0, 2))


def test_other_arrays_are_refused():
    fold, (first, second) = Fold(), replies(2)
    fold.add(first)
    del second.content["arrays"]["b"]
    with pytest.raises(ValueError, match="a reply holds a, and the first held a, b"):
        fold.add(second)
