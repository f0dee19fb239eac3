"""The consensus of few or many particles against the gradient, and whose losses it compares."""

from functools import cache
from math import e

import pytest
import torch
from cases import network
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
from fedforward.algorithms import Consensus, RuleError

K, GROUPS = 16, 126


@cache
def cloud(name):
    """Return losses (groups, 1, K) of particles, their directions (groups, K, d) and the gradient."""
    net, probing = SMALL[name], Consensus(directions=K * GROUPS, sigma=1e-5)
    state, b = problem(probing, net)
    truth = gradient(state.params, b, lambda params: net.forward(params, b.x))
    losses = probing.probe(net, state, b, 1.0)[0].view(GROUPS, 1, K)
    return losses, signs(state.params, b.draws, K * GROUPS).view(GROUPS, K, -1), truth


def estimates(name, s):
    """Return estimates (groups, d) of K particles each, what they are if no loss counts, the gradient and the rule."""
    losses, z, truth = cloud(name)
    rule = Consensus(directions=K, sigma=1e-5, alpha=float(s / 1e-5 / truth.norm()))
    c = torch.stack([rule.coefficients(f, torch.ones(1).double())[0] for f in losses])
    return (c[:, :, None] * z).sum(1), -rule.sigma * z.mean(1), truth, rule


@pytest.mark.parametrize("name", MOSTLY_SLOW)
def test_the_estimate_is_on_average_the_gradient_of_the_length_that_the_docstring_states(name):
    found, blind, truth, rule = estimates(name, s=0.01)
    # The mean of the particles is 0 on average, and noise: without it fewer draws are enough.
    assert_mean_is(found - blind, rule.alpha * rule.sigma**2 * (1 - 1 / K) * truth)
    assert blind.norm(dim=1).mean() > 10 * (found - blind).norm(dim=1).mean()


@pytest.mark.parametrize("name", MOSTLY_SLOW)
@pytest.mark.parametrize("s", [0.3, 1.0])
def test_the_cosine_with_the_gradient_is_the_stated_one(name, s):
    found, _, truth, _ = estimates(name, s)
    assert mean_cosine(found, truth) == pytest.approx(s / (s**2 + len(truth) * e ** (s**2) / K) ** 0.5, rel=0.1)


@pytest.mark.parametrize("alpha", [0.01, 1.0, 30.0, 1e4])
def test_of_all_particles_of_a_linear_loss_the_consensus_is_at_a_tanh_of_the_gradient(alpha):
    sigma, g = 0.1, torch.tensor([3.0, -1.0, 0.2, 0.0, -0.05, 0.5]).double()
    z = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0]).double()] * 6)
    c = Consensus(directions=64, alpha=alpha, sigma=sigma).coefficients((sigma * z @ g)[None], torch.ones(1).double())
    torch.testing.assert_close(c[0] @ z, sigma * torch.tanh(alpha * sigma * g))


def test_a_hop_goes_to_the_consensus_point_and_a_drift_part_of_the_way():
    rule, net = Consensus(directions=K, alpha=30.0, sigma=0.1), SMALL["mlp-tanh"]
    state, b = problem(rule, net)
    before, z = flat(state.params), signs(state.params, b.draws, K)
    losses, stats = rule.probe(net, state, b, 1.0)
    weights = (-30 * losses).exp()
    consensus = (weights[:, None] * (before + 0.1 * z)).sum(0) / weights.sum()
    assert float(stats.loss / stats.weight) == pytest.approx(float(losses[-1]))
    rule.apply(state, b.draws, losses, 0.25)
    torch.testing.assert_close(flat(state.params), before.lerp(consensus, 0.25))
    state, _ = problem(rule, net)
    rule.apply(state, b.draws, losses, 1.0)
    torch.testing.assert_close(flat(state.params), consensus)


def test_what_all_losses_of_a_client_have_in_common_does_not_matter_and_samples_do():
    rule = Consensus(directions=5, alpha=2.0)
    losses = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).double()
    weights = torch.tensor([0.5, 0.3, 0.2]).double()
    wanted = rule.coefficients(losses, weights)
    torch.testing.assert_close(rule.coefficients(losses + 1000, weights), wanted)
    torch.testing.assert_close(rule.coefficients(losses + torch.tensor([[0.0], [7], [-50]]), weights), wanted)
    assert float(wanted.sum()) == pytest.approx(-rule.sigma) and (wanted < 0).all()
    wanted_ratio = torch.tensor([[0.2 / 0.5], [1.0], [0.5 / 0.2]]).double()
    ratio = rule.coefficients(losses, weights.flip(0)) / wanted
    torch.testing.assert_close(ratio / ratio[1, 0], wanted_ratio.expand(3, 5))
    torch.testing.assert_close(
        rule.coefficients(losses[:1], weights[:1] / 0.5)[0], wanted[0] / wanted[0].sum() * -rule.sigma
    )


def test_a_step_needs_what_inference_needs_and_a_loss_a_particle():
    plans = planner("lenet")
    inference = plans.forward(64).peak
    for k in (2, 12, 32):
        plan = plans.step(Consensus(directions=k), 64)
        assert plan.peak == inference + 4 * (k + 3)
        assert plan.flops == k * plans.forward(64).flops


@pytest.mark.parametrize("own", [False, True])
def test_fifty_hops_on_the_digits_take_a_sixth_off_the_loss(own):
    losses = digits_losses(Consensus(directions=24, own=own), network("mlp-tanh"), 50)
    assert losses[0] > 2.2 and losses[-1] < 5 / 6 * losses[0]


@pytest.mark.parametrize(
    "options, words",
    [
        ({"alpha": 0.0}, "needs alpha > 0 and sigma > 0"),
        ({"sigma": -0.1}, "needs alpha > 0 and sigma > 0"),
        ({"directions": 1}, "needs directions ≥ 2"),
        ({"lr": 1.5}, "use --lr above 0, at most 1"),
        ({"lr": 0.0}, "use --lr above 0, at most 1"),
    ],
)
def test_impossible_settings_are_refused(options, words):
    with pytest.raises(RuleError, match=words):
        Consensus(**options)
