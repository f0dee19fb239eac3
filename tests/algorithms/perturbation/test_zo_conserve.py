"""Of three steps the best, and that one is what is sent."""

import itertools

import pytest
import torch
from cases import copied, network
from cases import weighted_cross_entropy as cross_entropy
from estimates import SMALL, digits_losses, planner, problem
from fedforward.algorithms import SPSA, ZOConserve


def test_what_is_sent_is_spsas_answer_forwards_backwards_or_not_at_all_as_the_batch_likes_best():
    chosen = []
    # A short step and a long one; slopes from so far that they need not be those at w.
    for net, lr, seed in itertools.product(SMALL.values(), (0.01, 5.0), range(10)):
        rule = ZOConserve(lr=lr, directions=2, sigma=3.0)
        state, b = problem(rule, net, seed)
        answer, _ = SPSA(directions=2, sigma=3.0).probe(net, copied(state), b, lr)
        losses = {}
        for sign in (0, 1, -1):
            tried = copied(state)
            rule.apply(tried, b.draws, sign * answer, lr)
            losses[sign] = float(cross_entropy(net.forward(tried.params, b.x), b))
        best = min(losses, key=losses.get)
        sent, stats = rule.probe(net, state, b, lr)
        torch.testing.assert_close(sent, best * answer, rtol=1e-9, atol=1e-12)
        assert float(stats.loss / stats.weight) == pytest.approx(losses[0], rel=1e-9)  # of the network at w
        rule.apply(state, b.draws, sent, lr)
        assert float(cross_entropy(net.forward(state.params, b.x), b)) <= losses[0] + 1e-12
        chosen.append(best)
    assert all(chosen.count(sign) >= 3 for sign in (0, 1, -1))


def test_it_needs_what_inference_needs_and_its_answers():
    plans = planner("lenet")
    for size in (8, 64):
        inference = plans.forward(size).peak
        assert plans.step(ZOConserve(), size).peak == inference + 24
        assert plans.step(ZOConserve(directions=20), size).peak == inference + 4 * (20 + 5)
    flops = plans.step(ZOConserve(directions=5), 8).flops
    assert flops == (2 * 5 + 3) * plans.forward(8).flops


def test_a_hundred_steps_on_the_digits_take_a_sixth_off_the_loss_which_never_rises():
    losses = digits_losses(ZOConserve(lr=0.06, directions=16), network("mlp-tanh"), 100)
    assert losses[0] > 2.2 and losses[-1] < 5 / 6 * losses[0]
    assert all(after <= before + 1e-5 for before, after in itertools.pairwise(losses))
