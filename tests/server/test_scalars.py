"""Averages of scalars, and a model rebuilt from nothing but seeds and scalars."""

import sqlite3

import pytest
import torch
from fedforward import protocol
from fedforward.server import scalars
from fedforward.server.records import read_run
from fedforward.server.rounds import model_hash
from fedforward.server.scalars import ScalarRound, rebuild
from fedforward.server.strategies.fedscalar import average
from small_runs import simulate, small_world

K = 3


def test_average_weighs_by_samples_and_by_who_took_the_step():
    one, two = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([5.0, 10.0])  # the second took half as many steps
    assert average([one, two], [3, 1]).tolist() == [(3 + 5) / 4, (6 + 10) / 4, 3.0, 4.0]
    assert average([two, one], [1, 3]).tolist() == average([one, two], [3, 1]).tolist()


def test_average_is_summed_in_float64():
    big, small = torch.tensor([1e8]), torch.tensor([1.0])
    assert average([big, small, -big], [1, 1, 1]).item() == pytest.approx(1 / 3)


def test_blob_round_trip():
    values = torch.tensor([1.5, -2.25, 3e-8])
    assert scalars.from_blob(scalars.to_blob(values)).tolist() == values.tolist()


@pytest.mark.parametrize("partition", ["iid", "dirichlet:0.4"])  # the second: clients of unequal numbers of steps
def test_the_servers_model_is_rebuilt_bit_for_bit_from_its_log(tmp_path, partition):
    world = small_world(
        rule="baffle", rounds=3, partition=partition, clients_per_round=3, lr_schedule="linear",
        set={"rule": {"directions": K}},
    )  # fmt: skip
    simulate(world, tmp_path)
    rows = read_run(tmp_path)
    log = sqlite3.connect(tmp_path / "run.sqlite").execute("SELECT round, learning_rate, scalars FROM rounds")
    log = [ScalarRound(r, lr, scalars.from_blob(blob)) for r, lr, blob in log if blob]
    assert [entry.round for entry in log] == [1, 2, 3] and log[0].lr > log[2].lr
    model = rebuild(world.trainer.rule, world.trainer.initial_params(), world.experiment.seed, log)
    assert model_hash(protocol.encode_params(model)) == rows.rounds["model_sha256"].iloc[-1]

    sent = rows.clients
    assert sent["bytes_up"].tolist() == [protocol.scalar_uplink_bytes(K * steps) for steps in sent["steps"]]
    for entry in log:
        assert len(entry.scalars) == K * sent[sent["round"] == entry.round]["steps"].max()


def test_records_give_the_log(tmp_path):
    from fedforward.server.records import Records

    world = small_world(rule="baffle", set={"rule": {"directions": K}})
    simulate(world, tmp_path)
    records = Records(tmp_path)
    log = [ScalarRound(r, world.plan().learning_rate(r), scalars.from_blob(blob)) for r, blob in records.scalars()]
    model = rebuild(world.trainer.rule, world.trainer.initial_params(), 0, log)
    assert model_hash(protocol.encode_params(model)) == records.model_sha256(2)
    records.close()
