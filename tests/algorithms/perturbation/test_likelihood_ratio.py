"""Likelihood ratios against autograd: of the loss, of the smoothed loss, block by block; and what they need."""

import itertools
from dataclasses import replace
from math import log
from statistics import NormalDist

import numpy as np
import pytest
import torch
from cases import CLASSES, SHAPE, batch, copied, descent, double, leaves, step
from cases import weighted_cross_entropy as cross_entropy
from estimates import MOSTLY_SLOW, SMALL, assert_mean_is, flat, gradient, mean_cosine, problem
from fedforward.algorithms import Batch, LikelihoodRatio, Network, RuleError
from fedforward.algorithms.models import mlp
from fedforward.algorithms.seeds import Place
from fedforward.client.plan import Planner
from sklearn.datasets import load_digits

PLAIN = LikelihoodRatio(momentum=0.0)


def gradients_of_steps(rule, net, state, b, steps):
    """Return the estimates (steps, d) of as many steps from one replica and batch."""
    found = []
    for s in range(steps):
        draws = rule.draw(Place(0, 1, 0, s), len(b.y), net.classes)
        found.append(flat(descent(rule, net, copied(state), b._replace(draws=draws))))
    return torch.stack(found)


@pytest.mark.parametrize("draws", ["independent", "orthogonal"])
@pytest.mark.parametrize("name", MOSTLY_SLOW)
def test_the_estimate_is_unbiased_of_every_block(name, draws):
    net, rule = SMALL[name], replace(PLAIN, directions=16, sigma=1e-5, draws=draws)  # no bias to speak of
    state, b = problem(rule, net)
    truth = gradient(state.params, b, lambda params: net.forward(params, b.x))
    found = gradients_of_steps(rule, net, state, b, 250)
    start = 0
    for i in range(len(net.blocks)):  # one block's estimate knows nothing of another's
        size = sum(state.params[key].numel() for key in net.keys(i))
        own, wanted = found[:, start : start + size], truth[start : start + size]
        seen = wanted != 0  # kernels reach past the edges of small maps
        assert_mean_is(own[:, seen], wanted[seen])
        assert not own[:, ~seen].any()
        start += size


def test_the_estimate_is_that_of_the_smoothed_loss():
    net, rule = SMALL["mlp-tanh"], replace(PLAIN, directions=16, sigma=2.0)
    state, b = problem(rule, net)
    found = gradients_of_steps(rule, net, state, b, 500)
    smooth, g = [], torch.Generator().manual_seed(0)
    repeats = 4000  # of the batch, each with noise of its own
    many = Batch(*(t.repeat(repeats, *[1] * (t.dim() - 1)) for t in b[:3]))
    for i in range(len(net.blocks)):
        params = leaves(state.params)
        a = many.x
        for j in range(len(net.blocks)):
            a = net.block(j, params, a)
            if j == i:
                a = a + rule.sigma * torch.randn(a.shape, generator=g, dtype=a.dtype)
        loss = cross_entropy(a, many)
        smooth += torch.autograd.grad(loss, [params[key] for key in net.keys(i)])
    smooth = torch.cat([t.flatten() for t in smooth])
    error = found.std(0) / len(found) ** 0.5  # that of `smooth` is far smaller
    bound = NormalDist().inv_cdf(1 - 0.0027 / 2 / len(smooth))
    assert ((found.mean(0) - smooth) / error).abs().max() < bound
    plain = gradient(state.params, b, lambda params: net.forward(params, b.x))
    assert ((found.mean(0) - plain) / error).abs().max() > 1.5 * bound  # and not of the loss itself


# Of lenet all but the first block, above which pooling picks the largest: there a kink is never far.
@pytest.mark.parametrize("name, first", [("mlp-tanh", 0), ("mlp-gelu", 0), ("lenet", 1)])
def test_the_bias_shrinks_with_the_square_of_sigma(name, first):
    net, sigmas = SMALL[name], (3e-1, 1e-1, 3e-2, 1e-2)
    state, b = problem(PLAIN, net)
    keys = [key for i in range(first, len(net.blocks)) for key in net.keys(i)]

    def estimate(sigma):
        grads = descent(replace(PLAIN, sigma=sigma), net, copied(state), b)
        return flat({key: grads[key] for key in keys})

    errors = [float((estimate(sigma) - estimate(1e-4)).norm()) for sigma in sigmas]
    assert np.polyfit([log(s) for s in sigmas], [log(e) for e in errors], 1)[0] == pytest.approx(2, abs=0.1)


