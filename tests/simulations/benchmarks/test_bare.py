"""Every hand-written loop is the same FedAvg: the floor that engines are compared with computes what they compute."""

from functools import cache

import pytest
import torch
from fedforward.simulations.benchmarks import bare

ROUNDS = 3


@cache
def data(dtype):
    x, y = bare.synthetic()
    return x.to(dtype), y


@cache
def truth(model, dtype):
    return bare.plain(*data(dtype), ROUNDS, model)[1]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


LOOPS = [
    (bare.by_hand, bare.mlp, {}),
    (bare.cpu_aware, bare.cnn, {}),
    (bare.two_workers, bare.mlp, {"model": bare.mlp}),
    (bare.two_workers, bare.cnn, {"model": bare.cnn}),
    (bare.bmm, bare.mlp, {}),
    (bare.vmap, bare.mlp, {"model": bare.mlp}),
    (bare.vmap, bare.cnn, {"model": bare.cnn}),
]
LONG = (bare.two_workers, bare.vmap)


# In float32 rounding decides near ties of the CNN's pooling.
CASES = [
    pytest.param(*loop, torch.float64, 1e-12, marks=[pytest.mark.slow] * (loop[0] in LONG and loop[1] is bare.cnn))
    for loop in LOOPS
]
CASES += [
    pytest.param(*loop, torch.float32, 2e-6, marks=[pytest.mark.slow] * (loop[0] in LONG))
    for loop in LOOPS
    if loop[1] is bare.mlp
]


@pytest.mark.parametrize("loop, model, options, dtype, atol", CASES)
def test_a_loop_ends_in_the_weights_of_the_plain_one(loop, model, options, dtype, atol):
    seconds, weights = loop(*data(dtype), ROUNDS, **options)
    assert seconds > 0
    assert len(weights) == len(truth(model, dtype))
    for got, wanted in zip(weights, truth(model, dtype), strict=True):
        torch.testing.assert_close(got.detach(), wanted, rtol=0, atol=atol)


@pytest.mark.parametrize("model, size", [(bare.mlp, 159_010), (bare.cnn, 20_490)])
def test_the_plain_loop_learns_and_starts_where_all_do(model, size):
    weights, start = truth(model, torch.float32), bare.initial(model)
    assert sum(w.numel() for w in start) == size
    assert min(float((w - before).abs().max()) for w, before in zip(weights, start, strict=True)) > 1e-3


def test_a_round_visits_ten_clients_and_all_their_samples_once():
    rounds = list(bare.schedule(2))
    assert len(rounds) == bare.WARM_UP + 2
    for clients in rounds:
        assert len({int(rows[0, 0]) // bare.SAMPLES for rows in clients}) == bare.SAMPLED
        for rows in clients:
            start = int(rows.min())
            assert start % bare.SAMPLES == 0
            assert sorted(rows.flatten().tolist()) == list(range(start, start + bare.SAMPLES))
