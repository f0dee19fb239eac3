"""Direct Random Target Projection: a block's signal is the label through a fixed random matrix. No error, no waiting.

C. Frenkel, M. Lefebvre, D. Bol, "Learning Without Feedback: Fixed Random Learning Signals Allow for Feedforward
Training of Deep Neural Networks", Frontiers in Neuroscience 15:629892, 2021, arXiv 1909.01311.

    da_l = y* B_l / B                 dW_l = (da_l · f'(z_l))ᵀ a_{l−1}        (hidden block l, as soon as it has run)
    e = (softmax(z_L) − y*) / B       dW_L = eᵀ a_{L−1}                       (the true gradient, output block)

Of one-hot labels and scores between 0 and 1, the sign of the error is known beforehand: y* stands for it. B_l (C × n_l)
is uniform in ±β √(6/n_l), and y* B_l is one of its rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..network import Network
from ..rule import Batch, GradientRule, State, Stats
from ..softmax import softmax_error_and_stats
from .fixed import feedback_of, feedbacks


@dataclass(frozen=True)
class DRTP(GradientRule):
    """Random projections of the label replace the backward pass, and each block is updated before the next one runs.

    Stores during a step: one block's input and output, its signal, and that block's gradients. No graph where the
    block is linear with an activation; elsewhere a graph inside the block alone. The signal is injected after a block's
    activation and pooling.

    The signal does not shrink as the error does, so hidden weights grow as long as it lasts. Units that are bounded
    saturate, and a falling learning rate (`--lr-schedule half-linear`) ends it: use --set model.activation=tanh, as the
    paper does. With ReLU activity grows without end, and nothing is learned.

    Departs from the paper: the output is a softmax with cross-entropy instead of sigmoids with theirs, momentum is
    heavy-ball instead of Nesterov's, and every signal is that of the batch mean. The published code divides the
    output's error by batch and classes, and the hidden signals by nothing: a learning rate η of its own is `lr` η/C
    here with a `scale` of B · C.

    Attributes:
        scale: β, the size of the signal; 1 is the paper's. Hidden blocks learn in proportion to it.
        regenerate: the fixed matrices are made again in every step, one block's at a time, instead of kept: some
            twenty operations a number. Same kind and size, other numbers.
    """

    name: ClassVar[str] = "drtp"
    family: ClassVar[str] = "feedback"
    paper: ClassVar[str] = "Frenkel, Lefebvre & Bol, Frontiers in Neuroscience 2021, arXiv 1909.01311"
    autograd: ClassVar[str] = "inside a block"
    unsplittable: ClassVar[str] = ""

    lr: float = 0.05
    momentum: float = 0.9
    scale: float = 1.0
    regenerate: bool = False

    def init(self, net: Network, seed: int) -> State:
        """Return the network's weights and fixed matrices "{l}.feedback" (C, features of block l), or their "seed"."""
        params, size = net.init(seed), self.scale * 6**0.5
        return State(params, feedbacks(net, seed, size, regenerate=self.regenerate), self.slots(params))

    def stackable(self, net: Network) -> bool:
        """Return whether there is no graph anywhere."""
        return self.closed_form(net)

    def step(self, net: Network, state: State, batch: Batch, lr: float) -> Stats:
        """Run one block after the other, and update it by its rows of the labels."""
        x, share = batch.x, batch.share().unsqueeze(-1)
        for i in net.hidden:
            x, pull = net.block_vjp(i, state.params, x)
            rows = feedback_of(state.fixed, net, i, self.scale * 6**0.5, x.dtype)[batch.y]
            grads = pull(rows.mul_(share).view(x.shape))
            del rows
            del pull
            self.update(state, grads, lr)
            del grads
        x, pull = net.block_vjp(net.output, state.params, x)
        error, stats = softmax_error_and_stats(x, batch)
        self.update(state, pull(error), lr)
        return stats
