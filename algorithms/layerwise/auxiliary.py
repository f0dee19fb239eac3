"""What auxiliary nets are made of: averaged maps, a classifier, and copies of a network's blocks for other inputs."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..blocks import CONVOLUTIONS, describe
from ..network import Network
from ..rule import RuleError

# By the number of dimensions of a map, less one.
POOLS = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)


def classifier(shape: Sequence[int], classes: int) -> nn.Sequential:
    """Return a linear layer for outputs of this shape, maps averaged over their positions."""
    return nn.Sequential(*averaged(shape, (shape[0],)), nn.Linear(shape[0], classes))


def averaged(shape: Sequence[int], wanted: Sequence[int]) -> list[nn.Module]:
    """Return the layers that average a map of `shape` down to the positions of `wanted`, which may have none."""
    if tuple(shape[1:]) == tuple(wanted[1:]):
        return []
    sides = tuple(wanted[1:]) or (1,) * (len(shape) - 1)
    return [POOLS[len(sides) - 1](sides), *[nn.Flatten()] * (len(wanted) == 1)]


def copied(net: Network, sampled: Sequence[int], shape: Sequence[int], rule: str) -> nn.Sequential:
    """Return the structure of new blocks like the `sampled` ones of a network, one after the other, and a classifier.

    What a block reads has the positions that its original's input has: where blocks between were left out, maps are
    averaged down to them. Its channels are those of the block before it, and the block is rebuilt for them.

    Args:
        net: the network.
        sampled: its blocks to copy.
        shape: of the first one's input.
        rule: in whose name a block is refused.
    """
    blocks = []
    for i in sampled:
        reads = (shape[0], *net.sizes[i - 1][1:])
        try:
            block = rebuilt(net.blocks[i], torch.empty(1, *reads, device="meta"))
        except (RuntimeError, ValueError) as error:
            raise RuleError(
                f"{rule} copies block {i} ({describe(net.blocks[i])}) for inputs of shape {reads}, and cannot: {error}"
            ) from None
        blocks.append(nn.Sequential(*averaged(shape, reads), *block))
        shape = net.sizes[i]
    return nn.Sequential(*blocks, classifier(shape, net.classes))


def rebuilt(layer: nn.Module, x: Tensor) -> nn.Module:
    """Return the structure of a layer like this one that reads x (1, channels, ...), on the meta device.

    Convolutions, linear layers, group norms and Sequentials of them are made for the channels of x, and so is a layer
    with a method `rebuilt(channels)`, which returns the new one (see `Residual`). Others are copied as they are. What
    has parameters of its own must draw them in a method `reset_parameters()`, as PyTorch's layers do.
    """
    channels = x.shape[1]
    with torch.device("meta"):
        if isinstance(layer, nn.Sequential):
            made: list[nn.Module] = []
            for child in layer:
                x = made[-1](x) if made else x
                made.append(rebuilt(child, x))
            return nn.Sequential(*made)
        if hasattr(layer, "rebuilt"):
            return _drawing(layer.rebuilt(channels))
        if type(layer) is nn.Linear:
            return nn.Linear(x.shape[-1], layer.out_features, layer.bias is not None)
        if isinstance(layer, nn.GroupNorm):
            return type(layer)(layer.num_groups, channels, layer.eps, layer.affine)
        if type(layer) in CONVOLUTIONS:
            names = ("out_channels", "kernel_size", "stride", "padding", "dilation", "groups")
            how = {name: getattr(layer, name) for name in names}
            return type(layer)(channels, **how, bias=layer.bias is not None, padding_mode=layer.padding_mode)
    return copy.deepcopy(_drawing(layer))


def _drawing(layer: nn.Module) -> nn.Module:
    """Return the layer if all in it that has parameters can draw them."""
    for m in layer.modules():
        if any(True for _ in m.parameters(recurse=False)) and not hasattr(m, "reset_parameters"):
            raise ValueError(f"{type(m).__name__} draws no weights: give it a method reset_parameters()")
    return layer


def drawn(structure: nn.Sequential) -> nn.Sequential:
    """Return a copy of a structure with weights, which its layers draw themselves."""
    made = copy.deepcopy(structure)
    for layer in reversed(list(made.modules())):  # what holds others has the last word
        for name, p in layer.named_parameters(recurse=False):
            setattr(layer, name, nn.Parameter(torch.empty(p.shape, dtype=p.dtype)))
        if hasattr(layer, "reset_parameters"):
            layer.reset_parameters()
    return made
