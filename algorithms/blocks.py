"""How a Sequential is cut into blocks, and which layers a network may hold."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from torch import nn

# Layers that only reshape belong to the block that wants the new shape, so a hidden block's output keeps its map.
RESHAPING = (nn.Flatten, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)  # by the dimensions of a map, less one
NORMS = (nn.GroupNorm, nn.LayerNorm, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.LocalResponseNorm)


class NetworkError(ValueError):
    """A network cannot be used; the message says why and what to do."""


def blocks_of(sequential: nn.Module) -> list[nn.Sequential]:
    """Cut a Sequential into blocks: its children if all are Sequentials, else one block per weighted layer."""
    if not isinstance(sequential, nn.Sequential):
        raise NetworkError(f"a model must be an nn.Sequential of layers or blocks, not {type(sequential).__name__}")
    for module in sequential.modules():
        _refuse(module)
    children = list(sequential)
    if children and all(isinstance(child, nn.Sequential) for child in children):
        return [_named(block) for block in children]
    groups: list[list[nn.Module]] = [[]]
    for layer in children:
        weighted = any(True for _ in layer.parameters()) and not isinstance(layer, NORMS)
        current_is_full = any(True for m in groups[-1] for _ in m.parameters())
        if current_is_full and (weighted or isinstance(layer, RESHAPING)):
            groups.append([])
        groups[-1].append(layer)
    if not any(True for m in groups[-1] for _ in m.parameters()) and len(groups) > 1:
        groups[-2].extend(groups.pop())  # a reshaping layer at the very end
    if not any(True for _ in sequential.parameters()):
        raise NetworkError("the model has no parameters to train")
    return [_named(group) for group in groups]


def _named(layers: Sequence[nn.Module] | nn.Sequential) -> nn.Sequential:
    """Return the layers as a Sequential whose children are named after their types: linear, relu, conv2d, conv2d_2."""
    named, seen = [], {}
    for layer in layers:
        name = type(layer).__name__.lower()
        seen[name] = seen.get(name, 0) + 1
        named.append((name if seen[name] == 1 else f"{name}_{seen[name]}", layer))
    return nn.Sequential(OrderedDict(_pooled_first(named)))


def _pooled_first(layers: list[tuple[str, nn.Module]]) -> list[tuple[str, nn.Module]]:
    """Put max-pooling before the ReLU that it follows: the same bits, forward and backward, of a smaller map.

    The largest of max(z, 0) is max(the largest z, 0); and where no z is above 0 the gradient is 0 either way.
    """
    layers = list(layers)
    for i in range(1, len(layers)):
        relu, pool = layers[i - 1][1], layers[i][1]
        if type(relu) is nn.ReLU and type(pool) is nn.MaxPool2d and not pool.return_indices:
            layers[i - 1], layers[i] = layers[i], layers[i - 1]
    return layers


def _refuse(module: nn.Module) -> None:
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        raise NetworkError(
            f"{type(module).__name__} mixes samples and keeps statistics outside the parameters: use nn.GroupNorm"
        )
    if isinstance(module, nn.modules.dropout._DropoutNd):
        raise NetworkError(
            f"{type(module).__name__} draws from the global generator, so runs would not repeat: take it out"
        )
    if any(True for _ in module.buffers(recurse=False)):
        raise NetworkError(f"{type(module).__name__} keeps state outside the parameters: use a layer without buffers")


def describe(block: nn.Sequential) -> str:
    """Return the names of a block's layers: conv2d-maxpool2d-relu."""
    return "-".join(name for name, _ in block.named_children())
