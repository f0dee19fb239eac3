"""ZO-SGD-Conserve: a step is tried forwards, backwards and not at all, and the best is kept.

T. Feng et al., "ZeroFlow: Overcoming Catastrophic Forgetting is Easier than You Think", arXiv 2501.01045, ICML 2025.
With SPSA's estimate ĝ = (1/K) Σ_k s_k z_k of a batch, and the loss L of the same batch:

    δ = argmin over {1, −1, 0} of L(w − δ η ĝ)        w ← w − δ η ĝ
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from ..network import Network
from ..rule import Batch, State, Stats
from .losses import loss_at
from .spsa import SPSA


@dataclass(frozen=True)
class ZOConserve(SPSA):
    """SPSA that never takes a step that its own batch would rather not have.

    What a client sends is δ s_k. Alone, or with others that share its directions and answer alike, it then steps to the
    best of the three; of many clients the mean of δ s_k is applied, which none of them has tried.

    Stores during a step: what inference stores and 4 (K + 5) bytes, or what a slice of signs needs if that is more.
    Costs 2K + 3 forward passes and 7K passes over the parameters.

    Attributes:
        lr: η; a step too long for its own batch is not taken, but one too long for the others is: no more than SPSA's.
        sigma, dropout, directions, own, pool, chunk, abreast: see `SPSA`.
    """

    name: ClassVar[str] = "zo-conserve"
    paper: ClassVar[str] = "Feng et al., arXiv 2501.01045, 2025"
    unsplittable: ClassVar[str] = "which of three steps is best is a matter of the whole batch"

    lr: float = 0.005
    directions: int = 1

    def probe(self, net: Network, state: State, batch: Batch, lr: float) -> tuple[Tensor, Stats]:
        """Return the K central differences times 1, −1 or 0; stats are of the network at w."""
        scalars, _ = super().probe(net, state, batch, lr)
        loss = partial(loss_at, net, state.params, batch, self.dropout)
        shift = partial(self.apply, state, batch.draws, scalars)  # w − c ĝ
        shift(lr)
        ahead = loss()[0]
        shift(-2 * lr)
        behind = loss()[0]
        shift(lr)
        here, stats = loss()
        best = torch.stack([here, ahead, behind]).argmin()  # of equals the first
        return scalars * ((best == 1).to(here.dtype) - (best == 2).to(here.dtype)), stats
