"""Optimizers that change one tensor at a time, in place, so that a gradient can be dropped as soon as it is used.

    sgd    v ← μ v + (g + λ w);  w ← w − η v          (μ = 0 keeps no v)
    adam   Kingma & Ba 2015, algorithm 1, with λ w added to g; β = (0.9, 0.999), ε = 1e-8

The gradient of a linear layer's weights is a product of two small matrices, and sgd never makes it: it adds the product
to what is there. Memory lives in `state.slots`, keyed "{parameter}.velocity" and so on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .batched import add_product

if TYPE_CHECKING:
    from .rule import State, Tensors

NAMES = ("sgd", "adam")
BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8


class Product(NamedTuple):
    """A gradient leftᵀ right, (n, m), that need not be made."""

    left: Tensor  # (B, n)
    right: Tensor  # (B, m)


Gradient = Tensor | Product


def made(gradient: Gradient) -> Tensor:
    """Return the gradient as one tensor."""
    return gradient if isinstance(gradient, Tensor) else gradient.left.T @ gradient.right


def add(target: Tensor, gradient: Gradient, scale: float = 1.0) -> None:
    """Add scale · gradient to `target` in place."""
    if isinstance(gradient, Tensor):
        target.add_(gradient, alpha=scale)
    else:
        add_product(target, gradient.left, gradient.right, scale)


def total(a: Gradient, b: Gradient) -> Gradient:
    """Return a + b; a is overwritten unless both are products."""
    if isinstance(a, Product) and isinstance(b, Product):
        return Product(*(torch.cat(pair, -2) for pair in zip(a, b, strict=True)))
    a = made(a)
    add(a, b)
    return a


def slots(name: str, momentum: float, params: Tensors) -> Tensors:
    """Return zeroed memory for `params`: nothing for plain sgd, one copy for momentum, two and a count for adam."""
    kept: Tensors = {}
    for key, p in params.items():
        if name == "adam":
            kept[f"{key}.mean"], kept[f"{key}.square"] = torch.zeros_like(p), torch.zeros_like(p)
            kept[f"{key}.steps"] = torch.zeros((), dtype=p.dtype, device=p.device)
        elif momentum:
            kept[f"{key}.velocity"] = torch.zeros_like(p)
    return kept


def update(name: str, momentum: float, weight_decay: float, state: State, key: str, grad: Gradient, lr: float) -> None:
    """Change `state.params[key]` in place by one step along `grad` (same shape); `grad` may be overwritten."""
    p, memory = state.params[key], state.slots
    if name == "adam":
        grad = made(grad)
        if weight_decay:
            grad.add_(p, alpha=weight_decay)
        mean, square, steps = memory[f"{key}.mean"], memory[f"{key}.square"], memory[f"{key}.steps"]
        steps += 1
        mean.mul_(BETA1).add_(grad, alpha=1 - BETA1)
        square.mul_(BETA2)
        square.copy_(torch.addcmul(square, grad, grad, value=1 - BETA2))  # addcmul_ has no batching rule for vmap
        # One temporary of the parameter's size: the denominator.
        scale = (square / (1 - BETA2**steps)).sqrt_().add_(EPSILON)
        p.sub_(scale.reciprocal_().mul_(mean).mul_(lr / (1 - BETA1**steps)))
    elif momentum:
        velocity = memory[f"{key}.velocity"].mul_(momentum)
        if weight_decay:
            velocity.add_(p, alpha=weight_decay)
        add(velocity, grad)
        p.sub_(velocity, alpha=lr)
    else:
        if weight_decay:
            p.mul_(1 - lr * weight_decay)
        add(p, grad, -lr)