@pytest.mark.parametrize("draws", ["independent", "orthogonal"])
@pytest.mark.parametrize("r", [1, 4, 16, 24])
def test_the_error_of_a_samples_estimate_is_theorys(r, draws):
    n, rows = 16, 3000
    net = Network(lambda: mlp((9,), 5, hidden=(n,), activation="tanh"), (9,), 5)
    rule = replace(PLAIN, directions=r, sigma=1e-3, draws=draws)
    state = double(rule.init(net, seed=1))
    one = batch(rule, 1, shape=(9,), classes=5)
    a = net.block(0, state.params, one.x)
    many = Batch(
        one.x.expand(rows, -1), one.y.expand(rows), torch.ones(rows).double(), rule.draw(Place(0, 1, 0, 0), rows, 5)
    )
    found = rule._estimate(net, state.params, many, 0, a.expand(rows, -1)) * rows
    top = a.clone().requires_grad_()
    (truth,) = torch.autograd.grad(cross_entropy(net.block(1, state.params, top), one), top)
    error = float((found - truth).square().sum(1).mean() / truth.square().sum())
    if draws == "independent":
        wanted = (n + 1) / r
        if r > 1:  # of one, √(2/π) as much: the law is that of many
            assert mean_cosine(found, truth[0]) == pytest.approx((r / (r + n + 1)) ** 0.5, rel=0.1)
    else:  # a full group of n, and a part of one that is independent of it
        wanted = sum(m * (n + 2 - m) for m in [n] * (r // n) + [r % n]) / r**2
    assert error == pytest.approx(wanted, rel=0.1)


@pytest.mark.parametrize("count", [3, 8, 11])
def test_orthogonal_draws_are_normal_and_orthogonal_in_groups(count):
    rule, n = LikelihoodRatio(directions=count, draws="orthogonal"), 8
    drawn = torch.stack(list(rule._noise(rule.draw(Place(0, 0, 0, 0), 4000, 5), 1, n, torch.float64)))
    assert drawn.shape == (count, 4000, n)
    for start in range(0, count, n):
        group = drawn[start : start + n].transpose(0, 1)
        products = group @ group.mT
        assert (products - torch.diag_embed(products.diagonal(dim1=1, dim2=2))).abs().max() < 1e-12
    law = torch.distributions.Normal(0.0, 1.0)
    for z, draw in itertools.product((-2.0, 0.0, 1.0), drawn):  # each by itself; units of a draw are independent
        p = float(law.cdf(torch.tensor(z)))
        assert abs((draw <= z).double().mean() - p) < 4 * (p * (1 - p) / draw.numel()) ** 0.5


@pytest.mark.parametrize("draws", ["independent", "orthogonal"])
@pytest.mark.parametrize("widths", [(784, 128, 128), (100, 30, 400, 20), (50, 200, 40)])
def test_a_step_needs_one_block_and_inference_above_it(widths, draws):
    size, r, peaks = 64, 8, []
    net = Network(lambda: mlp(widths[:1], 10, hidden=widths[1:]), widths[:1], 10)
    sizes = (*widths, 10)
    for i in range(1, len(sizes)):
        above = max([sizes[i], *(sum(pair) for pair in itertools.pairwise(sizes[i:]))])
        group = (r - 1) * sizes[i] if draws == "orthogonal" else 0
        peaks.append(size * ((sizes[i - 1] if i > 1 else 0) + 3 * sizes[i] + above + group))
    numbers = Planner(net).step(replace(PLAIN, directions=r, draws=draws), size).parts["activations"] / 4
    assert numbers == max(peaks) + 2 * size  # losses, and shares


def test_a_step_costs_two_passes_a_pair_of_what_is_above():
    net, size, r = Network(lambda: mlp((784,), 10), (784,), 10), 32, 8
    plan = Planner(net).step(replace(PLAIN, directions=r), size)
    first, second, third = 784 * 128, 128 * 128, 128 * 10
    # Every block runs twice and multiplies its gradient out; and 2R passes of those above.
    wanted = 3 * (first + second + third) + 2 * r * (second + 2 * third)
    assert plan.flops == 2 * size * wanted and plan.flops / plan.forward_flops == pytest.approx(6, abs=0.5)


def test_two_epochs_read_two_digits_in_three():
    net, rule = Network(lambda: mlp(SHAPE, CLASSES), SHAPE, CLASSES), LikelihoodRatio()
    x, y = (torch.from_numpy(a) for a in load_digits(return_X_y=True))
    x, rng, place, state = x.float().view(-1, *SHAPE) / 16, np.random.default_rng(0), 0, rule.init(net, seed=0)
    train, test = torch.from_numpy(rng.permutation(len(y))).split([1437, 360])
    for _ in range(2):
        for rows in train[torch.from_numpy(rng.permutation(len(train)))].split(16):
            draws = rule.draw(Place(0, 0, 0, place), len(rows), CLASSES)
            step(rule, net, state, Batch(x[rows], y[rows], torch.ones(len(rows)), draws))
            place += 1
    accuracy = float((rule.logits(net, state, x[test]).argmax(1) == y[test]).float().mean())
    assert accuracy > 2 / 3


def test_impossible_settings_are_refused():
    for wrong in ({"directions": 0}, {"sigma": 0.0}):
        with pytest.raises(RuleError, match="directions ≥ 1 and sigma > 0"):
            LikelihoodRatio(**wrong)
    with pytest.raises(RuleError, match="use independent or orthogonal"):
        LikelihoodRatio(draws="sobol")
