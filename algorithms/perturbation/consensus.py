"""Consensus hopping: a cloud of particles around the parameters, which then move to where the particles agree.

K. Riedl, T. Klock, C. Geldhauser, M. Fornasier, "Gradient is All You Need?", arXiv 2306.09778, 2023: their consensus
hopping scheme, of consensus-based optimisation (R. Pinnau, C. Totzeck, O. Tse, S. Martin, M3AS 27, 2017). Client i
has K particles, and a loss is all that is known of each:

    x_ik = w + σ z_ik        F_ik = L_i(x_ik)        π_ik ∝ n_i exp(−α (F_ik − F̄_i))    Σ_ik π_ik = 1
    w ← w + η σ Σ_ik π_ik z_ik                       with η = 1, a hop to the consensus point Σ_ik π_ik x_ik
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..network import Network
from ..rule import Batch, RuleError, State, Stats
from ..scalar_rule import ScalarRule
from .losses import losses_along


@dataclass(frozen=True)
class Consensus(ScalarRule):
    """Consensus-based optimisation whose particles are drawn anew around the consensus in every step.

    Stores during a step: what inference stores and 4 (K + 3) bytes, or what a slice of signs needs if that is more
    (about 9 · `chunk` bytes). Costs K forward passes. Sends K numbers.

    Where the loss is near linear over the cloud, the consensus of M → ∞ particles is at w − σ tanh(α σ g), coordinate
    by coordinate: a gradient step of length α σ² where α σ g is small, a sign step of length σ where it is large. Of M
    particles with s = α σ ‖g‖ < 1 or so it is the gradient step, shortened by the factor 1 − 1/M, and a random one: the
    mean of the particles is not w. The cosine with −g is s / √(s² + d e^(s²) / M) or so for d ≫ M; its best, at s = 1,
    takes e times the directions of a difference quotient. As training flattens the loss, α may rise.

    Departs from the paper: particles are signs, not Gaussian. Losses are compared with the mean F̄_i of their own
    client: clients see different data, and one with easy samples would outweigh all others, for a reason that lies in
    no particle. Clients weigh as many particles as they have samples.

    Attributes:
        lr: η, the part of the way to the consensus point; at most 1.
        alpha: α, how much a lower loss weighs.
        sigma: σ, the size of the cloud.
        directions, own, pool, chunk, abreast: see `ScalarRule`; K particles, at least 2.
    """

    name: ClassVar[str] = "consensus"
    family: ClassVar[str] = "perturbation"
    paper: ClassVar[str] = "Riedl et al., arXiv 2306.09778, 2023"
    unsplittable: ClassVar[str] = ""

    lr: float = 1.0
    own: bool = True
    alpha: float = 50.0
    sigma: float = 0.05

    def __post_init__(self) -> None:
        if self.alpha <= 0 or self.sigma <= 0:
            raise RuleError(f"{self.name} needs alpha > 0 and sigma > 0")
        if self.directions < 2:
            raise RuleError(f"{self.name} needs directions ≥ 2: a particle alone agrees with itself")
        if not 0 < self.lr <= 1:
            raise RuleError(f"{self.name} goes the part lr of the way to its consensus: use --lr above 0, at most 1")
        super().__post_init__()

    def probe(self, net: Network, state: State, batch: Batch, lr: float) -> tuple[Tensor, Stats]:
        """Return the losses of the K particles; stats are of the last."""
        losses = batch.weight.new_zeros(self.directions)
        for some, found, seen in losses_along(self, net, state.params, batch, (self.sigma,)):
            losses[some], stats = found.pop(), seen
        return losses, stats

    def coefficients(self, scalars: Tensor, weights: Tensor) -> Tensor:
        """Return −σ π (N, K), from losses (N, K) of clients that weigh (N,)."""
        above = scalars - scalars.mean(1, keepdim=True)
        scores = torch.log(weights).unsqueeze(1) - self.alpha * above
        return scores.flatten().softmax(0).view_as(scalars) * -self.sigma
