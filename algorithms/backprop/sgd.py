"""Backpropagation of the cross-entropy: the reference every other rule is measured against.

    w ← w − η ∂CE(f(x; w), y) / ∂w      (Rumelhart, Hinton & Williams 1986)

The optimizer is plain SGD unless told otherwise. During a step the activations of all blocks and one gradient per
parameter are alive together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..graph import gradients
from ..network import Network
from ..rule import Batch, GradientRule, State, Stats
from ..softmax import cross_entropy


@dataclass(frozen=True)
class Backprop(GradientRule):
    """Gradient descent on the cross-entropy of the whole network.

    Stores during a step: every activation, one gradient per parameter.
    """

    name: ClassVar[str] = "backprop"
    family: ClassVar[str] = "backprop"
    paper: ClassVar[str] = "Rumelhart, Hinton & Williams, Nature 323, 1986"
    autograd: ClassVar[str] = "whole network"
    unsplittable: ClassVar[str] = ""

    lr: float = 0.3

    def init(self, net: Network, seed: int) -> State:
        """Return the network's own initial weights."""
        params = net.init(seed)
        return State(params, {}, self.slots(params))

    def step(self, net: Network, state: State, batch: Batch, lr: float) -> Stats:
        """Descend the gradient of the weighted mean cross-entropy."""
        objective = lambda params: cross_entropy(net.forward(params, batch.x), batch)  # noqa: E731
        grads, stats = gradients(objective, state.params)
        self.update(state, grads, lr)
        return stats
