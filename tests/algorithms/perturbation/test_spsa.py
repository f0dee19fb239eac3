"""SPSA's estimate against the true gradient, of whole networks and of thinned ones, and what it leaves and needs."""

from math import log

import numpy as np
import pytest
import torch
from cases import batch, copied, network
from estimates import SMALL, assert_mean_is, digits_losses, gradient, mean_cosine, planner, problem, signs
from fedforward.algorithms import MODELS, SPSA, Network, RuleError
from fedforward.algorithms.perturbation.losses import loss_at, mask
from fedforward.algorithms.seeds import Place
from fedforward.client.plan import Planner


def thinned(net, b, dropout):
    """Return the scores of the network whose hidden outputs the step's masks leave out, written out."""

    def scores(params):
        x = b.x
        for i in net.hidden:
            x = net.block(i, params, x)
            x = torch.where(mask(b.draws, i, x.shape, dropout), x / (1 - dropout), torch.zeros(()).double())
        return net.block(net.output, params, x)

    return scores


ESTIMATED = [*((name, 0.0) for name in SMALL), ("mlp-gelu", 0.25), ("lenet", 0.25)]


@pytest.mark.parametrize(
    "name, dropout", [pytest.param(*row, marks=[pytest.mark.slow] * (row[0] == "mlp-gelu")) for row in ESTIMATED]
)
def test_the_estimate_is_unbiased_and_as_near_as_theory_has_it(name, dropout):
    net, rule = SMALL[name], SPSA(directions=1008, sigma=1e-5, dropout=dropout)
    state, b = problem(rule, net)
    truth = gradient(state.params, b, thinned(net, b, dropout))
    samples = rule.probe(net, state, b, 0.1)[0][:, None] * signs(state.params, b.draws, 1008)
    assert_mean_is(samples, truth)
    k, d = 16, len(truth)
    cosine = mean_cosine(samples.view(-1, k, d).mean(1), truth)
    assert cosine == pytest.approx((k / (k + d + 1)) ** 0.5, rel=0.1)


@pytest.mark.parametrize("name", ["mlp-tanh", "mlp-gelu"])  # max-pooling has kinks
def test_the_bias_shrinks_with_the_square_of_sigma(name):
    net, sigmas, errors = SMALL[name], (1e-1, 3e-2, 1e-2, 3e-3), []
    state, b = problem(SPSA(), net)
    slopes = signs(state.params, b.draws, 16) @ gradient(state.params, b, lambda params: net.forward(params, b.x))
    for sigma in sigmas:
        scalars, _ = SPSA(directions=16, sigma=sigma).probe(net, copied(state), b, 0.1)
        errors.append(float((scalars - slopes).norm()))
    assert np.polyfit([log(s) for s in sigmas], [log(e) for e in errors], 1)[0] == pytest.approx(2, abs=0.1)


@pytest.mark.parametrize("name", ["mlp", "lenet"])
def test_a_probe_leaves_parameters_within_three_halves_of_a_unit_and_many_do_not_drift(name):
    rule, net = SPSA(), network(name)
    state = rule.init(net, seed=1)
    before, moved = copied(state).params, {}
    for count in (1, 100):
        for s in range(count):
            rule.probe(net, state, batch(rule, step=s, dtype=torch.float32), 0.1)
        for key, p in state.params.items():
            unit = torch.finfo(p.dtype).eps * (before[key].abs() + rule.sigma)  # at least one in the last place
            moved[key] = (p - before[key]) / unit
            assert moved[key].abs().max() <= 1.5 * count
            before[key] = p.clone()
    every = torch.cat([m.flatten() for m in moved.values()])
    assert every.square().mean().sqrt() < 1.5 * 100**0.5  # a walk without a sense: √n, not n
    assert abs(every.mean()) < 4 * every.std() / len(every) ** 0.5 + 0.1
    assert all((moved[key] != 0).any() for key in moved)  # float32 does not come back exactly: what is bounded is there


