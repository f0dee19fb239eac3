"""NoProp in continuous time against its loss written out, and its noise schedule against its derivative."""

from dataclasses import replace

import pytest
import torch
from cases import assert_close, batch, copied, descent, double, leaves, network, nonuniform, step
from denoised import EMBEDDINGS, NETS, SMALL, at_the_ends, embeddings, gradients, guessed, onward, train
from fedforward.algorithms.layerwise.denoising import chance
from fedforward.algorithms.layerwise.no_prop_ct import NoPropCT, falling, schedule
from fedforward.algorithms.noise import normals

RULE = NoPropCT(steps=3, **SMALL)


def gamma(params, t):
    """Return γ of one time, sigmoid by sigmoid."""

    def rising(t):
        each = zip(*(params[f"gamma.{name}"] for name in ("sizes", "rates", "shifts")), strict=True)
        return sum((1 + w.exp()).log() / (1 + (-((1 + k.exp()).log() * t + s)).exp()) for w, k, s in each)

    first, last = ((1 + end.exp()).log() for end in params["gamma.ends"])
    return first - (first + last) * (rising(t) - rising(0.0)) / (rising(1.0) - rising(0.0))


def losses(net, params, b, eta=1.0):
    found = []
    for i in range(len(b.y)):
        x, y, draws = b.x[i : i + 1], int(b.y[i]), b.draws[i : i + 1]
        u = embeddings(net, params)[y]
        t = chance(draws, 0, torch.float64)[0].requires_grad_()
        g = gamma(params, t)
        (slope,) = torch.autograd.grad(g, t, create_graph=True)
        level, first, last = (1 / (1 + each.exp()) for each in (g, gamma(params, 0.0), gamma(params, 1.0)))
        noise, end = (normals(draws, stream, len(u), torch.float64)[0] for stream in (1, 2))
        z = level**0.5 * u + (1 - level) ** 0.5 * noise
        errors = (guessed(net, params, x, z[None], t.detach())[0] - u) ** 2
        rise = -slope * (-g).exp()  # of SNR = exp(−γ)
        found.append(at_the_ends(net, params, y, first, last, end) + eta / 2 * rise * errors.sum())
    return torch.stack(found)


def state_of(rule, net):
    """Return an initial state, in float64, whose label layer and schedule are of no special form."""
    state, g = double(rule.init(net, seed=1)), torch.Generator().manual_seed(3)
    for key, p in state.params.items():
        if key.startswith(("label.", "gamma.")):
            p.add_(0.3 * torch.rand(p.shape, generator=g, dtype=p.dtype))
    return state


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("embedding", EMBEDDINGS)
def test_one_step_subtracts_the_gradient_of_the_whole_loss(name, embedding):
    rule, net = replace(RULE, embedding=embedding, eta=0.3), network(name)
    state, b = state_of(rule, net), nonuniform(batch(rule, 5))
    params = leaves(state.params)
    each = losses(net, params, b, 0.3)
    truth = gradients(each.dot(b.weight) / b.weight.sum(), params)
    z, t = torch.zeros(5, rule.size(net), dtype=torch.float64), torch.tensor(0.0, dtype=torch.float64)
    at_once = guessed(net, {**state.params, "embedding": torch.eye(10).double()}, b.x, z, t).argmax(1)
    stats = step(rule, net, copied(state), b)
    torch.testing.assert_close(stats.loss, each.dot(b.weight).detach(), rtol=0, atol=1e-9)
    assert stats.correct == (at_once == b.y).double().dot(b.weight)
    assert_close(descent(rule, net, state, b), truth, atol=1e-9)
    assert all(g.abs().max() > 1e-7 for g in truth.values())


@pytest.mark.parametrize("embedding", EMBEDDINGS)
def test_inference_takes_equal_steps_of_time_from_the_mean(embedding):
    rule, net = replace(RULE, embedding=embedding), network("lenet")
    state, b = state_of(rule, net), batch(rule)
    times = [torch.tensor(k / 3, dtype=torch.float64) for k in range(4)]
    levels = [1 / (1 + gamma(state.params, t).exp()) for t in times]
    z = torch.zeros(6, rule.size(net), dtype=torch.float64)
    for k in range(3):
        z = onward(z, guessed(net, state.params, b.x, z, times[k]), levels[k], levels[k + 1])
    scores = z @ state.params["label.weight"].T + state.params["label.bias"]
    torch.testing.assert_close(rule.logits(net, state, b.x), scores, rtol=0, atol=1e-12)


def test_the_schedule_falls_from_end_to_end_with_the_slope_it_states():
    for seed in range(3):
        params = {key: p.double() for key, p in schedule(seed).items()}
        params["gamma.ends"] = torch.tensor([3.5, 2.0]).double().expm1().log()
        times = torch.linspace(0, 1, 101, dtype=torch.float64, requires_grad=True)
        value, slope = falling(params, times)
        torch.testing.assert_close(value.detach()[[0, -1]], torch.tensor([3.5, -2.0]).double(), rtol=0, atol=1e-12)
        assert slope.max() < 0
        (truth,) = torch.autograd.grad(value.sum(), times)
        torch.testing.assert_close(slope.detach(), truth, rtol=0, atol=1e-12)
        line = torch.linspace(3.5, -2, 101, dtype=torch.float64)
        assert (value - line).abs().max() < 1  # nearly a line at first


def test_a_schedule_falls_wherever_its_parameters_go():
    times = torch.linspace(0, 1, 101)
    for ends, shift in (([1.0, -2.0], 0.0), ([-9.0, -9.0], 0.0), ([3.0, 3.0], 60.0)):  # the last ones saturate
        params = schedule(0)
        params["gamma.ends"], params["gamma.shifts"] = torch.tensor(ends), params["gamma.shifts"] + shift
        value, slope = falling(params, times)
        assert value.isfinite().all() and slope.max() <= 0


@pytest.mark.slow
def test_training_makes_the_loss_fall_and_inference_right_and_moves_the_schedule():
    state, fall, (first, last), inferred = train(NoPropCT(lr=0.01), 150)
    assert fall < 0.7 and first < 0.4 and min(last, inferred) > 0.85
    assert all((state.params[key] - p).abs().max() > 0.01 for key, p in schedule(1).items())
