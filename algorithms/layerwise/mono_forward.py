"""Mono-Forward: every hidden block learns by itself to tell the classes apart.

J. Gong, B. Li, W. Abdulla, "Mono-Forward: Backpropagation-Free Algorithm for Efficient Neural Network Training
Harnessing Local Errors", arXiv 2501.09238, 2025. A hidden block l owns a projection M_l (C × n_l):

    a_l = f(W_l a_{l−1} + b_l)      g_l = M_l a_l      L_l = CE(softmax(g_l), y)
    δ = (softmax(g_l) − y*) / B     dM_l = δᵀ a_l      da_l = δ M_l      dW_l = (da_l · f'(z_l))ᵀ a_{l−1}

and is updated before the next block runs. The network's own output block is not used: the last projection is it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..network import Network
from ..optimizer import Product
from ..rule import Batch, GradientRule, RuleError, State, Stats
from ..seeds import Purpose, generator
from ..softmax import cross_entropy_stats, softmax_error


@dataclass(frozen=True)
class MonoForward(GradientRule):
    """Block-local cross-entropy through a learned projection per hidden block.

    Stores during a step: one block's input and output, and that block's gradients. No graph where the block is linear
    with an activation; elsewhere a graph inside the block alone.

    Departs from the paper: a convolution's map is averaged over its positions before the projection (flattened, the
    projection would outgrow the block).

    Attributes:
        prediction: "sum" adds the scores of all blocks, "last" takes the last block's.
    """

    name: ClassVar[str] = "mono-forward"
    family: ClassVar[str] = "layerwise"
    paper: ClassVar[str] = "Gong, Li & Abdulla, arXiv 2501.09238, 2025"
    travels: ClassVar[str] = "weights and heads"
    autograd: ClassVar[str] = "inside a block"
    unsplittable: ClassVar[str] = ""

    lr: float = 0.3
    prediction: Literal["sum", "last"] = "sum"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prediction not in ("sum", "last"):
            raise RuleError(f"unknown prediction '{self.prediction}': use sum or last")

    def check(self, net: Network) -> None:
        """Demand a hidden block."""
        if not net.hidden:
            raise RuleError("mono-forward trains hidden blocks, and this model has none: add a layer before the output")

    def init(self, net: Network, seed: int) -> State:
        """Return the hidden blocks' weights and a projection "{l}.head" (C, channels or width) for each."""
        weights = net.init(seed)
        params = {}
        for i in net.hidden:
            params |= {key: weights[key] for key in net.keys(i)}
            width = net.sizes[i][0]
            draws = generator(seed, Purpose.INIT, i).uniform(-1, 1, (net.classes, width))
            params[f"{i}.head"] = torch.from_numpy(draws / width**0.5).to(torch.float32)
        return State(params, {}, self.slots(params))

    def stackable(self, net: Network) -> bool:
        """Return whether there is no graph anywhere."""
        return self.closed_form(net)

    def step(self, net: Network, state: State, batch: Batch, lr: float) -> Stats:
        """Run, project and update one block after the other; stats are those of the network's prediction."""
        x, scores = batch.x, 0.0
        for i in net.hidden:
            a, pull = net.block_vjp(i, state.params, x)
            head = state.params[f"{i}.head"]
            pooled = pool(a, head)
            logits = pooled @ head.mT
            delta = softmax_error(logits, batch)
            grads = pull(spread(delta @ head, a))
            del pull
            self.update(state, grads | {f"{i}.head": Product(delta, pooled)}, lr)
            del grads
            scores = scores + logits if self.prediction == "sum" else logits
            x = a
        return cross_entropy_stats(scores, batch)

    def logits(self, net: Network, state: State, x: Tensor) -> Tensor:
        """Return the sum of the blocks' scores, or the last block's, (B, classes)."""
        scores = 0.0
        for i in net.hidden:
            x = net.block(i, state.params, x)
            head = state.params[f"{i}.head"]
            logits = pool(x, head) @ head.T
            scores = scores + logits if self.prediction == "sum" else logits
        return scores


def pool(a: Tensor, head: Tensor) -> Tensor:
    """Average a map (B, channels, ...) over its positions for a projection; vectors (..., B, width) stay."""
    return a if a.dim() == head.dim() else a.flatten(2).mean(2)


def spread(gradient: Tensor, a: Tensor) -> Tensor:
    """Return the gradient of `pool` at a: (B, channels) spread evenly over the positions of a."""
    if a.dim() == gradient.dim():
        return gradient
    positions = a[0, 0].numel()
    return (gradient / positions).reshape(*gradient.shape, *[1] * (a.dim() - 2)).expand_as(a)
