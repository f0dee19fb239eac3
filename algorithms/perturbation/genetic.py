"""A genetic algorithm: mutants of one parent, of which the best is the next parent, if it is better than the old one.

F. P. Such, V. Madhavan, E. Conti, J. Lehman, K. O. Stanley, J. Clune, "Deep Neuroevolution: Genetic Algorithms Are a
Competitive Alternative for Training Deep Neural Networks for Reinforcement Learning", arXiv 1712.06567, 2017. In
generation t, with the mutation power η:

    F_0 = L(w)     F_k = L(w + η z_tk)     k* = argmin_k F_k        w ← w + η z_tk*  if F_k* < F_0

so that the genome of a model is its chain of winners, k*_1 k*_2 …, whatever its size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..network import Network
from ..rule import Batch, State, Stats
from ..scalar_rule import ScalarRule
from .losses import loss_at, losses_along


@dataclass(frozen=True)
class Genetic(ScalarRule):
    """Truncation selection with one parent and its elite place: nothing but the order of losses matters.

    Stores during a step: what inference stores and 4 (K + 4) bytes, or what a slice of signs needs if that is more
    (about 9 · `chunk` bytes). Costs K + 1 forward passes. Sends K + 1 numbers: which child is the best is a matter of
    the clients' mean losses. One comes back, the winner, from which anybody makes the mutation (of clients with
    children of their own one each, 0 but for the winner's). Of these each child is compared with the parent on its own
    client's batch, and the one with the largest gain, weighed as its client is, wins.

    Departs from the paper: one parent (T = 1) instead of 20, for each further one would be another model in every
    replica; so there is nothing to choose the parent of a child among. Mutations are signs, not Gaussian. The elite is
    not judged on 30 further episodes, but anew in every generation, on the batch on which its children are.

    Attributes:
        lr: η, the mutation power, per parameter. The best of K children gains η ‖g‖ √(2 ln K) or less, and curvature H
            takes η² tr(H) / 2 of it.
        directions: K, children in a generation.
        own, pool, chunk, abreast: see `ScalarRule`.
    """

    name: ClassVar[str] = "genetic"
    family: ClassVar[str] = "perturbation"
    paper: ClassVar[str] = "Such et al., arXiv 1712.06567, 2017"
    unsplittable: ClassVar[str] = ""

    lr: float = 0.02

    @property
    def numbers(self) -> int:
        """The loss of the parent and of each child."""
        return self.directions + 1

    @property
    def passed(self) -> int:
        """Who won."""
        return 1

    def probe(self, net: Network, state: State, batch: Batch, lr: float) -> tuple[Tensor, Stats]:
        """Return the losses of the parent and its K children; stats are of the parent."""
        fitness = batch.weight.new_zeros(self.directions + 1)
        fitness[0], stats = loss_at(net, state.params, batch)
        for some, losses, last in losses_along(self, net, state.params, batch, (lr,)):
            fitness[1:][some] = losses.pop()
            del last
        return fitness, stats

    def pass_on(self, scalars: Tensor, weights: Tensor) -> Tensor:
        """Return the number of the best child, from 1, for its client and 0 for the others, (N, 1).

        It is 0 for all if the parent is as good.
        """
        gains = ((scalars[:, :1] - scalars[:, 1:]) * weights.unsqueeze(1)).flatten()
        winner = torch.arange(len(gains), device=gains.device) == gains.argmax()
        won = (winner & (gains > 0)).to(scalars.dtype).view(len(scalars), self.directions)
        return (won * self._children(scalars)).sum(1, keepdim=True)

    def coefficients(self, scalars: Tensor, weights: Tensor) -> Tensor:
        """Return −1 for the child that won, if one did, and 0 for the others, (N, K)."""
        return -(scalars == self._children(scalars)).to(scalars.dtype)

    def _children(self, like: Tensor) -> Tensor:
        return torch.arange(1, self.directions + 1, dtype=like.dtype, device=like.device)
