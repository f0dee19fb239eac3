"""A rule that a test of the pool names by module."""

from dataclasses import dataclass

import torch
from fedforward.algorithms import Backprop


@dataclass(frozen=True)
class Hungry(Backprop):
    """Wants more memory than there is, for real batches: a plan's has no values to be hungry for."""

    def step(self, net, state, batch, lr):
        if batch.x.abs().sum() > 0:
            torch.empty(2**60)
        return super().step(net, state, batch, lr)
