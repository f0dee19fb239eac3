"""What is folded as it comes is what Flower's strategies make of all replies together."""

import numpy as np
import pytest
import torch
from fedforward import protocol
from fedforward.server.fold import WORTH, Fold, Sum, folds, groups_of, shares
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


@pytest.mark.parametrize("name", [name for name in STRATEGIES if name not in ("fedscalar", "fedprojection")])
def test_only_strategies_of_the_mean_fold(name):
    assert folds(STRATEGIES[name]()) == (name in MEANS)


def test_what_looks_at_every_reply_does_not_fold():
    class Own(FedAvg):
        def aggregate_train(self, server_round, replies):
            return super().aggregate_train(server_round, list(replies)[:1])

    assert not folds(Own()) and not folds(FedAvg(weighted_by_key="steps"))
    assert not folds(FedAvg(train_metrics_aggr_fn=lambda contents, key: MetricRecord()))
    assert not folds(DifferentialPrivacyServerSideFixedClipping(FedAvg(), 1.0, 1.0, 2))


def live_replies(count):
    """Yield replies of this process whose models are small whole numbers, whose sums are exact."""
    assume_identity()
    rng = np.random.default_rng(1)
    for node in range(1, count + 1):
        question = Message(RecordDict(), dst_node_id=node, message_type="train")
        params = {"a": torch.from_numpy(rng.integers(-9, 9, (3, 5)).astype(np.float32))}
        yield protocol.LiveReply(question, protocol.Trained(params, None, {protocol.SAMPLES: int(rng.integers(1, 50))}))


def test_a_group_is_summed_by_itself_wherever_that_is():
    """One reply after the other, or as a worker gives them: the sum with the last, and nothing with the others."""
    one_by_one, by_a_worker, total = Fold(), Fold(), Sum()
    for number, reply in enumerate(live_replies(5)):
        one_by_one.add(protocol.join(reply, 0) if number in (1, 2, 3) else reply)
        answer = reply.answer
        if number in (1, 2, 3):
            total.add(answer.params, answer.measured[protocol.SAMPLES])
            summed = total.samples if number == 3 else 0.0
            reply.answer = answer._replace(params=total.memory, summed=summed)
        by_a_worker.add(reply)
    assert (
        one_by_one.samples
        == by_a_worker.samples
        == sum(protocol.measured(reply)[protocol.SAMPLES] for reply in live_replies(5))
    )
    expected = sum(r.answer.params["a"] * r.answer.measured[protocol.SAMPLES] for r in live_replies(5))
    for fold in (one_by_one, by_a_worker):
        torch.testing.assert_close(protocol.params_of(fold.mean())["a"], expected / fold.samples, rtol=0, atol=0)


@pytest.mark.parametrize("count", [1, 3, 4, 10, 100])
@pytest.mark.parametrize("work", [0.0, 1.0, WORTH / 20, WORTH / 3, 5 * WORTH])
def test_small_clients_are_grouped_and_others_are_not(count, work):
    groups = groups_of(list(range(count)), lambda client: work)
    assert [client for group in groups for client in group] == list(range(count))
    if not work or work > WORTH or count < 4:
        assert all(len(group) == 1 for group in groups)
    else:
        sizes = [len(group) for group in groups]
        assert len(groups) in (2, 4, 8, 16, 32) and max(sizes) - min(sizes) <= 1
        assert len(groups) == 2 or 2 * WORTH < work * count / len(groups) < 8 * WORTH


def test_shares_are_of_equal_work():
    assert shares([5, 1, 1, 1, 1, 1], float, 2) == [[5], [1, 1, 1, 1, 1]]
    assert shares([0, 0, 0, 0], float, 2) == [[0, 0], [0, 0]]
    assert shares([1], float, 3) == [[1]]


def test_other_arrays_are_refused():
    fold, (first, second) = Fold(), replies(2)
    fold.add(first)
    del second.content["arrays"]["b"]
    with pytest.raises(ValueError, match="a reply holds a, and the first held a, b"):
        fold.add(second)
