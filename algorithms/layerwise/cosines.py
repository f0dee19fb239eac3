"""The loss of two sets of rows that are to point the same way where they match, and each its own way within a set.

Rows a_i (N, n) weigh s_i, rows b_c (M, n) weigh t_c; both sets of weights sum to 1. With â = a/‖a‖ and b̂ = b/‖b‖,

    L = λ Σ_ic s_i t_c (⟨â_i, b̂_c⟩ − m_ic)² + ½ Σ_ij s_i s_j (⟨â_i, â_j⟩ − 1_ij)² + ½ Σ_cd t_c t_d (⟨b̂_c, b̂_d⟩ − 1_cd)²

A row is at no angle to itself whatever it does, so of the last two sums the diagonal has no gradient, nor has its 1.
The gradient in a row is at right angles to it: what lies along the row is taken off in the sums, before the products.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..batched import add_product

SHORTEST = 1e-8  # a row shorter than this counts as this long


class Rows(NamedTuple):
    """One of the two sets."""

    rows: Tensor  # (N, n)
    weight: Tensor  # (N,), summing to 1
    length: Tensor  # (N, 1)

    @classmethod
    def of(cls, rows: Tensor, weight: Tensor) -> Rows:
        """Return the set of these rows and weights."""
        return cls(rows, weight, torch.linalg.vector_norm(rows, dim=1, keepdim=True).clamp_min(SHORTEST))

    def cosines(self, other: Rows) -> Tensor:
        """Return the cosines (N, M) with the rows of another set."""
        return (self.rows @ other.rows.T).div_(self.length).div_(other.length.T)

    def gradient(self, other: Rows, cosines: Tensor, error: Tensor) -> Tensor:
        """Return the gradient of L in the rows (N, n), where `error` (N, M) is that in `cosines` with the other set."""
        pairs = self.cosines(self)
        turning = (self.weight[:, None] * self.weight * 2).mul_(pairs)  # half of it from L's ij, half from its ji
        along = (error * cosines).sum(1) + (turning * pairs).sum(1)
        del pairs
        turning = turning.sub_(along.diag_embed()).div_(self.length).div_(self.length.T)
        gradient = (error / self.length).div_(other.length.T) @ other.rows
        add_product(gradient, turning.T, self.rows, 1.0)
        return gradient
