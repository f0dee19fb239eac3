"""Clients that draw their own samples: a function of seed and client alone, and nothing at all until they are asked."""

import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import torch
from fedforward.server.records import read_run
from fedforward.server.roster import Roster
from fedforward.simulations.datasets import DataError
from fedforward.simulations.engines.inline import InlineGrid
from fedforward.simulations.parts import build_partitions
from fedforward.simulations.population import Admission, describe, devices_of
from fedforward.simulations.resampling import SAMPLES, WAYS, Resampled
from fedforward.simulations.run import start
from small_runs import small, small_world

LABELS = np.sort(np.random.default_rng(0).choice(6, 3000, p=[0.4, 0.2, 0.2, 0.1, 0.05, 0.05]))
SPECS = ["iid", "dirichlet:0.3", "pathological:2"]
MILLION = 1_000_000


def clients(spec, samples=0, seed=0, count=400, labels=LABELS):
    return Resampled(labels, spec, count, samples, seed, 4)


def shares(rows, labels=LABELS):
    """Return the part of a client's rows that each class has."""
    return np.bincount(labels[rows], minlength=6) / len(rows)


@pytest.mark.parametrize("spec", [*SPECS, *WAYS])
def test_a_client_is_a_function_of_seed_and_client_alone(spec):
    found = clients(spec)
    assert len(found) == 400 and all(len(found[i]) == SAMPLES and found[i].dtype == torch.int64 for i in range(400))
    rows = [found[i] for i in (399, 7, 0)]
    assert all(map(torch.equal, rows, [clients(spec)[399], clients(spec, count=8)[7], found[0]]))
    assert not torch.equal(found[0], found[1]) and not torch.equal(found[0], clients(spec, seed=1)[0])
    for each in (found[i] for i in range(400)):
        assert torch.equal(each, each.unique()) and each[0] >= 0 and each[-1] < 3000  # sorted, and none twice
    with pytest.raises(IndexError):
        found[400]


def test_iid_draws_every_row_alike():
    found = clients("iid", samples=300)
    drawn = np.bincount(np.concatenate(list(found)), minlength=3000)
    assert abs(drawn.mean() - 40) < 1e-9 and drawn.min() > 15 and drawn.max() < 75  # of 400 clients a tenth have a row
    assert torch.equal(clients("iid", samples=3000)[3], torch.arange(3000))


def test_dirichlet_draws_proportions_about_those_of_the_data():
    found = np.array([shares(rows) for rows in clients("dirichlet:1e6")])
    np.testing.assert_allclose(found.mean(0), shares(np.arange(3000)), atol=0.01)
    assert all(shares(rows).max() == 1.0 for rows in list(clients("dirichlet:1e-300"))[:20])


def test_dirichlet_proportions_vary_as_the_distribution_says():
    labels, alpha, n = np.repeat(np.arange(5), 1000), 0.4, 100
    found = np.array([shares(rows, labels)[:5] for rows in clients(f"dirichlet:{alpha}", n, labels=labels, count=3000)])
    spread = 0.2 * 0.8 / (5 * alpha + 1)  # of Dir(α, …, α); the n draws add theirs
    np.testing.assert_allclose(found.mean(0), 0.2, atol=0.02)
    np.testing.assert_allclose(found.var(0), spread + (0.2 * 0.8 - spread) / n, rtol=0.1)


def test_dirichlet_proportions_are_those_of_the_partition_of_many_clients():
    from fedforward.simulations.partitions import divide

    labels = np.repeat([0, 1, 2], [6000, 3000, 1000])
    dealt = [rows for rows in divide(labels, {}, "dirichlet:1", 100, 0, 2) if len(rows) > 20]
    drawn = list(clients("dirichlet:1", labels=labels, count=2000))
    for c in range(3):
        a, b = ([float((labels[rows] == c).mean()) for rows in each] for each in (dealt, drawn))
        np.testing.assert_allclose(np.quantile(a, [0.25, 0.5, 0.75]), np.quantile(b, [0.25, 0.5, 0.75]), atol=0.12)


def test_pathological_draws_its_classes_and_equal_parts_of_them():
    counts = np.array([np.bincount(LABELS[rows], minlength=6) for rows in clients("pathological:3", samples=100)])
    assert {tuple(sorted(row)) for row in counts} == {(0, 0, 0, 33, 33, 34)}
    assert ((counts > 0).mean(0) > 0.4).all() and ((counts > 0).mean(0) < 0.6).all()


def test_rows_come_again_only_where_a_class_has_too_few():
    labels = np.repeat([0, 1], [5, 500])
    rows = next(rows for rows in clients("pathological:1", samples=13, labels=labels) if labels[rows[0]] == 0)
    assert sorted(np.bincount(rows, minlength=5)) == [2, 2, 3, 3, 3] and torch.equal(rows, rows.sort().values)


def test_a_client_of_little_data_draws_all_of_it():
    assert torch.equal(clients("iid", labels=np.zeros(30, np.int64))[0], torch.arange(30))


