"""Feedback Alignment: backpropagation whose way back is random and fixed.

T. P. Lillicrap, D. Cownden, D. B. Tweed, C. J. Akerman, "Random synaptic feedback weights support error backpropagation
for deep learning", Nature Communications 7:13276, 2016. With δ_L = (softmax(z_L) − y*) / B, for l = L … 1:

    dW_l = δ_lᵀ a_{l−1}      da_{l−1} = δ_l B_l      δ_{l−1} = da_{l−1} · f'(z_{l−1})

B_l is random, shaped like W_l, and never changes; backpropagation has W_l in its place. The forward weights turn
towards the feedback until the error that it delivers is of use.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..network import Network
from ..rule import Batch, GradientRule, State, Stats
from ..seeds import Purpose, generator
from .fixed import kept_seed, remade, uniform, xavier
from .transport import learn
from .ways import check, ways


@dataclass(frozen=True)
class FeedbackAlignment(GradientRule):
    """The error goes back block by block, each time through a fixed random matrix.

    Stores during a step: the input and output of every block, and no gradient of a weight, to the byte what
    `backprop-fused` stores: of B samples, of dense blocks,

        4 B max_l (n_1 + … + n_l + n_l + n_{l+1})        (mostly that of the last hidden block, n_{l+1} = C)

    and a bias's gradient. A block that is more than linear with an activation keeps the graph inside it. Beside that,
    all the time, B_l of every block but the first, 4 bytes a weight.

    B_l is drawn from the run seed, the same on every client, and never sent: clients that aligned to different matrices
    could not be averaged.

    Departs from the paper: B_l has Glorot's size, uniform with variance 2 / (fan in + fan out), where the paper finds
    one for each network; a convolution's B_l is shaped like its kernel, the same at all positions.

    Attributes:
        lr: η; with 0.05 the digits end a point or two lower.
        regenerate: the fixed matrices are made again in every step, one block's at a time, instead of kept: some
            twenty operations a number. Same kind and size, other numbers.
    """

    name: ClassVar[str] = "feedback-alignment"
    family: ClassVar[str] = "feedback"
    paper: ClassVar[str] = "Lillicrap et al., Nature Communications 7:13276, 2016"
    autograd: ClassVar[str] = "inside a block"
    unsplittable: ClassVar[str] = ""

    lr: float = 0.02
    momentum: float = 0.9
    regenerate: bool = False

    def check(self, net: Network) -> None:
        """Demand blocks of one weighted layer each."""
        check(net, self.name)

    def init(self, net: Network, seed: int) -> State:
        """Return the network's weights and "{l}.feedback", shaped like those of block l ≥ 1, or the "seed" of it."""
        params, fixed = net.init(seed), kept_seed(seed) if self.regenerate else {}
        for i, way in enumerate(ways(net)):
            if i > 0 and not self.regenerate:
                shape = params[way.weight].shape
                fixed[f"{i}.feedback"] = uniform(generator(seed, Purpose.FIXED, i), shape, xavier(shape))
        return State(params, fixed, self.slots(params))

    def stackable(self, net: Network) -> bool:
        """Return whether there is no graph anywhere."""
        return self.closed_form(net)

    def step(self, net: Network, state: State, batch: Batch, lr: float) -> Stats:
        """Run forward, then take the error back through the feedback."""
        return learn(
            net,
            state,
            batch,
            send=lambda i, crossing, grads: crossing.through(self._feedback(net, state, i, crossing.error.dtype)),
            update=lambda grads: self.update(state, grads, lr),
        )

    def _feedback(self, net: Network, state: State, i: int, dtype: torch.dtype) -> Tensor:
        """Return B of block i, shaped like its weights, kept or made again."""
        if not self.regenerate:
            return state.fixed[f"{i}.feedback"]
        shape = ways(net)[i].layer.weight.shape
        return remade(state.fixed["seed"], i, shape, 3**0.5 * xavier(shape), dtype)
