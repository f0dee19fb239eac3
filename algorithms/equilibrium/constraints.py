"""Nearest points of the constraints that a dense network is made of, exact within rounding.

A. Bergmeister, M. K. Lal, S. Jegelka, S. Sra, "A projection-based framework for gradient-free and parallel learning",
arXiv 2506.05878, 2025. Each function takes any number of constraints of its kind, and always the same operations.
"""

from __future__ import annotations

import torch
from torch import Tensor

NEWTON = 10  # steps to the multiplier of a dot
PROX = 8  # steps to the prox of a cross-entropy
STRONGEST = 8.0  # λ up to which they end there
CLEAR = 1e-6  # of the multipliers ±1, at which there is no nearest point


def dot_multiplier(plus: Tensor, minus: Tensor, z: Tensor) -> Tensor:
    """Return t in (−1, 1), with which (a, b, z) moves to the nearest point where z is the dot product of a and b.

        a' + b' = (a + b)/(1 − t)      a' − b' = (a − b)/(1 + t)      z' = z − t

    The root of f(t) = A/(1 − t)² − B/(1 + t)² + t − z, which increases. Where z < a·b it is minus that of −b and −z, so
    take t ≥ 0: f is concave up to some point, and convex from there. Newton's method from above, kept from going below
    0, gets to the root from wherever it begins. It begins at the lower of two bounds: f(t) ≥ A/(1 − t)² − B − z, and
    f(t) ≥ A − B + (1 + ¾ B) t − z.

    Args:
        plus: A = ‖a + b‖²/4, of any shape.
        minus: B = ‖a − b‖²/4.
        z: what the product is to be near to.
    """
    below = z < plus - minus
    z, plus, minus = torch.where(below, -z, z), torch.where(below, minus, plus), torch.where(below, plus, minus)
    top = (z + minus).clamp_min_(torch.finfo(z.dtype).tiny)
    t = torch.minimum(1 - (plus / top).sqrt_(), (top - plus) / (1 + 0.75 * minus)).clamp(0, 1 - CLEAR)
    del top
    half = torch.full_like(z, 0.5)
    for _ in range(NEWTON):
        low, high = 1 - t, 1 + t
        low2, high2 = low * low, high * high
        f = torch.addcdiv(torch.addcdiv(t - z, plus, low2), minus, high2, value=-1)
        slope = torch.addcdiv(torch.addcdiv(half, plus, low2 * low), minus, high2 * high)  # f'/2
        t = torch.addcdiv(t, f, slope, value=-0.5).clamp(0, 1 - CLEAR)
    return torch.where(below, -t, t)


def project_sum(s: Tensor, c: Tensor, y: Tensor, copies: Tensor, relu: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the nearest (s, c, y) where y = s + c, or where y is that or 0, whichever is larger.

    Args:
        s: one term.
        c: the other.
        y: the mean of the copies of the sum.
        copies: how many there are, for all of them have to move.
        relu: whether the sum passes a ReLU.
    """
    total = s + c
    step = (y - total) / (2 + 1 / copies)  # of each term where the ReLU is on
    on = y - step / copies
    excess = total.clamp_min(0)
    # Off, 0 is the sum's largest value. Squares of what has to move are compared.
    off = relu & ((on < 0) | (copies * y * y + excess * excess / 2 < (2 + 1 / copies) * step * step))
    step = torch.where(off, excess / -2, step)
    return s + step, c + step, torch.where(off, 0.0, on)


def prox_cross_entropy(z: Tensor, labels: Tensor, strength: float) -> Tensor:
    """Return argmin_x λ CE(softmax(x), y) + ½ ‖x − z‖², which is x = z + λ (y − softmax(x)), by Newton's method.

    Args:
        z: scores (..., C).
        labels: y, rows of zeros and a one, (..., C).
        strength: λ, up to `STRONGEST`.
    """
    goal = torch.add(z, labels, alpha=strength)
    x = goal
    for _ in range(PROX):
        p = x.softmax(-1)
        ahead = torch.sub(goal, p, alpha=strength)
        p = p / (1 + strength * p)
        mean = (p * (ahead - x)).sum(-1, keepdim=True) / p.sum(-1, keepdim=True)
        x = torch.addcmul(ahead, p, mean - (ahead - x), value=strength)
    return x


def project_margin(z: Tensor, labels: Tensor, margin: float) -> Tensor:
    """Return the nearest scores of which the label's is at least the margin, and the others at most minus that."""
    return torch.where(labels > 0, z.clamp_min(margin), z.clamp_max(-margin))
