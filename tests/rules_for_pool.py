"""Rules that tests of engines with workers name by module."""

from dataclasses import dataclass

import torch
from fedforward.algorithms import Backprop, MonoForward


@dataclass(frozen=True)
class Hungry(Backprop):
    """Wants more memory than there is, for real batches: a plan's has no values to be hungry for."""

    def step(self, net, state, batch, lr):
        if batch.x.abs().sum() > 0:
            torch.empty(2**60)
        return super().step(net, state, batch, lr)


@dataclass(frozen=True)
class Faulty(MonoForward):
    """Raises for one client."""

    def draw(self, place, batch_size, classes):
        if place.client == 2:
            raise TypeError("a bug of mine")
        return torch.ones(batch_size)


@dataclass(frozen=True)
class Unbatchable(MonoForward):
    """Says that it runs under vmap, and reads a value."""

    def step(self, net, state, batch, lr):
        if batch.x.device.type == "cpu":
            batch.x.sum().item()
        return super().step(net, state, batch, lr)
