"""SPSA: two passes along one random direction, from anywhere to anywhere in the memory of inference.

J. C. Spall, "Multivariate Stochastic Approximation Using a Simultaneous Perturbation Gradient Approximation", IEEE
Trans. Automatic Control 37(3), 1992. In place and from a seed, as S. Malladi et al., "Fine-Tuning Language Models with
Just Forward Passes" (MeZO), arXiv 2305.17333, 2023:

    w ← w + σ z         L₊ = L(w)
    w ← w − 2σ z        L₋ = L(w)
    w ← w + σ z         s = (L₊ − L₋) / 2σ          w ← w − η s z

The estimate ĝ = (1/K) Σ_k s_k z_k is unbiased up to O(σ²).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..network import Network
from ..rule import Batch, RuleError, State, Stats
from ..scalar_rule import ScalarRule
from .losses import losses_along


@dataclass(frozen=True)
class SPSA(ScalarRule):
    """Central differences along few directions, in place.

    Stores during a step: what inference stores and 4 (K + 4) bytes, or what a slice of signs needs if that is more
    (about 9 · `chunk` bytes). With dropout, each hidden block's output once more while its mask (1 byte a value) is
    applied.

    Costs 2K forward passes and 4K passes over the parameters: they go from w + σz to w − σz at once, and are left
    within 3/2 units in the last place of |w| + σ for each direction, in no preferred sense. In float32 that stays below
    what a step changes; narrower floats would not do.

    Departs from SPSA: σ and η do not fall with the steps by themselves (`lr_schedule` does that for η). From MeZO:
    directions are signs, as Spall's are; dropout can be had, where MeZO turns it off: its masks are the same on both
    sides, so that s is the slope of the loss of one thinned network.

    Attributes:
        lr: η; what decides is η √(d/K) for d parameters. With K = 1 on the digits (batches of 64, an mlp of 2,130
            parameters), 0.2 learned and 0.5 diverged.
        sigma: σ, the length of a perturbation per parameter; 1e-4 … 1e-3 suits float32.
        directions, own, pool, chunk, abreast: see `ScalarRule`.
        dropout: p, part of the hidden blocks' outputs left out in training; inference keeps all.
    """

    name: ClassVar[str] = "spsa"
    family: ClassVar[str] = "perturbation"
    paper: ClassVar[str] = "Spall, IEEE TAC 37(3), 1992; Malladi et al., arXiv 2305.17333, 2023"

    lr: float = 0.005
    directions: int = 1
    sigma: float = 1e-3
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.sigma <= 0:
            raise RuleError(f"{self.name} needs sigma > 0")
        if not 0 <= self.dropout < 1:
            raise RuleError(f"{self.name} needs 0 ≤ dropout < 1, and 0 drops nothing")
        super().__post_init__()

    @property
    def unsplittable(self) -> str:
        """Why parts of a batch do not add up: masks are drawn for the rows of a whole one."""
        return "a sample's dropout mask follows its place in the whole (without it, dropout 0)" if self.dropout else ""

    def probe(self, net: Network, state: State, batch: Batch, lr: float) -> tuple[Tensor, Stats]:
        """Return the K central differences; stats are of the network at w − σ z_K, the last seen."""
        scalars, sides = batch.weight.new_zeros(self.directions), (self.sigma, -self.sigma)
        for some, (plus, minus), seen in losses_along(self, net, state.params, batch, sides, self.dropout):
            scalars[some], stats = plus - minus, seen
            del plus, minus
        return scalars.div_(2 * self.sigma), stats
