"""What the documents claim of whole runs on digits."""

import pytest
from fedforward import message_bytes, protocol
from fedforward.algorithms.replica import rebuild
from fedforward.scalar_wire import decode_round
from fedforward.server.records import Records, read_run
from fedforward.server.rounds import model_hash
from fedforward.simulations.experiment import Experiment
from fedforward.simulations.run import execute, start


def run(tmp_path, **changes):
    """Run an experiment and return (its world, its records)."""
    world, folder = start(Experiment(**changes), tmp_path)
    execute(world, folder)
    return world, read_run(folder)


def test_the_demo_reaches_95_percent_and_stays_within_a_point_and_a_half_of_backprop(tmp_path):
    accuracy = {}
    for rule in ("mono-forward", "backprop"):
        _, records = run(tmp_path, rule=rule, evaluate_every=30)
        accuracy[rule] = records.rounds.accuracy.iloc[-1]
    assert accuracy["mono-forward"] >= 0.95
    assert accuracy["mono-forward"] >= accuracy["backprop"] - 0.015


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["forward", "central"])
def test_baffle_learns_digits_from_scalars_and_any_replica_rebuilds_the_model(tmp_path, scheme):
    options = {"model": {"hidden": [32]}, "rule": {"directions": 32, "scheme": scheme}}
    world, records = run(
        tmp_path, rule="baffle", lr=0.3, clients=5, rounds=300, epochs=1, batch_size=1000, evaluate_every=100,
        set=options,
    )  # fmt: skip
    assert records.rounds.accuracy.iloc[-1] >= 0.92
    assert set(records.clients.bytes_up) == {message_bytes.scalar_uplink_bytes(32)}
    assert message_bytes.scalar_uplink_bytes(32) == 4 * 32 + 242  # the constant that the README states
    database = Records(records.folder)
    log = [decode_round(blob) for _, blob in database.scalars()]
    database.close()
    replica = rebuild(world.trainer.rule, world.experiment.seed, world.trainer.initial_params(), log)
    assert model_hash(protocol.encode_params(replica)) == records.rounds.model_sha256.iloc[-1]
