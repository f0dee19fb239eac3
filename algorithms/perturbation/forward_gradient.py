"""Forward gradient: forward-mode differentiation gives exact slopes along random directions, and only these travel.

A. G. Baydin, B. A. Pearlmutter, D. Syme, F. Wood, P. Torr, "Gradients without Backpropagation", arXiv 2202.08587, 2022;
K. Flügel, D. Coquelin, M. Weiel, C. Debus, A. Streit, M. Götz, "Beyond Backpropagation: Optimization with Multi-Tangent
Forward Gradients", IJCNN 2025, arXiv 2410.17764. With directions z_1 … z_K, the rows of Z (K × d), one dual pass each
gives

    s_k = ⟨∇L(w), z_k⟩            block l:  (a, ȧ) ← (f(x; w_l), ∂f/∂x ẋ + ∂f/∂w_l z_k,l),   s_k = ⟨∂L/∂a_L, ȧ_L⟩

    mean:        ĝ = (1/K) Σ_k s_k z_k
    projection:  ĝ = (d/r) Zᵀ (Z Zᵀ)⁺ s = (d/r) P ∇L      (P projects on the span of the z_k, r = rank Z, K in practice)

Both are unbiased. Of the mean, since E[z zᵀ] = 1. Of the projection, since permuting coordinates and flipping their
signs changes neither the law of sign directions nor r: E[P | r] commutes with all of these, so it is a multiple of the
identity, and its trace is r. E‖ĝ‖² is (d + K − 1)/K ‖∇L‖² of the mean and d/K ‖∇L‖² of the projection.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache, partial
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from ..directions import Directions, Layout, layout_of
from ..network import Network
from ..rule import Batch, RuleError, State, Stats, Tensors
from ..scalar_rule import ScalarRule
from ..softmax import softmax_error_and_stats
from .losses import batched


@dataclass(frozen=True)
class ForwardGradient(ScalarRule):
    """Exact directional derivatives along shared sign directions, by forward-mode differentiation.

    Stores during a step: no graph, but tangents beside the parameters of the block that runs, and beside its input and
    output: in numbers, of B samples,

        dense block of n_{l−1} → n_l:    (n_{l−1} + 1) n_l + 2 B (n_{l−1} + n_l),   the batch without a tangent
        convolution, m values a map:     its parameters + 2 B n_{l−1} + 4 B m

    the most of any block, and K + 3 for answers and stats; or, if that is more, the tangents and 5 · `chunk` bytes, as
    signs are drawn. Depth is free, and little else: where one wide block holds most parameters, as in an mlp, its
    tangents are most of backpropagation's gradients, and PyTorch's tangent of a convolution takes four maps where
    inference takes one. With batches of 32 the peak is 0.95 of backpropagation's on mlp, 1.01 on lenet and 1.10 on cnn.

    Costs K passes of two forward passes in the first block (PyTorch's tangent of a convolution takes three) and three
    in the others.

    Departs from the papers: directions are signs, not Gaussian (lower variance, and the same bits on every machine);
    the projection is scaled by d/r, so that the learning rate of the mean serves it too, and with K ≥ d it is the
    gradient itself.

    Attributes:
        lr: η; stable while η √(d/K) stays near or below 1 for d parameters.
        directions, own, pool, chunk, abreast: see `ScalarRule`.
        combine: "mean" or "projection".
    """

    name: ClassVar[str] = "forward-gradient"
    family: ClassVar[str] = "perturbation"
    paper: ClassVar[str] = "Baydin et al., arXiv 2202.08587, 2022"
    unsplittable: ClassVar[str] = ""

    lr: float = 0.1
    combine: Literal["mean", "projection"] = "mean"

    def __post_init__(self) -> None:
        if self.combine not in ("mean", "projection"):
            raise RuleError(f"unknown combine '{self.combine}': use mean or projection")
        super().__post_init__()

    def probe(self, net: Network, state: State, batch: Batch, lr: float) -> tuple[Tensor, Stats]:
        """Return K numbers whose mean of products with the directions is ĝ: the slopes s, or K (d/r) (Z Zᵀ)⁺ s."""
        scalars = batch.weight.new_zeros(self.directions)
        for group in batch.draws.together(self.directions, self.abreast):
            scores, slopes = self._dual_pass(net, state.params, batch, group)
            error, stats = softmax_error_and_stats(scores, batch)
            scalars[group.start : group.stop] = (error * slopes).sum((-2, -1))
            del scores, slopes, error
        if self.combine == "projection":
            change = projection(batch.draws, layout_of(state.params), self.directions, self.chunk)
            scalars = torch.from_numpy(change).to(scalars) @ scalars
        return scalars, stats

    def _dual_pass(self, net: Network, params: Tensors, batch: Batch, group: range) -> tuple[Tensor, Tensor]:
        """Return class scores (B, C) and their derivatives along some directions, (P, B, C), or of one (B, C)."""
        x, dx = batch.x, None
        for i in range(len(net.blocks)):
            each = [batch.draws.tensors(params, k, net.keys(i), self.chunk) for k in group]
            if len(group) == 1:
                x, dx = net.block_jvp(i, params, each.pop(), x, dx)
                continue
            tangents = {key: torch.stack([one.pop(key) for one in each]) for key in net.keys(i)}
            push = partial(net.block_jvp, i, params)
            x, dx = batched(push, (0, None, None if dx is None else 0))(tangents, x, dx)
            x = x[0]  # which is the same for all, and there once
            del tangents
        return x, dx


@lru_cache(maxsize=16)
def projection(directions: Directions, layout: Layout, count: int, chunk: int) -> np.ndarray:
    """Return K (d/r) (Z Zᵀ)⁺, (K, K) float64, for K = `count` directions over d values.

    Clients who share directions, and the parts of a batch, ask for the same one after the other.
    """
    values, vectors = np.linalg.eigh(directions.products(layout, count, chunk))
    kept = values > 1e-10 * values[-1]  # of integers: what is not 0 is far above rounding
    vectors = vectors[:, kept]
    scale = count * sum(size for _, size in layout) / kept.sum()
    return scale * (vectors / values[kept]) @ vectors.T
