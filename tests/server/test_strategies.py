"""Flower's strategies run through our loop unchanged, and what they make is what they should."""

import numpy as np
import pytest
import torch
from fedforward import protocol
from fedforward.algorithms.directions import SHARED
from fedforward.server.records import read_run
from fedforward.server.rounds import model_hash
from fedforward.server.strategies import STRATEGIES
from fedforward.simulations.engines.inline import InlineGrid
from fedforward.simulations.engines.local import own
from small_runs import simulate, small_world


@pytest.mark.parametrize("name", [name for name in STRATEGIES if name != "fedscalar"])
def test_runs_two_rounds(tmp_path, name):
    world = small_world(strategy=name, clients_per_round=4)
    assert type(world.strategy()) is STRATEGIES[name]
    arrays = simulate(world, tmp_path)
    run = read_run(tmp_path)
    assert run.info["status"] == "finished" and run.rounds["round"].tolist() == [0, 1, 2]
    assert (run.clients["status"] == "ok").all() and len(run.clients) == 8
    assert model_hash(arrays) == run.rounds["model_sha256"].iloc[-1]
    assert run.rounds["model_sha256"].nunique() == 3 and run.rounds["accuracy"].notna().all()
    assert all(array.dtype == "float32" for array in arrays.values())


class Spy(InlineGrid):
    """An inline grid that keeps what passes."""

    sent, answers = [], []

    def stream(self, messages, **options):
        Spy.sent += (messages := list(messages))
        for reply in super().stream(messages, **options):
            Spy.answers.append(own(reply))
            yield reply


@pytest.fixture
def spy():
    Spy.sent, Spy.answers = [], []
    return Spy


def test_fedavg_is_the_sample_weighted_mean(tmp_path, spy):
    world = small_world(rounds=1, partition="dirichlet:0.5", strategy="fedavg")
    arrays = simulate(world, tmp_path, grid=spy)
    answers = [reply.content for reply in spy.answers if reply.content.array_records]
    weights = [content["metrics"]["num-examples"] for content in answers]
    assert len(set(weights)) > 1
    for key, array in arrays.items():
        stacked = np.stack([content["arrays"][key].numpy() for content in answers])
        mean = np.average(stacked.astype(np.float64), axis=0, weights=weights)
        np.testing.assert_allclose(array.numpy(), mean, rtol=1e-5, atol=1e-7)


def test_fedprox_sends_mu_and_is_not_fedavg(tmp_path, spy):
    simulate(small_world(strategy="fedavg"), tmp_path / "fedavg")
    prox = small_world(strategy="fedprox", set={"strategy": {"proximal_mu": 0.5}})
    simulate(prox, tmp_path / "fedprox", grid=spy)
    trained = [message.content["config"] for message in spy.sent if message.metadata.message_type == "train"]
    assert len(trained) == 10 and {config["proximal-mu"] for config in trained} == {0.5}
    first, second = (read_run(tmp_path / name).rounds["model_sha256"].tolist() for name in ("fedavg", "fedprox"))
    assert first[0] == second[0] and first[1] != second[1]


@pytest.mark.parametrize("name", ["fedprox", "fedavgm"])
def test_a_strategy_by_name_alone_is_not_fedavg_in_disguise(tmp_path, name):
    simulate(small_world(strategy="fedavg"), tmp_path / "fedavg")
    simulate(small_world(strategy=name), tmp_path / name)
    hashes = [read_run(tmp_path / run).rounds["model_sha256"].iloc[-1] for run in ("fedavg", name)]
    assert hashes[0] != hashes[1]


def test_a_fedprox_that_does_not_pull_is_fedavg(tmp_path):
    simulate(small_world(strategy="fedavg"), tmp_path / "a")
    simulate(small_world(strategy="fedprox", set={"strategy": {"proximal_mu": 0.0}}), tmp_path / "b")
    hashes = [read_run(tmp_path / name).rounds["model_sha256"].tolist() for name in "ab"]
    assert hashes[0] == hashes[1]


def test_fedscalar_moves_along_the_mean_of_its_clients(tmp_path, spy):
    world = small_world(rule="baffle", rounds=1, partition="dirichlet:0.5", set={"rule": {"directions": 2}})
    strategy = world.strategy()
    simulate(world, tmp_path, grid=spy, strategy=strategy)
    answers = [reply for reply in spy.answers if "scalars" in reply.content]
    found = [(protocol.measured(reply)["num-examples"], protocol.scalars_of(reply)[2].double()) for reply in answers]
    ((client, weight, averaged),) = strategy.taken.answers
    assert (client, weight, strategy.taken.round) == (SHARED, 1.0, 1)
    for j in range(len(averaged)):
        pairs = [(n, scalars[j]) for n, scalars in found if len(scalars) > j]
        mean = sum(n * value for n, value in pairs) / sum(n for n, _ in pairs)
        assert torch.isclose(averaged[j].double(), mean, rtol=1e-6)
