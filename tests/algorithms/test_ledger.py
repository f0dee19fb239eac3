"""A run kept as coefficients is the run itself: momentum, decay, schedules, averages, against dense float64 steps."""

import math

import pytest
import torch
from fedforward.algorithms import SPSA
from fedforward.algorithms.directions import Directions
from fedforward.algorithms.ledger import Ledger
from fedforward.algorithms.replica import Replica, TornHistory, fingerprint, shared
from fedforward.algorithms.seeds import Place

POOL, STEPS, K, SEED = 64, 400, 5, 3


def model(dtype=torch.float32):
    g = torch.Generator().manual_seed(1)
    return {"0.weight": torch.randn(90, 50, generator=g).to(dtype), "0.bias": torch.randn(50, generator=g).to(dtype)}


def flat(params):
    return torch.cat([p.flatten() for p in params.values()]).double()


def pool_of(rule):
    """Return all candidates as rows (P, d)."""
    rows = []
    for j in range(rule.pool):
        zeros = {key: torch.zeros_like(p) for key, p in model().items()}
        Directions.of_pool(SEED, rule.pool).add(zeros, j, 1.0, 4096)
        rows.append(flat(zeros))
    return torch.stack(rows)


def rates(kind):
    return [0.05 * (0.5 * (1 + math.cos(math.pi * t / STEPS)) if kind == "cosine" else 1.0) for t in range(STEPS)]


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
@pytest.mark.parametrize("momentum, decay", [(0.0, 0.0), (0.9, 0.0), (0.0, 0.01), (0.9, 0.01)])
def test_coefficients_are_the_steps(momentum, decay, schedule):
    rule = SPSA(directions=K, pool=POOL, momentum=momentum, weight_decay=decay)
    rows, ledger, gamma = pool_of(rule), Ledger(rule, SEED, model()), 0.99
    w, m, g = flat(model()), torch.zeros(4550, dtype=torch.float64), torch.Generator().manual_seed(2)
    mean, e, coefficients = w.clone(), 1.0, torch.zeros(POOL)
    for step, lr in enumerate(rates(schedule)):
        draws = rule.draw(Place(SEED, 1 + step, 0, 0), 0, 0)
        c = torch.randn(1, K, generator=g) / K
        ledger.descend(None, [draws], c, lr)
        m = momentum * m + c[0].double() @ rows[list(draws.candidates)] + decay * w
        w = w - lr * m
        mean = gamma * mean + (1 - gamma) * w
        e, coefficients = (
            gamma * e + (1 - gamma) * ledger.c,
            coefficients.lerp(torch.from_numpy(ledger.weights), 1 - gamma),
        )
    params = model()
    ledger.write(params)
    assert (flat(params) - w).abs().max() < 1e-5
    ledger.write(params, coefficients.numpy(), e)
    assert (flat(params) - mean).abs().max() < 1e-5
    assert (w - flat(model())).abs().max() > 0.1  # it went somewhere


def play(rule, rounds, begin=None):
    replica = begin or Replica(rule, SEED, model())
    for number in range(replica.done + 1, rounds + 1):
        scalars = torch.randn(2 * K, generator=torch.Generator().manual_seed(number))
        assert replica.take(shared(number, 0.01, scalars))
    return replica


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9, "weight_decay": 0.1}, {"rebase": 4, "momentum": 0.9}])
def test_a_ledger_survives_as_bytes_and_goes_on_as_if_nothing_had_been(options):
    rule = SPSA(directions=K, pool=POOL, **options)
    whole, half = play(rule, 9), play(rule, 6)
    data = half.ledger.to_bytes()
    assert len(data) == half.ledger.size == 20 + 4 * POOL * (2 if options.get("momentum") else 1)
    other = Replica(rule, SEED, model())
    other.become(6, half.arrays(), data)
    assert all(torch.equal(play(rule, 9, other).current()[key], p) for key, p in whole.current().items())
    with pytest.raises(ValueError, match="cannot be made of"):
        other.become(6, None, data[:-4])
    if options.get("rebase"):
        with pytest.raises(ValueError, match="say nothing to a replica that has pool 0"):
            Replica(rule, SEED, model()).become(6, None, data)


def test_another_pool_begins_where_the_last_ended():
    rule = SPSA(directions=K, pool=POOL, rebase=4)
    replica = play(rule, 4)
    assert replica.ledger.base == 1 and not replica.ledger.weights.any()
    before = {key: p.clone() for key, p in replica.current().items()}
    assert all(torch.equal(replica.ledger.origin[key], p) for key, p in before.items())
    old, new = (Directions.of_pool(SEED, POOL, base) for base in (0, 1))
    first = [next(iter(d.slices(model(), 0, 4096)))[1].clone() for d in (old, new)]
    assert not torch.equal(*first)
    assert not torch.equal(play(rule, 5, replica).current()["0.bias"], before["0.bias"])


def test_a_round_is_taken_once_and_none_is_left_out():
    for rule in (SPSA(directions=K), SPSA(directions=K, pool=POOL)):
        replica = play(rule, 3)
        before = {key: p.clone() for key, p in replica.current().items()}
        assert not replica.take(shared(2, 0.5, torch.ones(2 * K))) and not replica.take(shared(3, 0.5, torch.ones(K)))
        with pytest.raises(TornHistory, match="holds round 3, and is told of round 5"):
            replica.take(shared(5, 0.5, torch.ones(K)))
        assert replica.done == 3 and all(torch.equal(replica.current()[key], p) for key, p in before.items())


def test_a_replica_takes_no_arrays_of_another_model():
    with pytest.raises(ValueError, match="not those of a replica"):
        Replica(SPSA(), SEED, model()).become(1, {"0.weight": torch.zeros(3)}, b"")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("pool", [0, POOL])
def test_a_replay_on_a_gpu_ends_in_the_bits_of_the_cpu(pool):
    assert replayed(pool, "cuda") == replayed(pool, "cpu")


def replayed(pool, device):
    """Return the fingerprint of a model that has followed 20 rounds on a device."""
    rule = SPSA(directions=K, pool=pool, momentum=0.9 if pool else 0.0)
    replica = Replica(rule, SEED, {key: p.to(device) for key, p in model().items()})
    g = torch.Generator().manual_seed(2)
    for t in range(20):
        replica.take(shared(t + 1, 0.05, torch.randn(K, generator=g)))
    return fingerprint(replica.current())
