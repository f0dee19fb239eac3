"""Likelihood ratio: noise on one block's output at a time, and the losses that it leads to.

J. Jiang, Z. Zhang, C. Xu, Z. Yu, Y. Peng, "One Forward is Enough for Neural Network Training via Likelihood Ratio
Method", ICLR 2024, arXiv 2305.08960. Block l maps x to a = f(x; w_l), and the blocks above it make of a a sample's loss
L(a). With ξ ~ N(0, 1) of the width of a, in antithetic pairs ±ξ_r, r = 1 … R, each sample with its own,

    g_r = (L(a + σ ξ_r) − L(a − σ ξ_r)) / 2σ · ξ_r        ĝ_a = (1/R) Σ_r g_r        ĝ_w = Jᵀ ĝ_a,   J = ∂f/∂w_l

It is the score of the noise times the loss: unbiased for ∂/∂w_l E L(a + σ ξ), the gradient of a smoothed loss
that differs from L's by O(σ²) where the blocks above are smooth. J is block l's alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..network import Network
from ..noise import normals, seeds
from ..rule import Batch, GradientRule, RuleError, State, Stats, Tensors
from ..seeds import Place
from ..softmax import cross_entropy_stats


@dataclass(frozen=True)
class LikelihoodRatio(GradientRule):
    """Scores of noise injected into one block's output after the other; any loss will do, differentiable or not.

    Stores during a step: no graph where a block is linear with an activation; elsewhere one inside the block alone,
    which runs once more for it. In numbers, of B samples, of dense blocks

        B (n_{l−1} + 3 n_l + max_{j ≥ l} (n_j + n_{j+1})),   the first input being the batch,   and 2 B

    the most of any block: its input, output, estimate and noise, and what inference needs above it. Orthogonal draws
    add min(R, n_l) − 1 of B n_l.

    Costs, for each block, 2R passes of the blocks above it: with R = 8, six forward passes in all on an mlp whose first
    layer is most of it, and far more where blocks are alike.

    Sends weights, not scalars: Jᵀ ĝ_a holds the samples' own activities, which a server does not have and must not.

    Departs from the paper: noise comes after a block's activation and pooling instead of before, where the network is
    narrower and J is still the block's own; σ is not learned; in place of quasi-Monte-Carlo points, of which a few in
    hundreds of dimensions is no better than independent ones, draws can be orthogonal (Rowland et al., "Geometrically
    Coupled Monte Carlo Sampling", NeurIPS 2018): each is as normal as before, and for R ≤ n the error of a sample's ĝ_a
    falls from (n + 1)/R ‖∇L‖² to (n + 2 − R)/R ‖∇L‖², where L is near linear over σ.

    Attributes:
        lr: η; with few pairs the estimate is mostly noise, and what backpropagation takes diverges.
        directions: R, antithetic pairs of each sample.
        sigma: σ, the size of the noise in a unit.
        draws: "independent", or "orthogonal" in groups of as many as there are units, which keeps a group's earlier
            draws in memory.
    """

    name: ClassVar[str] = "likelihood-ratio"
    family: ClassVar[str] = "perturbation"
    paper: ClassVar[str] = "Jiang et al., ICLR 2024, arXiv 2305.08960"
    autograd: ClassVar[str] = "inside a block"
    unsplittable: ClassVar[str] = ""

    lr: float = 0.01
    momentum: float = 0.9
    directions: int = 8
    sigma: float = 0.1
    draws: Literal["independent", "orthogonal"] = "independent"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.directions < 1 or self.sigma <= 0:
            raise RuleError("likelihood-ratio needs directions ≥ 1 and sigma > 0")
        if self.draws not in ("independent", "orthogonal"):
            raise RuleError(f"unknown draws '{self.draws}': use independent or orthogonal")

    def draw(self, place: Place, batch_size: int, classes: int) -> Tensor:
        """Return a seed for the noise of each sample, (B,) int64."""
        return seeds(place, batch_size)

    def init(self, net: Network, seed: int) -> State:
        """Return the network's own initial weights."""
        params = net.init(seed)
        return State(params, {}, self.slots(params))

    def step(self, net: Network, state: State, batch: Batch, lr: float) -> Stats:
        """Perturb and update one block after the other: its input is as it was before, and so is what is above it."""
        x = batch.x
        for i in range(len(net.blocks)):
            a = net.block(i, state.params, x)
            estimate = self._estimate(net, state.params, batch, i, a)
            del a
            a, pull = net.block_vjp(i, state.params, x)
            grads = pull(estimate)
            del pull, estimate
            self.update(state, grads, lr)
            del grads
            x = a
        return cross_entropy_stats(x, batch)

    def _estimate(self, net: Network, params: Tensors, batch: Batch, i: int, a: Tensor) -> Tensor:
        """Return the estimated gradient of the weighted mean loss in block i's output a (B, ...)."""
        estimate = torch.zeros_like(a)
        scale = batch.share() / (2 * self.sigma * self.directions)
        for noise in self._noise(batch.draws, i, a[0].numel(), a.dtype):
            noise = noise.view(a.shape)
            slope = self._losses(net, params, batch, i, a.add(noise, alpha=self.sigma))
            slope -= self._losses(net, params, batch, i, a.sub(noise, alpha=self.sigma))
            estimate += noise.mul_(slope.mul_(scale).view(-1, *[1] * (a.dim() - 1)))
            del noise, slope
        return estimate

    def _losses(self, net: Network, params: Tensors, batch: Batch, i: int, a: Tensor) -> Tensor:
        """Return each sample's loss (B,), given block i's output."""
        for j in range(i + 1, len(net.blocks)):
            a = net.block(j, params, a)
        return torch.nn.functional.cross_entropy(a, batch.y, reduction="none")

    def _noise(self, seeds: Tensor, i: int, width: int, dtype: torch.dtype) -> Iterator[Tensor]:
        """Yield R draws (B, n) of N(0, 1), of which n in a row are orthogonal if they are to be."""
        group: list[Tensor] = []
        for r in range(self.directions):
            stream = i * self.directions + r
            if self.draws == "independent":
                yield normals(seeds, stream, width, dtype)
            else:
                if r % width == 0:
                    group.clear()
                yield _turned(normals(seeds, stream, width, dtype), group, keep=r + 1 < self.directions)


def _turned(noise: Tensor, group: list[Tensor], *, keep: bool) -> Tensor:
    """Return noise (B, n) turned at right angles to a group of unit vectors; `keep` adds its own to the group.

    Normal noise has any sense as likely as another, and a length that is independent of it: so it stays normal.
    """
    length = noise.norm(dim=1, keepdim=True)
    for other in group * 2:  # once more for rounding
        noise -= (noise * other).sum(1, keepdim=True) * other
    noise /= noise.norm(dim=1, keepdim=True)
    if keep:
        group.append(noise)
    return noise * length
