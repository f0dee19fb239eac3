"""The layers of a block as plain functions of (parameters, input), with what a CPU is fast at.

The module of a layer is asked only for what it computes; its weights come from the dictionaries that rules pass around.
Taking that apart for every batch costs more than a small layer does, so it is done once, here.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .batched import linear
from .graph import transformed

Tensors = dict[str, Tensor]
Layer = Callable[[Tensors, Tensor], Tensor]

# Layers whose output is new memory that no backward pass reads, so that a ReLU may overwrite it.
FRESH = (nn.Linear, nn.Conv2d, nn.MaxPool2d)


def functions_of(block: nn.Sequential, i: int) -> tuple[Layer, ...]:
    """Return the layers of block `i` as functions of (parameters, x)."""
    every = [name for name, _ in block.named_parameters(remove_duplicate=False)]
    if len(every) > len(list(block.parameters())):  # a layer is there twice, and named once
        return (partial(_by_module, block, {name: f"{i}.{name}" for name, _ in block.named_parameters()}),)
    layers, before = [], None
    for name, module in block._modules.items():
        layers.append(_function(module, f"{i}.{name}", type(before) in FRESH))
        before = module
    return tuple(layers)


def _function(module: nn.Module, name: str, fresh: bool) -> Layer:
    plain = not (module._forward_hooks or module._forward_pre_hooks)
    if plain and type(module) is nn.ReLU:
        return _relu_ if fresh else _relu
    if plain and type(module) is nn.Linear:
        return partial(_linear, f"{name}.weight", f"{name}.bias")
    if plain and type(module) is nn.Conv2d:
        return partial(_convolution, module, f"{name}.weight", f"{name}.bias")
    keys = {own: f"{name}.{own}" for own, _ in module.named_parameters()}
    return partial(_by_module, module, keys) if keys else partial(_without_parameters, module)


def _relu(params: Tensors, x: Tensor) -> Tensor:
    return torch.relu(x)


def _relu_(params: Tensors, x: Tensor) -> Tensor:
    return torch.relu_(x)


def _linear(weight: str, bias: str, params: Tensors, x: Tensor) -> Tensor:
    return linear(x, params[weight], params.get(bias))


def _convolution(layer: nn.Conv2d, weight: str, bias: str, params: Tensors, x: Tensor) -> Tensor:
    w = params[weight]
    if x.device.type == "cpu" and torch._C._get_mkldnn_enabled() and not transformed():
        x, w = channels_last(x, w)
    return layer._conv_forward(x, w, params.get(bias))


def _by_module(module: nn.Module, keys: dict[str, str], params: Tensors, x: Tensor) -> Tensor:
    return functional_call(module, {own: params[key] for own, key in keys.items()}, (x,))


def _without_parameters(module: nn.Module, params: Tensors, x: Tensor) -> Tensor:
    return module(x)


def channels_last(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return x (B, C, H, W) and the weights of its convolution, one of them marked as having its channels last.

    One mark is enough for the convolution and all that follows it to keep a pixel's channels together, which oneDNN
    and max-pooling on a CPU are up to twice as fast with. Results differ in rounding alone. One channel is its own
    last: a view marks it. Of many, the weights are copied, for they are smaller.
    """
    if x.shape[1] == 1:
        return x.squeeze(1).unsqueeze(3).permute(0, 3, 1, 2), weight
    if x.is_contiguous(memory_format=torch.channels_last):
        return x, weight
    return x, weight.contiguous(memory_format=torch.channels_last)
