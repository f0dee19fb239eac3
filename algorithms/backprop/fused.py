"""LOMO: each gradient is applied inside the backward pass and dropped, so that the gradients are never alive together.

K. Lv, Y. Yang, T. Liu, Q. Gao, Q. Guo, X. Qiu, "Full Parameter Fine-tuning for Large Language Models with Limited
Resources", arXiv 2306.09782, 2023. With e_L the gradient of the loss in the scores, for l = L … 1:

    dW_l = (∂a_l/∂W_l)ᵀ e_l      e_{l−1} = (∂a_l/∂a_{l−1})ᵀ e_l      then W_l ← W_l − η dW_l, and dW_l is dropped

Both products are taken before W_l changes, so every dW_l is backpropagation's own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..network import Network
from ..rule import Batch, State, Stats
from ..softmax import softmax_error_and_stats
from .blockwise import pull_back
from .sgd import Backprop


@dataclass(frozen=True)
class FusedBackprop(Backprop):
    """The gradient of `backprop`, applied and dropped block by block.

    Stores during a step: every activation, as `backprop` does, but the gradients of one block at a time. No graph where
    a block is linear with an activation.

    Departs from the paper: the optimizer may keep a state (the paper's is plain SGD, which keeps none); gradients are
    neither scaled nor clipped, which would need a second backward pass for their norm.
    """

    name: ClassVar[str] = "backprop-fused"
    paper: ClassVar[str] = "Lv et al., arXiv 2306.09782, 2023"
    autograd: ClassVar[str] = "inside a block"

    def stackable(self, net: Network) -> bool:
        """Return whether there is no graph anywhere."""
        return self.closed_form(net)

    def step(self, net: Network, state: State, batch: Batch, lr: float) -> Stats:
        """Run forward and keep every block's pull, then pull and update from the last block to the first."""
        x, pulls = batch.x, []
        for i in range(len(net.blocks)):
            x, pull = net.block_vjp(i, state.params, x, wrt_input=i > 0)
            pulls.append(pull)
        error, stats = softmax_error_and_stats(x, batch)
        passing = [error]
        del x, pull, error
        pull_back(net, lambda i: pulls.pop(), passing, lambda grads: self.update(state, grads, lr))
        return stats
