"""Projections: feasible, nearest, idempotent, and alternating between two of them finds where they meet."""

import pytest
import torch
from fedforward.algorithms.equilibrium.constraints import (
    STRONGEST,
    dot_multiplier,
    project_margin,
    project_sum,
    prox_cross_entropy,
)
from scipy.optimize import minimize


def random(*shape, seed=0, scale=1.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def project_dot(a, b, z):
    """Return the nearest (a, b, z), with a and b (N, m), as the multiplier says."""
    t = dot_multiplier((a + b).square().sum(-1) / 4, (a - b).square().sum(-1) / 4, z)[:, None]
    return (a + t * b) / (1 - t * t), (b + t * a) / (1 - t * t), z - t[:, 0]


DOTS = [(width, size, far) for width in (2, 5, 60) for size in (0.1, 1.0, 5.0) for far in (0.1, 1.0, 4.0)]


@pytest.mark.parametrize("width, size, far", DOTS)
def test_a_projected_dot_is_the_product_and_stays(width, size, far):
    a, b = random(400, width, seed=1, scale=size), random(400, width, seed=2, scale=size)
    z = (a * b).sum(-1) + random(400, seed=3, scale=far) * (1 + a.square().sum(-1) + b.square().sum(-1)) ** 0.5
    new = project_dot(a, b, z)
    scale = 1 + new[0].norm(dim=-1) * new[1].norm(dim=-1)
    assert ((new[0] * new[1]).sum(-1) - new[2]).div(scale).abs().max() < 1e-12
    for again, once in zip(project_dot(*new), new, strict=True):
        torch.testing.assert_close(again, once, rtol=0, atol=1e-11 * float(scale.max()))
    assert max(float((x - y).abs().max()) for x, y in zip(new, (a, b, z), strict=True)) > 1e-3


def test_no_operands_nearby_or_elsewhere_that_give_their_product_are_nearer():
    a, b, z = random(12, 3, seed=1), random(12, 3, seed=2), random(12, seed=3, scale=3.0)
    new = project_dot(a, b, z)
    moved = sum((x - y).square().reshape(12, -1).sum(1) for x, y in zip(new, (a, b, z), strict=True))
    for row in range(12):
        target = torch.cat([a[row], b[row], z[row : row + 1]]).numpy()

        def distance(v, target=target):
            return ((v - target) ** 2).sum()

        for seed in range(3):
            start = target if seed == 0 else random(7, seed=seed, scale=2.0).numpy()
            found = minimize(
                distance, start, method="SLSQP", options={"ftol": 1e-14, "maxiter": 200},
                constraints={"type": "eq", "fun": lambda v: v[:3] @ v[3:6] - v[6]},
            )  # fmt: skip
            assert not found.success or found.fun > moved[row] - 1e-6
            assert seed or abs(found.fun - moved[row]) < 1e-5


def test_a_multiplier_is_found_over_many_orders_of_magnitude():
    plus, minus = (10 ** random(20_000, seed=s, scale=1.2) for s in (1, 2))
    z = plus - minus + random(20_000, seed=3, scale=3.0) * (1 + plus + minus) ** 0.5
    low, high = torch.full_like(z, -1.0), torch.full_like(z, 1.0)
    for _ in range(80):
        t = (low + high) / 2
        over = plus / (1 - t) ** 2 - minus / (1 + t) ** 2 + t - z > 0
        low, high = torch.where(over, low, t), torch.where(over, t, high)
    found = dot_multiplier(plus, minus, z)
    torch.testing.assert_close(found, low, rtol=0, atol=1e-11)
    assert found.max() > 0.95 and found.min() < -0.95


def test_operands_that_cannot_give_a_product_stay_finite():
    nothing = torch.zeros(3)
    t = dot_multiplier(nothing, nothing, torch.tensor([5.0, -5.0, 0.5]))
    assert t.abs().max() < 1 and t[2] == 0.5
    wild = dot_multiplier(torch.tensor([1e-30, 1e30]), torch.tensor([1e30, 1.0]), torch.tensor([1e20, -1e20]))
    assert wild.isfinite().all()


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("copies", [1, 3])
def test_a_projected_sum_is_the_nearest_of_a_fine_search(copies, relu):
    s, c, y = (random(120, seed=seed, scale=2.0) for seed in range(3))
    own = torch.full((120,), float(copies)).double(), torch.full((120,), relu)
    new_s, new_c, new_y = project_sum(s, c, y, *own)
    total = new_s + new_c
    torch.testing.assert_close(new_y, total.clamp_min(0) if relu else total, rtol=0, atol=1e-12)

    def distance(s2, c2, y2):
        return (s2 - s) ** 2 + (c2 - c) ** 2 + copies * (y2 - y) ** 2

    # Terms move alike, so that their sum is all there is to choose.
    sums = torch.linspace(-15, 15, 6_001, dtype=torch.float64)[:, None]
    half = (sums - s - c) / 2
    best = distance(s + half, c + half, sums.clamp_min(0) if relu else sums).amin(0)
    reached = distance(new_s, new_c, new_y)
    assert (reached <= best + 1e-12).all() and (reached > best - 1e-3).all()
    for again, once in zip(project_sum(new_s, new_c, new_y, *own), (new_s, new_c, new_y), strict=True):
        torch.testing.assert_close(again, once, rtol=0, atol=1e-12)
    assert not relu or 20 < int((new_y == 0).sum()) < 100


@pytest.mark.parametrize("strength", [0.3, 5.0, STRONGEST])
@pytest.mark.parametrize("scale", [0.1, 3.0, 100.0])
def test_the_prox_of_the_cross_entropy_has_no_gradient_left(scale, strength):
    z, labels = random(500, 10, seed=1, scale=scale), torch.eye(10, dtype=torch.float64)[torch.arange(500) % 10]
    x = prox_cross_entropy(z, labels, strength)
    left = x - z + strength * (x.softmax(-1) - labels)
    assert left.abs().max() < 1e-12 * max(1.0, scale)
    assert (x - z).abs().max() > strength / 10


def test_a_projected_margin_is_the_nearest():
    z, labels = random(50, 4, seed=1), torch.eye(4, dtype=torch.float64)[torch.arange(50) % 4]
    x, wanted = project_margin(z, labels, 0.7), z.clone()
    for row, label in enumerate(labels.argmax(1)):
        for k in range(4):
            wanted[row, k] = max(float(z[row, k]), 0.7) if k == label else min(float(z[row, k]), -0.7)
    assert torch.equal(x, wanted) and torch.equal(project_margin(x, labels, 0.7), x)


@pytest.mark.parametrize("scheme", ["alternating", "douglas-rachford"])
def test_projections_in_turn_find_where_a_product_meets_a_line(scheme):
    # Of (a, b, z): a·b = z, and z = 2 with the first of a equal to the first of b.
    def to_dot(x):
        return torch.cat([part.reshape(8, -1) for part in project_dot(x[:, :3], x[:, 3:6], x[:, 6])], 1)

    def to_line(x):
        x = x.clone()
        x[:, [0, 3]] = (x[:, 0] + x[:, 3])[:, None] / 2
        x[:, 6] = 2.0
        return x

    x = random(8, 7, seed=5)
    for _ in range(200):
        if scheme == "alternating":
            x = to_line(to_dot(x))
        else:
            once = 2 * to_dot(x) - x
            x = x / 2 + (2 * to_line(once) - once) / 2
    found = to_dot(x)
    assert (to_line(found) - found).abs().max() < 1e-9
