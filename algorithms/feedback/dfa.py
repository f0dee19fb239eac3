"""Direct Feedback Alignment: the output error reaches every block through a fixed random matrix.

A. Nøkland, "Direct Feedback Alignment Provides Learning in Deep Neural Networks", NeurIPS 2016, arXiv 1609.01596.

    e = (softmax(z_L) − y*) / B       dW_L = eᵀ a_{L−1}                       (the true gradient, output block)
    da_l = e B_l                      dW_l = (da_l · f'(z_l))ᵀ a_{l−1}        (hidden block l)

B_l (C × n_l) is uniform in ±β/√n_l, drawn from the run seed, the same on every client, and never sent: clients that
aligned to different matrices could not be averaged.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..network import Network
from ..rule import Batch, GradientRule, State, Stats, softmax_error_and_stats
from ..seeds import Purpose, generator


@dataclass(frozen=True)
class DFA(GradientRule):
    """Random projections of the output error replace the backward pass; all blocks can update at once.

    Stores during a step: the input and output of every block (they wait for the error) and, where a block is more than
    linear with an activation, the graph inside it. The feedback is injected after a block's activation and pooling.

    Attributes:
        scale: β, the size of the feedback; hidden blocks learn in proportion to it. 1 is TinyDFA's normalisation
            (Launay et al., arXiv 2006.12878, 2020), with which wide networks learn slowly; β = √n_l is plain uniform
            ±1 feedback and wants a lower lr.

    Departs from the paper: the feedback is divided by √n_l, as TinyDFA does. Tanh networks align better than ReLU:
    `--set model.activation=tanh`.
    """

    name: ClassVar[str] = "dfa"
    family: ClassVar[str] = "feedback"
    paper: ClassVar[str] = "Nøkland, NeurIPS 2016, arXiv 1609.01596"
    autograd: ClassVar[str] = "inside a block"
    unsplittable: ClassVar[str] = ""

    lr: float = 0.05
    momentum: float = 0.9
    scale: float = 1.0

    def init(self, net: Network, seed: int) -> State:
        """Return the network's weights and fixed feedback "{l}.feedback" (C, features of block l)."""
        params, fixed = net.init(seed), {}
        for i in net.hidden:
            width = torch.Size(net.sizes[i]).numel()
            draws = generator(seed, Purpose.FIXED, i).uniform(-1, 1, (net.classes, width))
            fixed[f"{i}.feedback"] = torch.from_numpy(self.scale * draws / width**0.5).to(torch.float32)
        return State(params, fixed, self.slots(params))

    def stackable(self, net: Network) -> bool:
        """Return whether there is no graph anywhere."""
        return self.closed_form(net)

    def step(self, net: Network, state: State, batch: Batch, lr: float) -> Stats:
        """Run forward once, then give every block its projection of the error."""
        x, pulls = batch.x, []
        for i in net.hidden:
            x, pull = net.block_vjp(i, state.params, x)
            pulls.append((x.shape, pull))
        x, pull = net.block_vjp(net.output, state.params, x)
        error, stats = softmax_error_and_stats(x, batch)
        self.update(state, pull(error), lr)
        del x, pull
        for i in reversed(net.hidden):
            shape, pull = pulls.pop()
            self.update(state, pull((error @ state.fixed[f"{i}.feedback"]).view(shape)), lr)
            del pull
        return stats

    def logits(self, net: Network, state: State, x: Tensor) -> Tensor:
        """Return the network's output (B, classes)."""
        return net.forward(state.params, x)
