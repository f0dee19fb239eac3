"""The cohort: what inline gives, but for the order of floating-point sums."""

import numpy as np
import pytest
from fedforward.algorithms import RuleError
from fedforward.server.records import read_run
from fedforward.simulations.engines.choice import choose, grid_of
from fedforward.simulations.engines.cohort import CohortGrid
from small_runs import rows, simulate, small_world

# Accuracies are counts of samples, and one near the border may fall on its other side: 1 of 15 here.
TOLERANCE = {"loss": 1e-4, "train_loss": 1e-4, "client_loss": 1e-4}
COUNTS = ("status", "client", "samples", "steps", "batch", "peak_bytes", "flops", "bytes_down", "bytes_up", "wire_up")

CASES = {
    "ragged": {"partition": "dirichlet:0.5", "clients_per_round": 4},
    "fedprox": {"rule": "dfa", "strategy": "fedprox"},
    "every reply": {"rule": "backprop", "strategy": "fedmedian"},
    "scalars": {"rule": "baffle", "lr": 0.01, "set": {"rule": {"directions": 3}}},
    "fleet": {"rule": "backprop", "fleet": "mcu-256k:1,phone:1", "audit": 0.3, "adapt": "rule"},
}


@pytest.mark.parametrize("case", CASES)
def test_the_same_records_within_rounding(tmp_path, case):
    world = small_world(**CASES[case])
    models = {
        "inline": simulate(world, tmp_path / "inline"),
        "cohort": simulate(world, tmp_path / "cohort", grid=lambda *_, **__: CohortGrid(world)),
        "threes": simulate(world, tmp_path / "threes", grid=lambda *_, **__: CohortGrid(world, at_once=3)),
    }
    inline = read_run(tmp_path / "inline")
    for name in ("cohort", "threes"):
        run = read_run(tmp_path / name)
        for key, array in models["inline"].items():
            np.testing.assert_allclose(models[name][key].numpy(), array.numpy(), rtol=0, atol=1e-4)
        assert run.clients[list(COUNTS)].equals(inline.clients[list(COUNTS)])
        assert run.evaluations[["client", "samples", "status"]].equals(
            inline.evaluations[["client", "samples", "status"]]
        )
        for table in ("rounds", "clients", "evaluations"):
            ours, theirs = getattr(run, table), getattr(inline, table)
            for column in {"loss", "train_loss", "client_loss"} & set(ours):
                np.testing.assert_allclose(
                    ours[column].astype(float), theirs[column].astype(float), rtol=TOLERANCE[column]
                )


@pytest.mark.parametrize("strategy", ["fedavg", pytest.param("fedmedian", marks=pytest.mark.slow)])
def test_two_workers_give_the_bits_of_one_process(tmp_path, strategy):
    world = small_world(engine="cohort", devices="cpu:2", strategy=strategy, partition="dirichlet:0.5")
    simulate(world, tmp_path / "one", grid=lambda *_, **__: CohortGrid(world))
    with grid_of(world, choose(world)) as grid:
        assert len(grid.workers) == 2
        simulate(world, tmp_path / "two", grid=lambda *_, **__: grid)
    assert rows(tmp_path / "two") == rows(tmp_path / "one")


@pytest.mark.parametrize("devices", ["cpu", "cpu:2"])
def test_a_fault_is_the_clients_own_whoever_stands_beside_it(tmp_path, devices):
    world = small_world(engine="cohort", devices=devices, rule="rules_for_pool:Faulty")
    simulate(world, tmp_path / "inline")
    with grid_of(world, choose(world)) as grid:
        simulate(world, tmp_path / "cohort", grid=lambda *_, **__: grid)
    one, other = (read_run(tmp_path / name).clients for name in ("inline", "cohort"))
    assert one[["client", "status", "reason"]].equals(other[["client", "status", "reason"]])
    assert other["reason"].dropna().unique().tolist() == ["TypeError: a bug of mine"]


@pytest.mark.parametrize("devices", ["cpu", "cpu:2"])
def test_a_rule_that_cannot_be_batched_ends_the_run_in_its_words(tmp_path, devices):
    world = small_world(engine="cohort", devices=devices, rule="rules_for_pool:Unbatchable")
    with grid_of(world, choose(world)) as grid, pytest.raises(RuleError, match="say `vmappable = False`"):
        simulate(world, tmp_path, grid=lambda *_, **__: grid)


def test_a_fleet_evaluates_within_its_budget(tmp_path):
    """A device that cannot even run the network says so, as it does alone."""
    options = {"rule": "backprop", "fleet": f"{tmp_path}/tiny.toml:1,phone:4"}
    (tmp_path / "tiny.toml").write_text(
        "memory-bytes = 3000\nflops-per-second = 1e6\nuplink = 1e4\ndownlink = 1e4\nlatency = 0.0\n"
    )
    world = small_world(**options)
    simulate(world, tmp_path / "inline")
    simulate(world, tmp_path / "cohort", grid=lambda *_, **__: CohortGrid(world))
    one, other = read_run(tmp_path / "inline"), read_run(tmp_path / "cohort")
    assert one.evaluations["status"].tolist() == other.evaluations["status"].tolist()
    assert "over budget" in set(one.clients["status"]) and one.clients["reason"].equals(other.clients["reason"])
