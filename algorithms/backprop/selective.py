"""Selective differentiation: the first blocks are frozen, and what a frozen block computes is not stored.

S. Bhatia, F. Dangel, "Lowering PyTorch's Memory Consumption for Selective Differentiation", arXiv 2404.12406, 2024: a
layer need store its input only if its own weights are trained, and nothing at all if no weight before it is either.
With the first k of L blocks frozen,

    a_k = f_k(… f_1(x; W_1) …; W_k)          no graph
    W_l ← W_l − η ∂CE(f_L(… f_{k+1}(a_k; W_{k+1}) …; W_L), y) / ∂W_l          l = k+1 … L
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..graph import gradients
from ..network import Network
from ..rule import Batch, RuleError, State, Stats
from ..softmax import cross_entropy
from .sgd import Backprop


@dataclass(frozen=True)
class SelectiveBackprop(Backprop):
    """Backpropagation through the last blocks, above a frozen prefix.

    Stores during a step: the activations and gradients of the trained blocks; of the frozen ones, what inference does.

    Departs from the paper: its frozen layers lie anywhere and are pre-trained. Here they are a prefix and keep the
    random weights of the run's seed (`State.fixed`, never sent), so that clients who share a seed share them. The
    gradient of the trained blocks is exact; it is the network that learns less.

    Attributes:
        frozen: k, the number of blocks that keep their first weights; 0 is `backprop`.
    """

    name: ClassVar[str] = "backprop-selective"
    paper: ClassVar[str] = "Bhatia & Dangel, arXiv 2404.12406, 2024"
    travels: ClassVar[str] = "weights of the trained blocks"
    autograd: ClassVar[str] = "trained blocks together"

    frozen: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.frozen < 0:
            raise RuleError("backprop-selective needs frozen ≥ 0")

    def check(self, net: Network) -> None:
        """Demand a block after the frozen ones."""
        if self.frozen >= len(net.blocks):
            raise RuleError(
                f"backprop-selective would freeze {self.frozen} of the {len(net.blocks)} blocks of this model and train"
                f" none: use --set rule.frozen={len(net.blocks) - 1} or less, or add a layer"
            )

    def init(self, net: Network, seed: int) -> State:
        """Return the network's own initial weights, those of the frozen blocks apart."""
        params, fixed = net.init(seed), {}
        for i in range(self.frozen):
            fixed |= {key: params.pop(key) for key in net.keys(i)}
        return State(params, fixed, self.slots(params))

    def step(self, net: Network, state: State, batch: Batch, lr: float) -> Stats:
        """Descend the gradient of the weighted mean cross-entropy in the trained blocks."""
        # The frozen blocks see nothing that is differentiated, so they leave no graph.
        objective = lambda params: cross_entropy(net.forward(state.fixed | params, batch.x), batch)  # noqa: E731
        grads, stats = gradients(objective, state.params)
        self.update(state, grads, lr)
        return stats

    def logits(self, net: Network, state: State, x: Tensor) -> Tensor:
        """Return the network's output (B, classes)."""
        return net.forward(state.fixed | state.params, x)
