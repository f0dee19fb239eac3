"""Forward gradients: slopes against autograd, estimates against the true gradient, bytes against a formula."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from cases import NETS, SHAPE, assert_close, batch, double, leaves, network, nonuniform
from estimates import MOSTLY_SLOW, SMALL, assert_mean_is, flat, gradient, mean_cosine, problem, signs
from fedforward.algorithms import MODELS, Backprop, Batch, ForwardGradient, Network, RuleError, State
from fedforward.algorithms.directions import Directions, layout_of
from fedforward.algorithms.models import mlp
from fedforward.algorithms.perturbation.forward_gradient import projection
from fedforward.client.plan import Planner
from sklearn.datasets import load_digits


def estimate(rule, net, step):
    """Return the directions (K, d) of a step, the rule's estimate (d,) from them, and the true gradient (d,)."""
    state, b = problem(rule, net)
    b = b._replace(draws=Directions(0, 1, step))
    scalars, _ = rule.probe(net, state, b, 0.1)
    z = signs(state.params, b.draws, rule.directions)
    truth = gradient(state.params, b, lambda params: net.forward(params, b.x))
    return z, scalars @ z / rule.directions, truth


@pytest.mark.parametrize("name", NETS)
def test_slopes_are_those_of_autograd(name):
    net, rule = network(name), ForwardGradient(directions=4)
    state = double(rule.init(net, seed=1))
    b = nonuniform(batch(rule))
    slopes, stats = rule.probe(net, state, b, 0.1)
    truth = gradient(state.params, b, lambda params: net.forward(params, b.x))
    torch.testing.assert_close(slopes, signs(state.params, b.draws, 4) @ truth, rtol=0, atol=1e-12)
    assert_close(stats._asdict(), Backprop().step(net, state, b, 0.0)._asdict(), atol=1e-12)


@pytest.mark.parametrize("wrt_input", [False, True])
@pytest.mark.parametrize("name", NETS)
def test_a_blocks_tangent_is_the_transpose_of_its_pull(name, wrt_input):
    net, x = network(name), torch.rand(5, *SHAPE, dtype=torch.float64)
    params = double(Backprop().init(net, seed=1)).params
    for i in range(len(net.blocks)):
        tangents = Directions(0, 0, 0).tensors(params, 0, net.keys(i), 4096)
        g = torch.Generator().manual_seed(i)
        dx = torch.randn(x.shape, generator=g, dtype=torch.float64) if wrt_input else None
        a, da = net.block_jvp(i, params, tangents, x, dx)
        own = {key: p for key, p in leaves(params).items() if key in tangents} | {"": x.clone().requires_grad_()}
        out = net.block(i, own, own[""])
        cotangent = torch.rand(out.shape, generator=g, dtype=torch.float64)
        pulled = dict(zip(own, torch.autograd.grad(out, list(own.values()), cotangent), strict=True))
        wanted = sum((pulled[key] * z).sum() for key, z in tangents.items())
        torch.testing.assert_close((cotangent * da).sum(), wanted + ((pulled[""] * dx).sum() if wrt_input else 0))
        torch.testing.assert_close(a, out.detach())
        x = a


@pytest.mark.parametrize("name", MOSTLY_SLOW)
def test_the_mean_is_unbiased_and_as_near_as_theory_has_it(name):
    k, samples = 16, 2000
    rule = ForwardGradient(directions=samples)
    state, b = problem(rule, SMALL[name])
    found = rule.probe(SMALL[name], state, b, 0.1)[0][:, None] * signs(state.params, b.draws, samples)
    truth = gradient(state.params, b, lambda params: SMALL[name].forward(params, b.x))
    assert_mean_is(found, truth)
    d = len(truth)
    cosine = mean_cosine(found.view(-1, k, d).mean(1), truth)
    assert cosine == pytest.approx(math.sqrt(k / (k + d + 1)), rel=0.1)


