"""The sign estimate's direction, which is the gradient's, and its length, which is nobody's."""

from math import pi

import pytest
import torch
from cases import copied, network
from estimates import MOSTLY_SLOW, SMALL, digits_losses, gradient, mean_cosine, planner, problem, signs
from fedforward.algorithms import SPSA, State, ZOSign


@pytest.mark.parametrize("name", MOSTLY_SLOW)
def test_it_points_along_the_gradient_with_the_length_and_cosine_that_the_docstring_states(name):
    net, count, k = SMALL[name], 1008, 16
    rule = ZOSign(directions=count, sigma=1e-5)
    state, b = problem(rule, net)
    truth = gradient(state.params, b, lambda params: net.forward(params, b.x))
    c = rule.coefficients(rule.probe(net, state, b, 0.1)[0][None], torch.ones(1).double())[0] * count
    assert torch.equal(c.abs(), torch.ones(count).double())
    samples, d = c[:, None] * signs(state.params, b.draws, count), len(truth)
    along = samples @ truth / truth.norm()
    # The slope of a gradient with a few large parts is not quite normal: 5 %, and 3 standard errors.
    assert abs(along.mean() - (2 / pi) ** 0.5) < 0.05 + 3 * along.std() / count**0.5
    cosine = mean_cosine(samples.view(-1, k, d).mean(1), truth)
    assert cosine == pytest.approx((k / (k - 1 + pi * d / 2)) ** 0.5, rel=0.1)


def test_one_direction_is_the_sign_of_every_coordinate_and_the_scale_of_the_loss_is_nothing():
    net, rule = SMALL["lenet"], ZOSign()
    state, b = problem(rule, net)
    scalars, _ = rule.probe(net, copied(state), b, 0.1)
    assert torch.equal(scalars, SPSA().probe(net, copied(state), b, 0.1)[0])  # raw: the sign is of the clients' mean
    dense = scalars * signs(state.params, b.draws, 1)[0]
    for scale in (1, 1e-6, 1e6):
        moved = State({key: torch.zeros_like(p) for key, p in state.params.items()}, {}, {})
        rule.apply(moved, b.draws, scale * scalars, 0.25)
        assert torch.equal(torch.cat([p.flatten() for p in moved.params.values()]), -0.25 * dense.sign())


def test_of_several_answers_each_has_its_sign_and_its_weight():
    answers, weights = torch.tensor([[3.0, -0.1], [-2.0, 0.0]]), torch.tensor([0.75, 0.25])
    assert ZOSign(directions=2).coefficients(answers, weights).tolist() == [[0.375, -0.375], [-0.125, 0.0]]


def test_it_needs_what_spsa_needs():
    plans = planner("lenet")
    assert plans.step(ZOSign(), 64).peak == plans.step(SPSA(), 64).peak == plans.forward(64).peak + 8


@pytest.mark.slow
def test_a_hundred_steps_on_the_digits_take_a_sixth_off_the_loss():
    losses = digits_losses(ZOSign(lr=0.05, directions=16), network("mlp-tanh"), 100)
    assert losses[0] > 2.2 and losses[-1] < 5 / 6 * losses[0]
