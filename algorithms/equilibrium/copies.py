"""The operands of a dense layer's dot products: weights u_bj and inputs v_bj for every sample b and unit j.

A dot's own constraint moves its pair alone, by Δ (t is its multiplier, see `constraints.dot_multiplier`):

    Δ(u + v) = t/(1 − t) · (u + v)      Δ(u − v) = −t/(1 + t) · (u − v)

The agreement of all has the copies of a weight equal over samples, and those of an input over units. A layer moves
x ← α x + β Δ + γ (w, a), with (w, a) agreed, and says where x + θ Δ would: at its means. Three ways to store a layer
follow, each exact: nothing in a copy is stored that others tell.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Known:
    """A layer whose inputs are data, which do not move: u_bj = w_j + τ_bj x_b wherever x goes. Stores w and τ.

    Δu = t x, with t = (z − u·x)/(1 + ‖x‖²), makes z − t the product.
    """

    def __init__(self, w: Tensor, x: Tensor) -> None:
        self.w, self.x, self.square = w.clone(), x, x.square().sum(-1, keepdim=True)
        self.tau: Tensor | float = 0.0

    def multiplier(self, z: Tensor) -> Tensor:
        """Return t (B, n) of products that are to be near z."""
        return (z - self.x @ self.w.T).sub_(self.tau * self.square).div_(1 + self.square)

    def means(self, theta: float, t: Tensor, share: Tensor) -> tuple[Tensor, None]:
        """Return the weights (n, m) on which copies agree; inputs have none."""
        along = (self.tau + theta * t) * share[:, None]
        return torch.addmm(self.w, along.T, self.x), None

    def move(self, alpha: float, beta: float, t: Tensor, gamma: float, w: Tensor, a: None) -> None:
        """Move as the module says."""
        self.w.mul_(alpha).add_(w, alpha=gamma)
        self.tau = alpha * self.tau + beta * t


class Agreed:
    """A layer whose copies are equal, as projections onto their agreement leave them. Stores w and a."""

    def __init__(self, w: Tensor, a: Tensor) -> None:
        self.w, self.a = w, a

    def squares(self) -> tuple[Tensor, Tensor]:
        """Return ‖u + v‖²/4 and ‖u − v‖²/4, (B, n)."""
        dots = self.a @ self.w.T
        each = self.a.square().sum(-1, keepdim=True) + self.w.square().sum(-1)
        return (each + 2 * dots).div_(4), (each - 2 * dots).div_(4)

    def means(self, theta: float, t: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weights (n, m) and the inputs (B, m) on which copies of x + θ Δ agree."""
        other = theta * t / (1 - t * t)  # of x + θ Δ, what is of the other operand and of its own
        own = 1 + t * other
        w = torch.addmm((share @ own)[:, None] * self.w, (share[:, None] * other).T, self.a)
        return w, torch.addmm(own.mean(-1, keepdim=True) * self.a, other, self.w, alpha=1 / len(self.w))

    def move(self, alpha: float, beta: float, t: Tensor, gamma: float, w: Tensor, a: Tensor) -> None:
        """Move to (w, a), and nowhere else: α = β = 0."""
        self.w, self.a = w, a


class Own:
    """A layer whose pairs differ. Stores the sum and the difference of each, (B, n, m) both."""

    def __init__(self, w: Tensor, a: Tensor) -> None:
        self.plus, self.minus = w + a[:, None], w - a[:, None]

    def squares(self) -> tuple[Tensor, Tensor]:
        """Return ‖u + v‖²/4 and ‖u − v‖²/4, (B, n)."""
        return tuple(torch.einsum("bjk,bjk->bj", p, p).div_(4) for p in (self.plus, self.minus))

    def means(self, theta: float, t: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weights (n, m) and the inputs (B, m) on which copies of x + θ Δ agree."""
        plus, minus = (theta * t / (1 - t)).add_(1).div_(2), (theta * t / (-1 - t)).add_(1).div_(2)
        a = torch.einsum("bj,bjk->bk", plus, self.plus).sub_(torch.einsum("bj,bjk->bk", minus, self.minus))
        plus, minus = plus * share[:, None], minus * share[:, None]
        w = torch.einsum("bj,bjk->jk", plus, self.plus).add_(torch.einsum("bj,bjk->jk", minus, self.minus))
        return w, a.div_(t.shape[-1])

    def move(self, alpha: float, beta: float, t: Tensor, gamma: float, w: Tensor, a: Tensor) -> None:
        """Move as the module says."""
        plus, minus = (beta * t / (1 - t)).add_(alpha), (beta * t / (-1 - t)).add_(alpha)
        a = a[:, None]
        self.plus.mul_(plus.unsqueeze(-1)).add_(w, alpha=gamma).add_(a, alpha=gamma)
        self.minus.mul_(minus.unsqueeze(-1)).add_(w, alpha=gamma).sub_(a, alpha=gamma)
