"""Evolution's estimate against the gradient of the smoothed loss, and what ranks keep of it."""

import itertools
from math import pi

import numpy as np
import pytest
import torch
from cases import copied, network
from estimates import (
    MOSTLY_SLOW,
    SMALL,
    assert_mean_is,
    digits_losses,
    flat,
    gradient,
    mean_cosine,
    planner,
    problem,
    signs,
)
from fedforward.algorithms import Evolution, Network, RuleError
from fedforward.algorithms.models import mlp
from fedforward.algorithms.perturbation.evolution import centred_ranks

K = 16
TINY = Network(lambda: mlp((1,), 2, hidden=(1,), activation="tanh"), (1,), 2)  # 6 parameters


def at(params, vector):
    """Return parameters with the values of a vector (d,)."""
    parts = vector.split([p.numel() for p in params.values()])
    return {key: part.view_as(p) for (key, p), part in zip(params.items(), parts, strict=True)}


@pytest.mark.parametrize("name", MOSTLY_SLOW)
def test_without_shaping_a_small_cloud_sees_the_gradient(name):
    net, rule = SMALL[name], Evolution(directions=1008, sigma=1e-5, shaping="none")
    state, b = problem(rule, net)
    truth = gradient(state.params, b, lambda params: net.forward(params, b.x))
    c = rule.coefficients(rule.probe(net, state, b, 0.1)[0][None], torch.ones(1).double())[0]
    samples = len(c) * c[:, None] * signs(state.params, b.draws, len(c))
    assert_mean_is(samples, truth)
    cosine = mean_cosine(samples.view(-1, K, len(truth)).mean(1), truth)
    assert cosine == pytest.approx((K / (K + len(truth) + 1)) ** 0.5, rel=0.1)


def test_without_shaping_a_large_cloud_sees_the_gradient_of_the_smoothed_loss():
    sigma = 1.5
    rule = Evolution(directions=2000, sigma=sigma, shaping="none")
    state, b = problem(rule, TINY)
    origin, truth = flat(state.params), torch.zeros(6).double()
    nodes, weights = np.polynomial.legendre.leggauss(12)
    for i, z, (node, weight) in itertools.product(
        range(6), itertools.product((-1.0, 1.0), repeat=5), zip(nodes, weights / 2, strict=True)
    ):
        moved = origin + sigma * torch.tensor([*z[:i], node, *z[i:]]).double()
        truth[i] += weight / 32 * gradient(at(state.params, moved), b, lambda params: TINY.forward(params, b.x))[i]
    c = rule.coefficients(rule.probe(TINY, state, b, 0.1)[0][None], torch.ones(1).double())[0]
    samples = len(c) * c[:, None] * signs(state.params, b.draws, len(c))
    assert_mean_is(samples, truth)
    plain = gradient(state.params, b, lambda params: TINY.forward(params, b.x))
    with pytest.raises(AssertionError):
        assert_mean_is(samples, plain)


@pytest.mark.parametrize("name", MOSTLY_SLOW)
def test_ranks_point_along_the_gradient_with_the_length_and_cosine_that_the_docstring_states(name):
    net, probing, rule = SMALL[name], Evolution(directions=1008, sigma=1e-4), Evolution(directions=K)
    state, b = problem(probing, net)
    truth = gradient(state.params, b, lambda params: net.forward(params, b.x))
    fitness = probing.probe(net, state, b, 0.1)[0].view(-1, 1, 2 * K)  # of 63 generations
    c = torch.stack([rule.coefficients(f, torch.ones(1).double())[0] for f in fitness])
    directions = signs(state.params, b.draws, 1008).view(-1, K, len(truth))
    estimates = (c[:, :, None] * directions).sum(1)
    along = estimates @ truth / truth.norm()
    # 5 % for slopes that are not quite normal, and 3 standard errors.
    assert abs(along.mean() * 2 * pi**0.5 - 1) < 0.05 + 3 * along.std() / len(along) ** 0.5 * 2 * pi**0.5
    assert mean_cosine(estimates, truth) == pytest.approx((K / (K - 1 + pi * len(truth) / 3)) ** 0.5, rel=0.1)


def test_ranks_see_the_order_of_losses_and_nothing_else():
    rule = Evolution(directions=5)
    fitness, weights = torch.randn(2, 10, generator=torch.Generator().manual_seed(0)), torch.tensor([0.75, 0.25])
    wanted = rule.coefficients(fitness, weights)
    assert torch.equal(rule.coefficients(fitness.exp() * 1e6, weights), wanted)
    torch.testing.assert_close(rule.coefficients(fitness, weights.flip(0)) * 3, wanted * torch.tensor([[1.0], [9.0]]))
    assert not torch.allclose(rule.coefficients(fitness[:1], weights[:1])[0], wanted[0])  # others are ranked with it


def test_ranks_are_spread_evenly_and_shared_by_equals():
    of_four = torch.tensor([[1 / 6, -0.5], [-1 / 6, 0.5]])
    torch.testing.assert_close(centred_ranks(torch.tensor([[3.0, 1.0], [2.0, 9.0]])), of_four)
    assert centred_ranks(torch.tensor([2.0, 1.0, 2.0, 5.0])).tolist() == pytest.approx([0, -0.5, 0, 0.5])
    assert not Evolution(directions=3).coefficients(torch.full((1, 6), 2.3), torch.ones(1)).any()


@pytest.mark.parametrize("shaping", ["ranks", "none"])
def test_a_step_goes_to_the_fitter_side(shaping):
    rule = Evolution(directions=1, shaping=shaping)
    state, b = problem(rule, TINY)
    z, before = signs(state.params, b.draws, 1)[0], flat(state.params)
    rule.apply(state, b.draws, torch.tensor([2.0, 1.0]).double(), 0.1)  # w − σ z is the fitter
    assert ((flat(state.params) - before) * z < 0).all()
    rule.apply(state, b.draws, torch.tensor([1.0, 2.0]).double(), 0.1)
    torch.testing.assert_close(flat(state.params), before)


def test_a_probe_leaves_parameters_within_three_halves_of_a_unit_a_pair():
    rule, net = Evolution(directions=8), network("lenet")
    state = rule.init(net, seed=1)
    _, b = problem(rule, net)
    before = copied(state).params
    rule.probe(net, state, b._replace(x=b.x.float(), weight=b.weight.float()), 0.1)
    for key, p in state.params.items():
        assert ((p - before[key]).abs() <= 1.5 * 8 * torch.finfo(p.dtype).eps * (before[key].abs() + rule.sigma)).all()


def test_a_step_needs_what_inference_needs_and_two_losses_a_direction():
    plans = planner("lenet")
    inference = plans.forward(64).peak
    for k in (2, 6, 32):
        plan = plans.step(Evolution(directions=k), 64)
        assert plan.peak == inference + 4 * (2 * k + 4)
        assert plan.flops == 2 * k * plans.forward(64).flops
    assert plans.step(Evolution(directions=6), 64).peak == inference + 64


@pytest.mark.parametrize("options", [{}, {"lr": 0.15, "shaping": "none"}])
def test_fifty_steps_on_the_digits_take_a_sixth_off_the_loss(options):
    losses = digits_losses(Evolution(directions=24, **options), network("mlp-tanh"), 50)
    assert losses[0] > 2.2 and losses[-1] < 5 / 6 * losses[0]


def test_impossible_settings_are_refused():
    with pytest.raises(RuleError, match="use ranks or none"):
        Evolution(shaping="elite")
    with pytest.raises(RuleError, match="evolution needs sigma > 0"):
        Evolution(sigma=0.0)
