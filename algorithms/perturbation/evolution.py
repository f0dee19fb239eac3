"""OpenES: a cloud of mirrored mutants around the parameters, which then move to where the fitter ones are.

T. Salimans, J. Ho, X. Chen, S. Sidor, I. Sutskever, "Evolution Strategies as a Scalable Alternative to Reinforcement
Learning", arXiv 1703.03864, 2017. Of the 2K members w ± σ z_k a client reports the loss, and nothing else:

    F_k± = L(w ± σ z_k)
    none:   c_k = (F_k+ − F_k−) / (2 K σ)
    ranks:  c_k = (u_k+ − u_k−) / (2 K)          u: ranks of all F, spread over [−½, ½]
    w ← w − η Σ_k c_k z_k
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..network import Network
from ..rule import Batch, RuleError, State, Stats
from ..scalar_rule import ScalarRule
from .losses import losses_along


@dataclass(frozen=True)
class Evolution(ScalarRule):
    """An evolution strategy with mirrored mutations and fitness shaping.

    Stores during a step: what inference stores and 4 (2K + 4) bytes, or what a slice of signs needs if that is more
    (about 9 · `chunk` bytes). Sends 2K numbers. Ranks are no sum over samples or clients: they are taken last, of the
    clients' mean losses, or, if clients have directions of their own, among the members of all.

    With "none" the estimate is unbiased for the gradient of the smoothed loss: coordinate i of its mean is ∂L/∂w_i at
    w + σ z, averaged over signs z but for z_i, which is uniform in [−1, 1]. Ranks forget how much the loss varies.
    Where it is near linear over the cloud, their estimate has the mean g / (2√π ‖g‖) whatever the scale of L and σ:
    biased in length alone. Its cosine with the gradient is √(K / (K − 1 + π d/3)) or so: ranks cost a twentieth of the
    directions.

    Departs from the paper: mutations are signs, not Gaussian; σ does not divide the ranks (as in the authors' code);
    plain SGD instead of Adam; the penalty on weights is the server's (`weight_decay`, with a `pool`).

    Attributes:
        lr: η; with ranks a step is as long as one with η / (2√π ‖g‖) and none.
        sigma: σ, the size of the cloud, over which the loss is smoothed.
        shaping: "ranks" or "none".
        directions, own, pool, chunk, abreast: see `ScalarRule`; K pairs.
    """

    name: ClassVar[str] = "evolution"
    family: ClassVar[str] = "perturbation"
    paper: ClassVar[str] = "Salimans et al., arXiv 1703.03864, 2017"
    unsplittable: ClassVar[str] = ""

    lr: float = 0.3
    sigma: float = 0.03
    shaping: Literal["ranks", "none"] = "ranks"

    def __post_init__(self) -> None:
        if self.shaping not in ("ranks", "none"):
            raise RuleError(f"unknown shaping '{self.shaping}': use ranks or none")
        if self.sigma <= 0:
            raise RuleError(f"{self.name} needs sigma > 0")
        super().__post_init__()

    @property
    def numbers(self) -> int:
        """Two losses a direction."""
        return 2 * self.directions

    def probe(self, net: Network, state: State, batch: Batch, lr: float) -> tuple[Tensor, Stats]:
        """Return the losses of the 2K members, pair by pair; stats are of the last member."""
        return self.losses(net, state, batch, batch.draws.add)

    def losses(self, net: Network, state: State, batch: Batch, add: Callable[..., None]) -> tuple[Tensor, Stats]:
        """Return what `probe` does, of members that `add(params, k, c, chunk)` makes: w + c z_k, in place."""
        fitness, sides = batch.weight.new_zeros(self.directions, 2), (self.sigma, -self.sigma)
        for some, (plus, minus), seen in losses_along(self, net, state.params, batch, sides, add=add):
            fitness[some, 0], fitness[some, 1], stats = plus, minus, seen
            del plus, minus
        return fitness.flatten(), stats

    def coefficients(self, scalars: Tensor, weights: Tensor) -> Tensor:
        """Return the coefficients (N, K), from losses (N, 2K) that weigh (N,)."""
        fitness = centred_ranks(scalars) if self.shaping == "ranks" else scalars / self.sigma
        plus, minus = fitness.view(len(scalars), self.directions, 2).unbind(2)
        return (plus - minus) * (weights / (2 * self.directions)).unsqueeze(1)


def centred_ranks(fitness: Tensor) -> Tensor:
    """Return the ranks of all values of a tensor, evenly spread over [−½, ½]; equal values share the mean of theirs."""
    values = fitness.flatten()
    ordered = values.sort().values
    ranks = torch.searchsorted(ordered, values) + torch.searchsorted(ordered, values, right=True) - 1
    return (ranks.to(fitness.dtype) / (2 * (len(values) - 1)) - 0.5).view_as(fitness)
