"""A model as a sum of seeded directions, in as many numbers as there are directions.

    w = c · w₀ + Σ_j A_j z_j          m = p · w₀ + Σ_j M_j z_j

Steps along candidates z_j of one pool add up (Qin et al., FedKSeed, arXiv 2312.06353, ICML 2024), and whatever is
linear in the model is a recursion on the coefficients alone: heavy-ball momentum, L2, any learning rate. With G_j the
coefficients of a step's estimate,

    M ← μ M + G + λ A,  p ← μ p + λ c          A ← A − η M,  c ← c − η p

The model is always made of w₀ and the coefficients, one candidate after the other, never stepped: then everybody who
has the coefficients has its very bits, by whatever way they came.
"""

from __future__ import annotations

from collections.abc import Sequence
from struct import Struct
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from .directions import Directions

if TYPE_CHECKING:
    from .rule import State, Tensors
    from .scalar_rule import ScalarRule

_HEAD = Struct("<Idd")  # base, c, p


class Ledger:
    """The coefficients of a pool. Kept in float32, which is how they travel, and changed by one rounding an operation.

    Args:
        rule: with `pool`, `rebase`, `momentum` and `weight_decay`.
        seed: the run seed.
        origin: w₀; a copy is kept.

    Attributes:
        base: which pool it is.
        c: what is left of w₀.
        p: what of it is in the momentum.
        weights: A, (P,) float32.
        velocity: M, (P,) float32; None without momentum.
    """

    def __init__(self, rule: ScalarRule, seed: int, origin: Tensors) -> None:
        self.rule, self.seed, self.base = rule, seed, 0
        self._begin(origin)

    def _begin(self, origin: Tensors) -> None:
        self.origin = {key: p.clone() for key, p in origin.items()}
        self.c, self.p = 1.0, 0.0
        self.weights = np.zeros(self.rule.pool, np.float32)
        self.velocity = np.zeros(self.rule.pool, np.float32) if self.rule.momentum else None

    def rebase(self, origin: Tensors) -> None:
        """Begin anew from a model, with the next pool; momentum, which is of the old directions, is forgotten."""
        self.base += 1
        self._begin(origin)

    def descend(self, state: State, draws: Sequence[Directions], coefficients: Tensor, lr: float) -> None:
        """Take the step that `ScalarRule.descend` takes, with momentum and decay; `state` is not looked at."""
        gradient = np.zeros_like(self.weights)
        for own, row in zip(draws, coefficients.numpy(), strict=True):
            gradient[list(own.candidates)] += row
        step, decay, momentum = np.float32(lr), self.rule.weight_decay, self.rule.momentum
        p = decay * self.c
        if decay:
            gradient += np.float32(decay) * self.weights
        if self.velocity is not None:
            self.velocity *= np.float32(momentum)
            gradient = self.velocity = self.velocity + gradient
            p = self.p = momentum * self.p + p
        self.weights = self.weights - step * gradient
        self.c = self.c - lr * p

    def write(self, params: Tensors, weights: np.ndarray | None = None, c: float | None = None) -> None:
        """Make the model, in place on `params`; of other coefficients if they are given."""
        weights, c = (self.weights, self.c) if weights is None else (weights, c)
        for key, p in params.items():
            p.copy_(self.origin[key])
            if c != 1:
                p.mul_(c)
        candidates = Directions.of_pool(self.seed, self.rule.pool, self.base)
        for j in np.flatnonzero(weights).tolist():
            candidates.add(params, j, float(weights[j]), self.rule.chunk)

    def to_bytes(self) -> bytes:
        """Return all that it takes to go on from here, for whoever has w₀: 4 bytes a candidate, 8 with momentum."""
        vectors = [self.weights] if self.velocity is None else [self.weights, self.velocity]
        return _HEAD.pack(self.base, self.c, self.p) + b"".join(v.astype("<f4").tobytes() for v in vectors)

    @property
    def size(self) -> int:
        """The bytes of `to_bytes`."""
        return _HEAD.size + 4 * len(self.weights) * (1 if self.velocity is None else 2)

    def from_bytes(self, data: bytes, origin: Tensors | None = None) -> None:
        """Become what `to_bytes` was called on.

        Args:
            data: the bytes.
            origin: its w₀, if that is another.

        Raises:
            ValueError: if the bytes are not those of such a ledger, or of another base than this one's w₀.
        """
        if len(data) != self.size:
            raise ValueError(f"a ledger of {self.size} B cannot be made of {len(data)} B")
        base, c, p = _HEAD.unpack_from(data)
        if origin is not None:
            self._begin(origin)
        elif base != self.base:
            raise ValueError(f"coefficients of pool {base} say nothing to a replica that has pool {self.base}")
        vectors = np.frombuffer(data, "<f4", offset=_HEAD.size).astype(np.float32)
        self.base, self.c, self.p, self.weights = base, c, p, vectors[: self.rule.pool]
        if self.velocity is not None:
            self.velocity = vectors[self.rule.pool :]
