"""Partitions: every name divides without overlap, the same way each time, and refuses what it cannot divide."""

import numpy as np
import pytest
import torch
from fedforward.simulations.datasets import DataError
from fedforward.simulations.partitions import PARTITIONS, divide

LABELS = np.random.default_rng(0).integers(0, 10, 1000)
COLUMNS = {"writer": np.array([f"w{i % 7}" for i in range(1000)])}


def parts(spec, clients, seed=0, labels=LABELS, columns=COLUMNS):
    return divide(labels, columns, spec, clients, seed, 2)


@pytest.mark.parametrize("name", PARTITIONS)
def test_every_partition_is_disjoint_sorted_and_a_function_of_its_seed(name, capfd):
    spec = "natural:writer" if name == "natural" else name
    found = parts(spec, 7)
    rows = torch.cat(found)
    assert len(found) == 7 and all(len(part) and part.dtype == torch.int64 for part in found)
    assert len(rows.unique()) == len(rows) and rows.min() >= 0 and rows.max() < 1000
    assert len(rows) == 1000 or name in ("shard", "pathological")
    assert all(torch.equal(part, part.sort().values) for part in found)
    assert all(map(torch.equal, found, parts(spec, 7)))
    if name != "natural":
        assert not all(torch.equal(a, b) for a, b in zip(found, parts(spec, 7, seed=1), strict=True))
    assert capfd.readouterr().err == ""


def test_arguments_reach_the_partitioners():
    found = parts("pathological:3", 10)
    assert [len(np.unique(LABELS[part])) for part in found] == [3] * 10 and sum(map(len, found)) == 1000
    assert max(len(np.unique(LABELS[part])) for part in parts("shard:1", 10)) <= 2
    skewed, even = ([len(part) for part in parts(f"dirichlet:{alpha}", 10)] for alpha in (0.05, 1000))
    assert np.std(skewed) > 5 * np.std(even)


def test_iid_takes_no_order_from_the_data():
    assert len(np.unique(np.arange(1000)[parts("iid", 10)[0]] // 100)) > 5


def test_dirichlet_leaves_no_client_empty():
    found = parts("dirichlet:0.01", 200)
    assert min(map(len, found)) == 1 and len(torch.cat(found).unique()) == 1000
    assert [len(part) for part in parts("dirichlet:0.01", 1000)] == [1] * 1000


def test_natural_clients_are_those_of_the_column_in_sorted_order():
    everyone = parts("natural:writer", 7)
    assert len(everyone) == 7
    assert [set(COLUMNS["writer"][part]) for part in everyone] == [{f"w{i}"} for i in range(7)]
    assert all(map(torch.equal, everyone, parts("natural:writer", 3))) and len(parts("natural:writer", 3)) == 3


def test_a_client_costs_no_table():
    assert len(parts("iid", 20_000, labels=np.zeros(20_000, np.int64))) == 20_000


@pytest.mark.parametrize(
    ("spec", "clients", "words"),
    [
        ("dirichlit:0.3", 5, "did you mean dirichlet"),
        ("iid:2", 5, "takes no argument"),
        ("dirichlet:much", 5, "'much' is no float"),
        ("dirichlet:inf", 5, "'inf' is no float"),
        ("pathological:2.5", 5, "is no int"),
        ("dirichlet:-1", 5, "lower --clients or take another partition"),
        ("pathological:11", 5, "greater than the number"),
        ("shard:0", 5, "cannot divide"),
        ("exponential", 100, "lower --clients"),
        ("iid", 1001, "more clients .1001. than training samples .1000.: lower --clients"),
        ("iid", 0, "at least 1"),
        ("natural", 5, "no column"),
        ("natural:writter", 5, "did you mean writer"),
        ("natural:writer", 8, "knows 7 clients"),
    ],
)
def test_refusals_are_one_line_with_a_remedy(spec, clients, words):
    with pytest.raises(DataError, match=words) as caught:
        parts(spec, clients)
    assert "\n" not in str(caught.value)