@pytest.mark.parametrize("name", MOSTLY_SLOW)
def test_the_projection_is_unbiased_and_nearer(name):
    k, (state, b), found = 16, problem(ForwardGradient(), SMALL[name]), []
    truth = gradient(state.params, b, lambda params: SMALL[name].forward(params, b.x))
    for step in range(600):
        z = signs(state.params, Directions(0, 1, step), k)
        change = torch.from_numpy(projection(Directions(0, 1, step), layout_of(state.params), k, 4096))
        found.append(change @ (z @ truth) @ z / k)
    found, d = torch.stack(found), len(truth)
    assert_mean_is(found, truth)
    assert mean_cosine(found, truth) == pytest.approx(math.sqrt(k / d), rel=0.03)
    assert found.square().sum(1).mean() == pytest.approx(float(truth.square().sum()) * d / k, rel=0.1)


def test_the_projection_leaves_out_what_is_orthogonal_to_every_direction():
    z, found, truth = estimate(ForwardGradient(directions=12, combine="projection"), SMALL["mlp-gelu"], 0)
    torch.testing.assert_close(z @ found * 12 / len(truth), z @ truth, rtol=0, atol=1e-12)


@pytest.mark.parametrize("step", range(3))
def test_as_many_directions_as_parameters_give_the_gradient_itself(step):
    _, found, truth = estimate(ForwardGradient(directions=90, combine="projection"), SMALL["mlp-tanh"], step)
    torch.testing.assert_close(found, truth, rtol=0, atol=1e-12)


def test_directions_that_are_not_independent_count_once():
    # Of three signs there are four directions up to their sense, in a space of three dimensions.
    layout = (("a", 2), ("b", 1))
    params = {"a": torch.zeros(2, dtype=torch.float64), "b": torch.zeros((), dtype=torch.float64)}
    ranks = set()
    for step in range(40):
        z = signs(params, Directions(0, 0, step), 2)
        ranks.add(rank := int(torch.linalg.matrix_rank(z)))
        change = torch.from_numpy(projection(Directions(0, 0, step), layout, 2, 256))
        torch.testing.assert_close(change / 2, 3 / rank * torch.linalg.pinv(z @ z.T), rtol=0, atol=1e-12)
    assert ranks == {1, 2}


@pytest.mark.parametrize("chunk", [1, 600, 10**6])
@pytest.mark.parametrize("candidates", [(), (7, 2, 5, 0)])
def test_tangents_and_products_are_the_directions_own(candidates, chunk):
    params = {"a": torch.zeros(300, 7), "b": torch.zeros(()), "c": torch.zeros(513), "d": torch.zeros(2, 2)}
    directions = Directions(1, 2, 3, candidates=candidates)
    z = signs({key: p.double() for key, p in params.items()}, directions, 4)
    assert np.array_equal(directions.products(layout_of(params), 4, chunk), (z @ z.T).numpy())
    for keys in (["a"], ["b", "c"], ["d"], list(params), []):
        got = directions.tensors(params, 3, keys, chunk)
        before = sum(params[key].numel() for key in list(params)[: list(params).index(keys[0])]) if keys else 0
        assert {key: z.shape for key, z in got.items()} == {key: params[key].shape for key in keys}
        if keys:
            assert torch.equal(flat(got).double(), z[3, before : before + flat(got).numel()])


def test_the_chunk_changes_no_bit():
    net = network("lenet")
    wanted = None
    for chunk in (256, 1000, 10**6):
        rule = ForwardGradient(directions=3, combine="projection", chunk=chunk)
        scalars, _ = rule.probe(net, rule.init(net, 1), batch(rule, dtype=torch.float32), 0.1)
        assert wanted is None or torch.equal(scalars, wanted)
        wanted = scalars


def above(rule, net, size):
    """Return the numbers of four bytes that a step needs beyond parameters and batch."""
    return Planner(net).step(rule, size).parts["activations"] / 4


