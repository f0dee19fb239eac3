"""Cosines between two sets of rows: the gradient against loops, masked rows, rows without a direction."""

import pytest
import torch
from cases import assert_close, leaves
from fedforward.algorithms.layerwise.cosines import Rows


def rows(n, width=7, seed=0):
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def loss(a, b, share, match, scale):
    """Return the loss row by row and pair by pair."""
    a, b = (rows / rows.norm(dim=1, keepdim=True) for rows in (a, b))
    total = 0.0
    for i in range(len(a)):
        for c in range(len(b)):
            total += scale * share[i] / len(b) * (a[i] @ b[c] - match[i, c]) ** 2
        for j in range(len(a)):
            total += 0.5 * share[i] * share[j] * (a[i] @ a[j] - float(i == j)) ** 2
    for c in range(len(b)):
        for d in range(len(b)):
            total += 0.5 / len(b) ** 2 * (b[c] @ b[d] - float(c == d)) ** 2
    return total


def gradients(a, b, share, match, scale):
    """Return those of this package, of both sets."""
    up, down = Rows.of(a, share), Rows.of(b, torch.full((len(b),), 1 / len(b), dtype=torch.float64))
    cosines = up.cosines(down)
    error = 2 * scale * up.weight[:, None] * down.weight * (cosines - match)
    return {"a": up.gradient(down, cosines, error), "b": down.gradient(up, cosines.T, error.T)}


@pytest.mark.parametrize("scale", [0.0, 1.0, 50.0])
def test_gradients_are_those_of_the_loss_in_either_set_and_at_right_angles_to_its_rows(scale):
    a, b, match = 3 * rows(5), 0.2 * rows(3, seed=1), torch.eye(3, dtype=torch.float64)[[0, 2, 2, 1, 0]]
    share = torch.tensor([0.1, 0.4, 0.0, 0.2, 0.3], dtype=torch.float64)
    got, leaf = gradients(a, b, share, match, scale), leaves({"a": a, "b": b})
    wanted = torch.autograd.grad(loss(leaf["a"], leaf["b"], share, match, scale), [leaf["a"], leaf["b"]])
    assert_close(got, dict(zip("ab", wanted, strict=True)), atol=1e-9)
    assert all(g.abs().max() > 1e-3 for g in wanted) and not got["a"][2].any()
    assert (got["a"] * a).sum(1).abs().max() < 1e-12 and (got["b"] * b).sum(1).abs().max() < 1e-12


def test_a_row_twice_is_a_row_of_twice_the_weight():
    """The pair that it makes with itself has no gradient, for no turn together changes it."""
    a, b = rows(3), rows(4, seed=1)
    whole = Rows.of(a, torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64))
    twice = Rows.of(a[[0, 0, 1, 2]], torch.full((4,), 0.25, dtype=torch.float64))
    down = Rows.of(b, torch.full((4,), 0.25, dtype=torch.float64))
    error, double = (up.weight[:, None] * (up.cosines(down)) for up in (whole, twice))
    one, two = whole.gradient(down, whole.cosines(down), error), twice.gradient(down, twice.cosines(down), double)
    torch.testing.assert_close(two[0] + two[1], one[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(two[2:], one[1:], rtol=0, atol=1e-12)


def test_a_row_of_zeros_is_like_none_and_its_gradient_is_finite():
    a, b, match = rows(3).index_fill(0, torch.tensor([1]), 0.0), rows(2, seed=1), torch.eye(2, dtype=torch.float64)
    got = gradients(a, b, torch.full((3,), 1 / 3, dtype=torch.float64), match[[0, 1, 1]], 1.0)
    assert not Rows.of(a, torch.ones(3)).cosines(Rows.of(b, torch.ones(2)))[1].any()
    assert all(g.isfinite().all() for g in got.values())
    share = torch.tensor([0.5, 0.0, 0.5], dtype=torch.float64)
    masked, without = gradients(a, b, share, match[[0, 1, 1]], 1.0), gradients(a[::2], b, share[::2], match, 1.0)
    assert_close({"a": masked["a"][::2], "b": masked["b"]}, without, atol=1e-12)
    assert not masked["a"][1].any()
