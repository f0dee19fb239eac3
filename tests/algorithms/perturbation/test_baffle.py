"""BAFFLE's estimate against the true gradient, its bias against theory, and its replay against itself."""

from math import log
from statistics import NormalDist

import numpy as np
import pytest
import torch
from cases import SHAPE, batch, copied, double, equal, leaves, network, nonuniform
from cases import weighted_cross_entropy as cross_entropy
from fedforward.algorithms import Baffle, Batch, Network, RuleError, State
from fedforward.algorithms.directions import Directions
from fedforward.algorithms.models import mlp
from sklearn.datasets import load_digits

SMALL = Network(lambda: mlp((3,), 3, hidden=(4,), activation="tanh"), (3,), 3)  # 31 parameters


def gradient(net, params, b):
    params = leaves(params)
    grads = torch.autograd.grad(cross_entropy(net.forward(params, b.x), b), list(params.values()))
    return torch.cat([g.flatten() for g in grads])


def small_problem(rule):
    state = double(rule.init(SMALL, seed=1))
    return state, nonuniform(batch(rule, 7, shape=(3,), classes=3))


def signs(params, directions, count):
    """Return the directions as rows of a matrix (count, d)."""
    rows = []
    for k in range(count):
        zeros = {key: torch.zeros_like(p) for key, p in params.items()}
        directions.add(zeros, k, 1.0, chunk=256)
        rows.append(torch.cat([z.flatten() for z in zeros.values()]))
    return torch.stack(rows)


def test_the_estimate_is_unbiased():
    rule = Baffle(directions=2500, sigma=1e-6)  # a bias of 1e-6, far below the standard errors
    state, b = small_problem(rule)
    truth = gradient(SMALL, state.params, b)
    scalars, _ = rule.probe(SMALL, state, b, rule.lr)
    zeros = {key: torch.zeros_like(p) for key, p in state.params.items()}
    rule.apply(State(zeros, {}, {}), b.draws, scalars, lr=1.0)
    estimate = -torch.cat([p.flatten() for p in zeros.values()])
    # Each coordinate of s z has second moment E[s²], for z = ±1.
    error = ((scalars.square().mean() - estimate.square()) / len(scalars)).sqrt()
    bound = NormalDist().inv_cdf(1 - 0.0027 / 2 / len(truth))  # 3 standard errors, for all coordinates at once
    assert ((estimate - truth) / error).abs().max() < bound
    # Along the gradient the estimate has length 1, and the test would see 10 % more or less.
    along = estimate @ truth / truth.square().sum()
    spread = (scalars.square().std() / truth.square().sum()) / len(scalars) ** 0.5
    assert abs(along - 1) < 3 * spread and 3 * spread < 0.1


@pytest.mark.parametrize("scheme, order", [("forward", 1), ("central", 2)])
def test_the_bias_shrinks_with_sigma_as_the_scheme_promises(scheme, order):
    state, b = small_problem(Baffle())
    slopes = signs(state.params, b.draws, 16) @ gradient(SMALL, state.params, b)
    sigmas, errors = (1e-1, 3e-2, 1e-2, 3e-3, 1e-3), []
    for sigma in sigmas:
        scalars, _ = Baffle(directions=16, sigma=sigma, scheme=scheme).probe(SMALL, copied(state), b, 0.1)
        errors.append(float((scalars - slopes).norm()))
    slope = np.polyfit([log(s) for s in sigmas], [log(e) for e in errors], 1)[0]
    assert abs(slope - order) < 0.1


@pytest.mark.parametrize("scheme", ["forward", "central"])
@pytest.mark.parametrize("name", ["mlp", "lenet"])
def test_probe_leaves_parameters_within_two_units_in_the_last_place(name, scheme):
    rule, net = Baffle(directions=64, scheme=scheme), network(name)
    state = rule.init(net, seed=1)
    before = copied(state).params
    rule.probe(net, state, batch(rule, dtype=torch.float32), 0.1)
    for key, p in state.params.items():
        unit = torch.finfo(p.dtype).eps * (before[key].abs() + rule.sigma)
        assert ((p - before[key]).abs() <= 2 * unit).all()


def apply(rule, chunk=65536, seed=0):
    params = {"a": torch.randn(70_001), "b": torch.randn(300, 7), "c": torch.randn(())}
    params = {key: torch.randn(p.shape, generator=torch.Generator().manual_seed(5)) for key, p in params.items()}
    scalars = torch.randn(rule.directions, generator=torch.Generator().manual_seed(6))
    Baffle(directions=rule.directions, chunk=chunk).apply(State(params, {}, {}), Directions(seed, 1, 2), scalars, 0.1)
    return params


def test_apply_gives_the_same_bits_whatever_the_chunk_the_threads_and_the_replica():
    rule = Baffle(directions=5)
    wanted = apply(rule)
    assert equal(apply(rule), wanted)
    for chunk in (1, 256, 1000, 4096, 10**6):
        assert equal(apply(rule, chunk), wanted)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        assert equal(apply(rule, 10**6), wanted)
    finally:
        torch.set_num_threads(threads)
    assert not equal(apply(rule, seed=1), wanted)


def test_a_step_is_a_probe_and_an_apply():
    rule, net = Baffle(directions=8), network("lenet")
    state, b = rule.init(net, seed=1), batch(rule, dtype=torch.float32)
    other = copied(state)
    stats = rule.step(net, state, b, 0.1)
    scalars, probed = rule.probe(net, other, b, 0.1)
    rule.apply(other, b.draws, scalars, 0.1)
    assert equal(state.params, other.params) and stats == probed


def test_the_step_is_the_mean_of_scalars_times_signs():
    rule = Baffle(directions=6)
    state, b = small_problem(rule)
    scalars = torch.randn(6, dtype=torch.float64)
    before = torch.cat([p.flatten() for p in state.params.values()])
    wanted = before - 0.3 * (scalars[:, None] * signs(state.params, b.draws, 6)).mean(0)
    rule.apply(state, b.draws, scalars, 0.3)
    got = torch.cat([p.flatten() for p in state.params.values()])
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-14)


def test_sixty_steps_on_the_digits_halve_the_loss():
    rule, net = Baffle(lr=0.2), network("mlp-tanh")  # 2,130 parameters, 32 directions: η √(d/K) = 1.6
    x, y = (torch.from_numpy(a[:200]) for a in load_digits(return_X_y=True))
    x, weight = x.float().view(-1, *SHAPE) / 16, torch.ones(200)
    state, losses = rule.init(net, seed=0), []
    for step in range(60):
        stats = rule.step(net, state, Batch(x, y, weight, Directions(0, 0, step)), rule.lr)
        losses.append(float(stats.loss) / 200)
    assert losses[0] > 2.2 and losses[-1] < losses[0] / 2


def test_impossible_settings_are_refused():
    with pytest.raises(RuleError, match="use forward or central"):
        Baffle(scheme="backward")
    for wrong in ({"directions": 0}, {"chunk": 0}, {"abreast": 0}):
        with pytest.raises(RuleError, match="directions, chunk and abreast ≥ 1"):
            Baffle(**wrong)
    with pytest.raises(RuleError, match="sigma > 0"):
        Baffle(sigma=0.0)
    with pytest.raises(RuleError, match="a pool of 8 has not 32 directions"):
        Baffle(pool=8)
