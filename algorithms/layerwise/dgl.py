"""Decoupled Greedy Learning: every module learns from a small classifier on its output, and all could learn at once.

E. Belilovsky, M. Eickenberg, E. Oyallon, "Decoupled Greedy Learning of CNNs", ICML 2020, arXiv 1901.08164.

    L_m = CE(A_m(a_m), y)

A_m ("MLP-SR-aux") averages a map down to a quarter of its sides, so that it is cheap at any resolution, then has three
1×1 convolutions, averages down to 2×2 positions, and ends in three dense layers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from torch import Tensor, nn

from ..blocks import CONVOLUTIONS
from ..network import Network
from ..residual import GroupNorm
from ..rule import Batch, Tensors
from ..softmax import cross_entropy
from .auxiliary import averaged
from .modules import Isolated, Module, module, stretches


@dataclass(frozen=True)
class DGL(Isolated):
    """Module-local cross-entropy through a small classifier that averages space away early.

    Stores during a step: what the largest module needs, its input, its activations with those of its auxiliary net, and
    their gradients. Auxiliary nets travel and are averaged.

    Departs from the paper: an auxiliary net's channels are normalised together, of each sample by itself (groups would
    be too small on its small maps), where the paper normalises over batches, the dense layers too, which have no
    norm here; modules update one after the other, which saves the memory, where the paper runs them at once on machines
    of their own; on dense blocks, which the paper has not, an auxiliary net is the three dense layers, as wide as the
    block.

    Attributes:
        local_modules: K, into how many modules the network is cut; 0 makes one of every hidden block. The last one,
            which takes the output block, has the network's own loss.
    """

    name: ClassVar[str] = "dgl"
    paper: ClassVar[str] = "Belilovsky, Eickenberg & Oyallon, ICML 2020, arXiv 1901.08164"

    lr: float = 0.05
    momentum: float = 0.9
    local_modules: int = 0

    def cut(self, net: Network) -> Iterator[Module]:
        """Yield K modules, each but the last with a classifier."""
        *isolated, (last, _) = stretches(net, self.local_modules, self.name)
        for blocks, along in isolated:
            build = partial(head, net.sizes[blocks[-1]], net.classes)
            yield module(net, blocks, along, auxiliary=(build, net.classes))
        yield Module(last, {})

    def local_loss(self, module: Module, params: Tensors, a: Tensor, batch: Batch) -> Tensor:
        """Return the cross-entropy of the classifier."""
        return cross_entropy(module.auxiliaries["auxiliary"](params, a), batch)[0]


def head(shape: Sequence[int], classes: int) -> nn.Sequential:
    """Return the paper's classifier for outputs of this shape."""
    channels, *sides = shape
    quarter = [math.ceil(side / 4) for side in sides]
    ends = [min(side, 2) for side in quarter]
    layers = averaged(shape, (channels, *quarter))
    for _ in range(3 if sides else 0):
        convolution = CONVOLUTIONS[len(sides) - 1](channels, channels, 1, bias=False)
        layers += [convolution, GroupNorm(1, channels), nn.ReLU()]
    layers += averaged((channels, *quarter), (channels, *ends))
    width = channels * math.prod(ends)
    layers += [nn.Flatten(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, classes))
