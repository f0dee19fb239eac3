"""Where in each block the error crosses a weighted layer, and which networks have such a place."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from typing import NamedTuple

from torch import nn

from ..blocks import CONVOLUTIONS, NORMS, describe
from ..layers import Layer, functions_of
from ..network import Network
from ..rule import RuleError


class Way(NamedTuple):
    """What is to be known of a block."""

    layer: nn.Module  # the weighted one; its weights are elsewhere
    weight: str  # their key
    before: tuple[Layer, ...]  # the layers before it, as functions of (parameters, x)
    onward: tuple[Layer, ...]  # itself and the layers after it


def check(net: Network, rule: str) -> None:
    """Demand, in the name of a rule, blocks of one dense layer or convolution each."""
    for i, block in enumerate(net.blocks):
        weighted = [m for m in block if _is_weighted(m)]
        first = next((m for m in block if _has_parameters(m)), None)
        block_is = f"block {i} ({describe(block)})"
        if len(weighted) != 1:
            raise RuleError(
                f"{rule} sends the error through one weighted layer a block, and {block_is} has {len(weighted)}:"
                " make a block of each, or use backprop-fused"
            )
        if type(weighted[0]) not in (nn.Linear, *CONVOLUTIONS):
            raise RuleError(
                f"{rule} sends the error through nn.Linear and nn.Conv1d to 3d, and {block_is} has none:"
                " use backprop-fused"
            )
        if first is not weighted[0] or len(set(block)) < len(block):
            raise RuleError(
                f"{rule} cannot tell where the error crosses in {block_is}: put norms after the weighted layer, and no"
                " layer there twice"
            )
        if not isinstance(weighted[0], nn.Linear) and (
            isinstance(weighted[0].padding, str) or weighted[0].padding_mode != "zeros"
        ):
            raise RuleError(
                f"{rule} sends the error through zero padding, and {block_is} pads otherwise: give a number"
            )


_WAYS: weakref.WeakKeyDictionary[Network, tuple[Way, ...]] = weakref.WeakKeyDictionary()


def ways(net: Network) -> tuple[Way, ...]:
    """Return what is to be known of each block of a network that passes `check`, found once for each network."""
    if net not in _WAYS:
        _WAYS[net] = tuple(_way(block, i) for i, block in enumerate(net.blocks))
    return _WAYS[net]


def _way(block: nn.Sequential, i: int) -> Way:
    layers = list(block._modules.items())
    at = next(n for n, (_, layer) in enumerate(layers) if _is_weighted(layer))
    before, onward = (functions_of(nn.Sequential(OrderedDict(part)), i) for part in (layers[:at], layers[at:]))
    name, layer = layers[at]
    return Way(layer, f"{i}.{name}.weight", before, onward)


def _has_parameters(layer: nn.Module) -> bool:
    return any(True for _ in layer.parameters())


def _is_weighted(layer: nn.Module) -> bool:
    return _has_parameters(layer) and not isinstance(layer, NORMS)