@pytest.mark.parametrize("widths", [(784, 128, 128), (100, 30, 400, 20), (50, 200, 40)])
@pytest.mark.parametrize("size", [32, 100])
def test_dense_blocks_need_their_own_tangents_and_two_of_every_activation(widths, size):
    net = Network(lambda: mlp(widths[:1], 10, hidden=widths[1:]), widths[:1], 10)
    blocks, k = [], 7
    for i, (before, width) in enumerate(zip(widths, (*widths[1:], 10), strict=True)):
        tangents = before * width + width
        blocks.append(tangents + 2 * size * (width + (before if i else 0)))  # the first input is the batch
    assert above(ForwardGradient(directions=k, chunk=256), net, size) == max(blocks) + k + 3  # answers and stats


def test_a_convolution_needs_four_of_its_map():
    net, size, k = Network(lambda: MODELS["lenet"]((1, 28, 28), 10), (1, 28, 28), 10), 32, 7
    tangents, before, conv = 64 * 16 * 25 + 64, 16 * 14 * 14, 64 * 14 * 14
    assert above(ForwardGradient(directions=k), net, size) == tangents + size * (2 * before + 4 * conv) + k + 3


@pytest.mark.parametrize("model, least, most", [("mlp", 0.9, 1), ("lenet", 1, 1.1), ("cnn", 1, 1.15)])
def test_backpropagation_needs_about_as_much(model, least, most):
    shape = (3, 32, 32) if model == "cnn" else (1, 28, 28)
    planner = Planner(Network(lambda: MODELS[model](shape, 10), shape, 10))
    assert least < planner.step(ForwardGradient(), 32).peak / planner.step(Backprop(), 32).peak < most


def test_directions_cost_passes_and_no_memory():
    net = Network(lambda: MODELS["mlp"]((1, 28, 28), 10), (1, 28, 28), 10)
    plan = Planner(net).step(ForwardGradient(directions=100), 32)
    assert plan.peak - Planner(net).step(ForwardGradient(directions=10), 32).peak == 4 * 90
    first, others = 784 * 128, 128 * 128 + 128 * 10  # the batch has no tangent
    assert plan.flops == 100 * 2 * 32 * (2 * first + 3 * others) and plan.forward_flops == 2 * 32 * (first + others)


@pytest.mark.parametrize("combine", ["mean", pytest.param("projection", marks=pytest.mark.slow)])
def test_sixty_steps_on_the_digits_halve_the_loss(combine):
    rule, net = ForwardGradient(lr=0.2, combine=combine), network("mlp-tanh")  # 2,130 parameters: η √(d/K) = 1.6
    x, y = (torch.from_numpy(a[:200]) for a in load_digits(return_X_y=True))
    x, weight = x.float().view(-1, *SHAPE) / 16, torch.ones(200)
    state, losses = rule.init(net, seed=0), []
    for step in range(60):
        stats = rule.step(net, state, Batch(x, y, weight, Directions(0, 0, step)), rule.lr)
        losses.append(float(stats.loss) / 200)
    assert losses[0] > 2.2 and losses[-1] < losses[0] / 2


def test_the_parts_of_a_batch_add_up_to_its_projection():
    rule, net = replace(ForwardGradient(), directions=5, combine="projection"), network("mlp")
    state, b = double(rule.init(net, seed=1)), nonuniform(batch(rule))
    parts = [Batch(b.x[i:j], b.y[i:j], b.weight[i:j], b.draws, b.weight.sum()) for i, j in ((0, 4), (4, 6))]
    whole = rule.probe(net, state, b, 0.1)[0]
    torch.testing.assert_close(sum(rule.probe(net, state, part, 0.1)[0] for part in parts), whole, rtol=0, atol=1e-12)
    moved = State({key: p.clone() for key, p in state.params.items()}, {}, {})
    rule.step(net, moved, b, 0.3)
    wanted = flat(state.params) - 0.3 * (whole @ signs(state.params, b.draws, 5)) / 5
    torch.testing.assert_close(flat(moved.params), wanted, rtol=0, atol=1e-13)


def test_impossible_settings_are_refused():
    with pytest.raises(RuleError, match="use mean or projection"):
        ForwardGradient(combine="sum")
    with pytest.raises(RuleError, match="forward-gradient needs directions, chunk and abreast ≥ 1"):
        ForwardGradient(directions=0)
