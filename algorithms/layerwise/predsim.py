"""Local error signals: a block tells the classes apart, and samples of a class are alike in it and of two are not.

A. Nøkland, L. H. Eidnes, "Training Neural Networks with Local Error Signals", ICML 2019, arXiv 1901.06656 ("predsim").
Hidden block l has a decoder D_l, linear, and a similarity net g_l, linear or a 3×3 convolution, neither with a gradient
to another block:

    L_l = (1 − β) CE(D_l(a_l), y) + β Σ_ij s_i s_j (S(h_l)_ij − S(y*)_ij)²      h_l = g_l(a_l)
    S(h)_ij = cos(h_i − mean(h_i), h_j − mean(h_j))

with s_i a sample's share of the batch, and mean over the features of a sample. Of a map, h_l is the standard deviation
of each channel over its positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from ..blocks import CONVOLUTIONS
from ..network import Network
from ..rule import Batch, RuleError, Tensors
from ..softmax import cross_entropy, onehot
from .auxiliary import averaged
from .features import grid
from .modules import Isolated, Module, demand_hidden, module


@dataclass(frozen=True)
class PredSim(Isolated):
    """Block-local cross-entropy and similarity matching.

    Stores during a step: one block's input, its activations with those of its two auxiliary nets, a number for each
    pair of samples a few times, and their gradients. Auxiliary nets travel and are averaged.

    A pair counts as the product of its samples' shares, so a sample of weight 0 is in none that counts.

    Departs from the paper: networks are as they come, without batch normalisation and dropout; a map is averaged over a
    grid for its decoder, where the paper takes the nearest power of two as its window; a block is whatever the network
    calls one, as a residual block with its two convolutions; a map of one position is taken as a vector. The default lr
    is ten times the paper's, for runs a tenth as long. A batch wants several samples: one is like itself whatever the
    block does.

    Attributes:
        beta: β, the part of similarity matching in the loss.
        dim_in_decoder: the most features that a map hands to its decoder. Vectors are never shortened.
    """

    name: ClassVar[str] = "predsim"
    paper: ClassVar[str] = "Nøkland & Eidnes, ICML 2019, arXiv 1901.06656"
    unsplittable: ClassVar[str] = "its loss is of pairs of samples, and the parts of a batch do not hold all pairs"

    lr: float = 5e-3
    optimizer: Literal["sgd", "adam"] = "adam"
    beta: float = 0.99
    dim_in_decoder: int = 1024

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.beta <= 1 or self.dim_in_decoder < 1:
            raise RuleError("predsim needs 0 ≤ rule.beta ≤ 1 and rule.dim_in_decoder ≥ 1")

    def cut(self, net: Network) -> Iterator[Module]:
        """Yield a module for every block; the output block learns from its own cross-entropy."""
        demand_hidden(net, 1, self.name)
        for i in net.hidden:
            shape = net.sizes[i]
            read = partial(decoder, shape, net.classes, self.dim_in_decoder), net.classes
            yield module(net, range(i, i + 1), 0.0, decoder=read, similarity=(partial(similarity_net, shape), shape[0]))
        yield Module(range(net.output, net.output + 1), {})

    def local_loss(self, module: Module, params: Tensors, a: Tensor, batch: Batch) -> Tensor:
        """Return the weighted sum of both losses."""
        predicted = cross_entropy(module.auxiliaries["decoder"](params, a), batch)[0]
        alike = similarity(module.auxiliaries["similarity"](params, a))
        wanted = similarity(onehot(batch.y, module.auxiliaries["decoder"].net.classes, a.dtype))
        share = batch.share()
        return (1 - self.beta) * predicted + self.beta * share.dot((alike - wanted).square() @ share)


def similarity(h: Tensor) -> Tensor:
    """Return the cosines (B, B) of the angles between samples' features h (B, n), each less its own mean."""
    directions = nn.functional.normalize(h - h.mean(1, keepdim=True), dim=1, eps=1e-8)
    return directions @ directions.T


def decoder(shape: Sequence[int], classes: int, most: int) -> nn.Sequential:
    """Return a linear layer from the features of an output of this shape, which begins at 0."""
    cells = grid(shape, most)
    width = torch.Size([shape[0], *cells]).numel()
    linear = nn.Linear(width, classes)
    nn.init.zeros_(linear.weight)
    return nn.Sequential(*averaged(shape, (shape[0], *cells)), nn.Flatten(), linear)


def similarity_net(shape: Sequence[int]) -> nn.Sequential:
    """Return the net between an output of this shape and the features that are compared."""
    channels, *sides = shape
    if not sides:
        return nn.Sequential(nn.Linear(channels, channels, bias=False))
    convolution = CONVOLUTIONS[len(sides) - 1](channels, channels, 3, padding=1, bias=False)
    return nn.Sequential(convolution, Deviation() if max(sides) > 1 else nn.Flatten())


class Deviation(nn.Module):
    """The standard deviation of each channel over its positions."""

    def forward(self, a: Tensor) -> Tensor:
        """Return the deviations (B, channels) of a map (B, channels, ...)."""
        return a.flatten(2).std(2)