def test_masks_are_functions_of_their_place_and_a_row_does_not_see_those_below_it():
    draws = SPSA().draw(Place(1, 2, 3, 4), 8, 10)
    shape = torch.Size((400, 6, 5))
    kept = mask(draws, 0, shape, 0.25)
    assert torch.equal(mask(draws, 0, shape, 0.25), kept)
    assert torch.equal(mask(draws, 0, torch.Size((7, 6, 5)), 0.25), kept[:7])
    assert abs(kept.double().mean() - 0.75) < 3 * (0.75 * 0.25 / 11000) ** 0.5
    others = [(draws, 1)] + [
        (SPSA().draw(Place(*place), 8, 10), 0) for place in ((0, 2, 3, 4), (1, 0, 3, 4), (1, 2, 3, 5))
    ]
    others.append((SPSA(own=True).draw(Place(1, 2, 3, 4), 8, 10), 0))
    for other, block in others:  # agree as often as chance has it
        agree = (mask(other, block, shape, 0.25) == kept).double().mean()
        assert abs(agree - 0.625) < 4 * (0.625 * 0.375 / 11000) ** 0.5


def test_one_mask_on_both_sides_keeps_the_scalar_and_two_drown_it():
    net, sigma = network("lenet"), 1e-3
    plain, dropped, two_masks = [], [], []
    for s in range(40):
        for found, rule in ((plain, SPSA()), (dropped, SPSA(dropout=0.1))):
            state, b = rule.init(net, seed=1), batch(rule, 32, step=s, dtype=torch.float32)
            found.append(float(rule.probe(net, state, b, 0.1)[0]))
        other = rule.draw(Place(0, 1, 0, 1000 + s), 32, 10)
        sides = [loss_at(net, state.params, b._replace(draws=draws), 0.1)[0] for draws in (b.draws, other)]
        two_masks.append(found[-1] + float(sides[0] - sides[1]) / (2 * sigma))
    plain, dropped, two_masks = (float(np.std(found)) for found in (plain, dropped, two_masks))
    assert 0.5 < dropped / plain < 2 and two_masks > 4 * dropped


def test_inference_drops_nothing():
    net, rule = network("mlp"), SPSA(dropout=0.5)
    state, b = rule.init(net, seed=1), batch(rule, dtype=torch.float32)
    assert torch.equal(rule.logits(net, state, b.x), net.forward(state.params, b.x))
    assert "dropout mask" in rule.unsplittable and not SPSA().unsplittable


@pytest.mark.parametrize("model", MODELS)
def test_a_step_needs_what_inference_needs_and_its_answers(model):
    plans = planner(model)
    for size, chunk in ((64, 4096), (8, 256)):
        inference = plans.forward(size).peak
        assert plans.step(SPSA(chunk=chunk), size).peak == inference + 8  # L₊ and the answer
        for k in (2, 12, 100):
            assert plans.step(SPSA(directions=k, chunk=chunk), size).peak == inference + 4 * (k + 4)


def test_where_inference_needs_little_a_slice_of_signs_is_the_peak_and_shrinks_with_chunk():
    plans = planner("mlp")  # of one sample: activities of 128 numbers
    inference, parts = plans.forward(1).peak, plans.forward(1).parts
    held = parts["parameters"] + parts["batch"]
    for chunk in (256, 4096):
        assert inference + 64 < plans.step(SPSA(chunk=chunk), 1).peak <= held + 9 * chunk + 64


def test_dropout_costs_a_hidden_output_and_its_mask():
    net = Network(lambda: MODELS["mlp"]((784,), 10, hidden=(200,)), (784,), 10)
    plans, size = Planner(net), 64
    held = plans.forward(size).parts["parameters"] + plans.forward(size).parts["batch"]
    assert plans.step(SPSA(dropout=0.1), size).peak == held + (4 + 1 + 4) * size * 200 + 8


@pytest.mark.parametrize("dropout", [0.0, pytest.param(0.1, marks=pytest.mark.slow)])
def test_a_hundred_steps_on_the_digits_take_a_sixth_off_the_loss(dropout):
    rule, net = SPSA(lr=0.06, directions=16, dropout=dropout), network("mlp-tanh")  # 2,130 parameters: η √(d/K) = 0.7
    losses = digits_losses(rule, net, 100)
    assert losses[0] > 2.2 and losses[-1] < 5 / 6 * losses[0]


def test_impossible_settings_are_refused():
    with pytest.raises(RuleError, match="spsa needs sigma > 0"):
        SPSA(sigma=0.0)
    for dropout in (-0.1, 1.0):
        with pytest.raises(RuleError, match="0 ≤ dropout < 1"):
            SPSA(dropout=dropout)
