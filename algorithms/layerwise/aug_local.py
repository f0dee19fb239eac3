"""AugLocal: auxiliary nets are short versions of the blocks that follow, so that a block learns what those want.

C. Ma, J. Wu, C. Si, K. C. Tan, "Scaling Supervised Local Learning with Augmented Auxiliary Networks", ICLR 2024,
arXiv 2402.17318. Of n hidden blocks, block l (from 0) learns from an auxiliary net that is like d_l of the blocks after
it, drawn uniformly from them, with weights of its own, and ends in a global average and a linear classifier:

    L_l = CE(A_l(a_l), y)      A_l like blocks round(l + (n − 1 − l) i / d_l), i = 1 … d_l
    d_l = max(1, round(d (1 − ρ_l) + ρ_l))      ρ_l = pyramid · l / (K − 2)

An auxiliary net of the last d + 1 hidden blocks would be all that follows: they and the output block are one module,
trained by backpropagation inside. So there are K = n − d modules.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from torch import Tensor

from ..network import Network
from ..rule import Batch, RuleError, Tensors
from ..softmax import cross_entropy
from .auxiliary import copied, drawn
from .modules import Isolated, Module, demand_hidden, module


@dataclass(frozen=True)
class AugLocal(Isolated):
    """Block-local cross-entropy through an auxiliary net that copies the architecture of later blocks.

    Stores during a step: what the largest module needs, its input, its activations with those of its auxiliary net, and
    their gradients. That is of d + 1 blocks, however deep the network is. Auxiliary nets travel and are averaged; they
    copy the late, wide blocks, and those of a resnet weigh more than itself: with few samples in a batch or small maps
    weights rule, and backpropagation needs less.

    Departs from the paper: where blocks that were left out would have made a map smaller, it is averaged down before
    the next copy (the paper gives that copy a stride of 2, and takes networks whose widths double where maps halve);
    the first block is isolated on networks of fewer than d + 2 hidden blocks too, with the blocks there are to copy.
    Momentum is heavy-ball, not Nesterov's, and nothing decays unless asked for. Copies draw their weights as their
    layers do, whatever the network's own initialisation.

    Attributes:
        aux_depth: d, the blocks in the first auxiliary net.
        pyramid: how fast later auxiliary nets become shallower; 0 gives them all d blocks, 1 the last one 1.
    """

    name: ClassVar[str] = "aug-local"
    paper: ClassVar[str] = "Ma et al., ICLR 2024, arXiv 2402.17318"

    lr: float = 0.05
    momentum: float = 0.9
    aux_depth: int = 2
    pyramid: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.aux_depth < 1 or not 0 <= self.pyramid <= 1:
            raise RuleError("aug-local needs rule.aux_depth ≥ 1 and 0 ≤ rule.pyramid ≤ 1")

    def cut(self, net: Network) -> Iterator[Module]:
        """Yield a module for each of the first blocks, and one for the last together."""
        demand_hidden(net, 2, self.name)
        hidden = len(net.hidden)
        alone = max(1, hidden - 1 - self.aux_depth)  # K − 1
        for i in range(alone):
            along = i / max(alone - 1, 1)
            structure = copied(net, self.sampled(i, along, hidden), net.sizes[i], self.name)
            yield module(net, range(i, i + 1), along, auxiliary=(partial(drawn, structure), net.classes))
        yield Module(range(alone, hidden + 1), {})

    def sampled(self, i: int, along: float, hidden: int) -> list[int]:
        """Return which of the hidden blocks the auxiliary net of block i copies."""
        shallower = self.pyramid * along
        depth = max(1, round(self.aux_depth * (1 - shallower) + shallower))
        after = hidden - 1 - i
        depth = min(depth, after)
        return [round(i + after / depth * k) for k in range(1, depth + 1)]

    def local_loss(self, module: Module, params: Tensors, a: Tensor, batch: Batch) -> Tensor:
        """Return the cross-entropy of the auxiliary net."""
        return cross_entropy(module.auxiliaries["auxiliary"](params, a), batch)[0]
