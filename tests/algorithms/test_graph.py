"""Gradients by plain autograd and under torch.func are the same numbers."""

import pytest
import torch
from fedforward.algorithms.graph import gradients, pullback, transformed


def quadratic(params, x):
    return (x @ params["w"]).tanh() + params["b"]


@pytest.fixture
def made():
    g = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    return {"w": draw(4, 3), "b": draw(3), "unused": draw(2)}, draw(5, 4), draw(5, 3)


def test_a_transform_is_seen():
    seen = []
    torch.func.vmap(lambda x: seen.append(transformed()) or x)(torch.zeros(2))
    assert seen == [True] and not transformed()


def test_both_ways_give_the_gradients_of_an_objective(made):
    params, x, pulled = made

    def both(params, x):
        return gradients(lambda p: ((quadratic(p, x) * pulled).sum(), x.sum()), params)

    with torch.no_grad():
        plain, beside = both(params, x)
        batched = torch.func.vmap(both, (None, 0))(params, x[None])
    assert plain.keys() == params.keys() and not any(g.requires_grad for g in plain.values())
    assert not plain["unused"].any() and torch.equal(beside, x.sum())
    for key, grad in plain.items():
        torch.testing.assert_close(batched[0][key][0], grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize("wrt_input", [False, True])
def test_both_ways_pull_a_gradient_back(made, wrt_input):
    params, x, pulled = made

    def both(params, x, pulled):
        a, pull = pullback(quadratic, params, x, wrt_input)
        return a, pull(pulled)

    with torch.no_grad():
        a, got = both(params, x, pulled)
        batched_a, batched = torch.func.vmap(both, (None, 0, 0))(params, x[None], pulled[None])
    assert not a.requires_grad and torch.equal(a, quadratic(params, x))
    torch.testing.assert_close(batched_a[0], a)
    if wrt_input:
        (got, dx), (batched, batched_dx) = got, batched
        torch.testing.assert_close(batched_dx[0], dx, rtol=0, atol=1e-12)
        torch.testing.assert_close(dx, (pulled * (1 - (x @ params["w"]).tanh() ** 2)) @ params["w"].T)
    for key, grad in got.items():
        torch.testing.assert_close(batched[key][0], grad, rtol=0, atol=1e-12)
