"""A signal times the input that it came with: the products that rules without derivatives learn by."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..graph import pullback
from ..layers import functions_of
from ..network import Gradients, Network
from ..optimizer import Product

Tensors = dict[str, Tensor]
Correlate = Callable[[Tensor], Gradients]  # of a signal shaped like a block's output

ACTIVATIONS = nn.ReLU.__module__  # where PyTorch keeps them all


def correlation(net: Network, i: int, params: Tensors, x: Tensor) -> tuple[Tensor, Correlate]:
    """Run block `i`; return its output, and a function that correlates a signal with x, once.

    It is `Network.block_vjp` with activations of slope 1: of a linear layer, dW = signalᵀ x and db = Σ signal. What
    else a block holds takes the signal back as autograd does: max-pooling gives it to the winner, and a convolution
    sums over positions what it has of the signal times the patch of x. Correlate before the parameters change.
    """
    dense = net.dense(i)
    if dense is None:
        own = {key: params[key] for key in net.keys(i)}
        return pullback(lambda own, x: _opened(net.blocks[i], i, own, x), own, x, wrt_input=False)
    flat = dense.vectors(params, x)

    def correlate(signal: Tensor) -> Gradients:
        grads: Gradients = {dense.weight: Product(signal, flat)}
        return grads | ({dense.bias: signal.sum(-2)} if dense.bias in params else {})

    return net.block(i, params, flat), correlate


def _opened(block: nn.Sequential, i: int, params: Tensors, x: Tensor) -> Tensor:
    """Run a block whose activations have slope 1, if they are layers of its own and not inside one."""
    layers = functions_of(block, i)
    modules = list(block._modules.values()) if len(layers) == len(block._modules) else [block]
    for module, layer in zip(modules, layers, strict=True):
        if type(module).__module__ == ACTIVATIONS and not any(True for _ in module.parameters()):
            a = layer(params, x.detach())
            x = (x - x.detach()).add_(a)  # 0 + a
        else:
            x = layer(params, x)
    return x


def portions(share: Tensor, a: Tensor) -> Tensor:
    """Return each sample's share (..., B) per position of a (..., B, n) or (B, channels, ...), to multiply it with."""
    if a.dim() == share.dim() + 1:
        return share.unsqueeze(-1)
    return (share / a[0, 0].numel()).view(-1, *[1] * (a.dim() - 1))


def added(one: Gradients, other: Gradients) -> Gradients:
    """Return the sum of gradients; two products become one over the samples of both."""
    return {key: _sum(gradient, other[key]) for key, gradient in one.items()}


def _sum(a: Tensor | Product, b: Tensor | Product) -> Tensor | Product:
    if isinstance(a, Tensor):
        return a + b
    return Product(torch.cat([a.left, b.left], -2), torch.cat([a.right, b.right], -2))