@pytest.mark.parametrize(
    ("spec", "samples", "words"),
    [
        ("shard:2", 0, "no partition 'shard': take one of iid, dirichlet, pathological with --resample, or leave that"),
        ("natural:writer", 0, "with --resample, or leave that out"),
        ("dirichlit:0.3", 0, "did you mean dirichlet"),
        ("iid:2", 0, "takes no argument"),
        ("dirichlet:much", 0, "'much' is no float"),
        ("dirichlet:0", 0, "dirichlet:0 has no proportions to draw: take an ALPHA above 0"),
        ("dirichlet:-1", 0, "above 0"),
        ("pathological:0", 0, "cannot be drawn from 6 classes: take 1 to 6"),
        ("pathological:7", 0, "cannot be drawn from 6 classes: take 1 to 6"),
        ("pathological:3", 2, "cannot be drawn from 2 samples a client: take 1 to 2"),
        ("iid", 3001, "samples-per-client .3001. is more than the 3000 training samples: lower it"),
    ],
)
def test_refusals_are_one_line_with_a_remedy(spec, samples, words):
    with pytest.raises(DataError, match=words) as caught:
        clients(spec, samples)
    assert "\n" not in str(caught.value)


# ---- worlds of very many clients -------------------------------------------------------------------------------------


def resampled(count, **changes):
    return small_world(clients=count, clients_per_round=10, resample=True, **changes)


def test_a_million_clients_cost_no_more_than_a_thousand():
    world = resampled(1000)

    def held(clients, fleet):
        """Return the bytes that clients cost, in the end and at the most."""
        e = world.experiment.replace(clients=clients, fleet=fleet)
        tracemalloc.start()
        rows, devices = build_partitions(e, world.data), devices_of(fleet, clients, 0)
        ours = replace(world, experiment=e, partitions=rows, devices=devices)
        grid = InlineGrid(ours.app(), clients, {}, work=ours.work)
        roster = Roster(grid, clients, strategy=ours.strategy())
        last = roster.get_node_ids()[-1]
        assert roster.partition[last] == last - 1 and ours.client(clients - 1)
        assert bool(ours.admissions()) == bool(fleet)
        bytes_held = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return bytes_held

    for fleet, per_client in (("", 0), ("mcu-1m:0.6,pi-zero:0.3,phone:0.1", 1)):
        held(1000, fleet)  # makes what is made once
        few, many = held(1000, fleet), held(MILLION, fleet)
        more = [after - before - per_client * MILLION for before, after in zip(few, many, strict=True)]
        assert max(more) < 200_000, (fleet, more)  # nodes that are drawn for an evaluation


def test_a_client_is_the_same_whoever_else_there_is():
    few, many = resampled(20), resampled(MILLION)
    for index in (0, 19):
        a, b = few.client(index), many.client(index)
        assert torch.equal(a.train.index, b.train.index) and torch.equal(a.test.index, b.test.index)
        assert len(a.train) == few.samples(index) == 90 and len(a.test) == 10
    assert len(resampled(20, samples_per_client=30, holdout=0.2).client(3).train) == 24


def test_admissions_are_counted_and_no_client_is_made(monkeypatch):
    world = resampled(MILLION, fleet="mcu-1m:0.6,pi-zero:0.3,phone:0.1")
    monkeypatch.setattr(type(world), "client", None)
    monkeypatch.setattr(Resampled, "__getitem__", None)
    assert [(each.device.name, each.clients) for each in world.admissions()] == [
        ("mcu-1m", 600_000), ("pi-zero", 300_000), ("phone", 100_000)
    ]  # fmt: skip
    assert all(isinstance(each, Admission) and each.words == "as asked" for each in world.admissions())
    assert describe(world.admissions())[0].startswith("mcu-1m (1.0 MiB for tensors), 600000 clients: 600000 as asked")


def test_admissions_of_dealt_clients_are_those_of_each():
    world = small_world(clients=9, partition="linear", fleet="mcu-1m,phone")
    each = [(len(world.client(i).train), world.devices[i]) for i in range(9)]
    assert [world.samples(i) for i in range(9)] == [samples for samples, _ in each]
    found = world.admissions()
    assert sum(admission.clients for admission in found) == 9 and found[0].device == world.devices[0]
    assert [(a.fit.batch, a.device) for a in found] == [(min(16, n), device) for n, device in dict.fromkeys(each)]


def test_more_clients_than_samples_run_and_only_the_sampled_have_rows(cli, tmp_path):
    words = ["--clients", 5000, "--clients-per-round", 4, "--clients-per-evaluation", 3, "--resample", "--rounds", 2]
    small = ["--samples-per-client", 20, "--epochs", 1, "--set", "data.limit=150", "--set", "model.hidden=[12,12]"]
    answer = cli("run", *words, *small, "--fleet", "mcu-1m,phone", "--name", "many")
    assert answer.code == 0, answer.err
    assert answer.err.startswith("mono-forward on digits (iid, resampled), 4 of 5000 clients, 2 rounds, seed 0\n")
    assert "2500 clients: 2500 as asked" in answer.err
    run = read_run(tmp_path / "runs" / "many")
    assert len(run.clients) == 8 and len(run.evaluations) == 6 and (run.clients["status"] == "ok").all()
    assert set(run.clients["samples"]) == {18} and set(run.clients["device"]) <= {"mcu-1m", "phone"}
    assert (tmp_path / "runs" / "many" / "report.html").is_file()
    assert cli("report", "runs/many").code == 0


def test_a_world_that_cannot_be_drawn_is_refused_before_it_begins(tmp_path):
    with pytest.raises(DataError, match="no partition 'shard'"):
        start(small(resample=True, partition="shard"), tmp_path)
    with pytest.raises(DataError, match="lower --clients or add --resample"):
        start(small(clients=151), tmp_path)
    assert not list(tmp_path.iterdir())
