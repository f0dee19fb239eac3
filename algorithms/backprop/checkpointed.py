"""Gradient checkpointing: what happened inside a block is forgotten, and computed again when the backward pass comes.

T. Chen, B. Xu, C. Zhang, C. Guestrin, "Training Deep Nets with Sublinear Memory Cost", arXiv 1604.06174, 2016.

    forward     a_l = f_l(a_{l−1}; W_l)                                keep a_{l−1}, nothing else
    backward    a_l = f_l(a_{l−1}; W_l) again, with its graph          dW_l, e_{l−1} = pull of block l at e_l

for l = L … 1, where e_l is the gradient of the loss in a_l. One more forward pass buys the inside of all blocks but
one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..network import Network, Pull
from ..optimizer import made
from ..rule import Batch, State, Stats
from ..softmax import softmax_error_and_stats
from .blockwise import Tensors, pull_back
from .sgd import Backprop


@dataclass(frozen=True)
class CheckpointedBackprop(Backprop):
    """The gradient of `backprop`, from the inputs of the blocks alone.

    Stores during a step: the input of every block, and the inside and the gradients of one block at a time.

    Departs from the paper: a segment is one block, where the paper cuts n layers into √n; and two kinds of blocks are
    not run again, for nothing could be forgotten: the last, whose turn comes at once, and those that are linear with an
    activation, which keep their input and their output, the next block's input. On a network of these alone (`mlp`
    with relu or tanh) this rule is `backprop-fused`.

    Attributes:
        fused: update a block as soon as it is pulled, as `backprop-fused` does. False keeps all gradients to the end,
            which is the paper's.
    """

    name: ClassVar[str] = "backprop-checkpointed"
    paper: ClassVar[str] = "Chen et al., arXiv 1604.06174, 2016"
    autograd: ClassVar[str] = "inside a block"

    fused: bool = True

    def step(self, net: Network, state: State, batch: Batch, lr: float) -> Stats:
        """Run forward and keep every block's input, then run, pull and update from the last block to the first."""
        x, kept = batch.x, []
        for i in range(len(net.blocks)):
            if i == net.output or net.dense(i) is not None:
                x, pull = net.block_vjp(i, state.params, x, wrt_input=i > 0)
                kept.append(pull)
                del pull
            else:
                kept.append(x)
                x = net.block(i, state.params, x)
        error, stats = softmax_error_and_stats(x, batch)
        passing = [error]
        del x, error

        def pull_of(i: int) -> Pull:
            known = kept.pop()
            return known if callable(known) else net.block_vjp(i, state.params, known, wrt_input=i > 0)[1]

        if self.fused:
            pull_back(net, pull_of, passing, lambda grads: self.update(state, grads, lr))
        else:
            gradients: Tensors = {}
            keep = lambda grads: gradients.update({key: made(grad) for key, grad in grads.items()})  # noqa: E731
            pull_back(net, pull_of, passing, keep)
            self.update(state, gradients, lr)
        return stats
