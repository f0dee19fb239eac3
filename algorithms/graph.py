"""Derivatives by autograd: plain, or by torch.func where one of its transforms (vmap over clients) is at work.

Both give the same numbers. torch.func.vjp works under a transform, and costs about half a millisecond a call without.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack
from torch.func import jvp, vjp

Tensors = dict[str, Tensor]


def transformed() -> bool:
    """Return whether this runs inside a transform of torch.func."""
    return peek_interpreter_stack() is not None


def gradients(objective: Callable[[Tensors], tuple[Tensor, Any]], params: Tensors) -> tuple[Tensors, Any]:
    """Return the gradients of a 0-dim objective in `params`, and what it returned beside, which has no graph.

    What the backward pass has used is free at once.
    """
    if transformed():
        # Not torch.func.grad: that keeps the backward pass for a second derivative, up to twice the memory.
        value, pull, beside = vjp(objective, params, has_aux=True)
        return pull(torch.ones_like(value), retain_graph=False, create_graph=False)[0], beside
    with torch.enable_grad():
        leaves = _leaves(params)
        value, beside = objective(leaves)
    return _backward(value, leaves, torch.ones_like(value)), beside


def pullback(
    run: Callable[[Tensors, Tensor], Tensor], params: Tensors, x: Tensor, wrt_input: bool
) -> tuple[Tensor, Callable[[Tensor], Tensors | tuple[Tensors, Tensor]]]:
    """Return a = run(params, x), and the function that pulls a gradient in `a` back to `params`, once.

    Args:
        run: the function.
        params: what it has gradients in.
        x: its input (B, ...).
        wrt_input: the function returned gives (gradients in params, gradient in x) instead of the former alone.
    """
    waiting: list[Tensor] = []

    # The graph ends in a number whose gradient a hook replaces: the backward pass of `a` itself would keep `a` and its
    # gradient to the end. That of a sum stores nothing.
    def ended(params: Tensors, x: Tensor = x) -> tuple[Tensor, Tensor]:
        a = run(params, x)
        if a.requires_grad:
            a.register_hook(lambda _: waiting.pop())
        return a.sum(), a

    if transformed():
        end, backward, a = vjp(ended, *((params, x) if wrt_input else (params,)), has_aux=True)

        def pull(gradient: Tensor) -> Tensors | tuple[Tensors, Tensor]:
            waiting.append(gradient)
            del gradient
            pulled = backward(end, retain_graph=False, create_graph=False)
            return pulled if wrt_input else pulled[0]

        return a, pull

    with torch.enable_grad():
        leaves = _leaves(params)
        root = x.detach().requires_grad_() if wrt_input else x
        end, a = ended(leaves, root)
    sources = {**leaves, "": root} if wrt_input else leaves
    del leaves, root

    def pull_plainly(gradient: Tensor) -> Tensors | tuple[Tensors, Tensor]:
        waiting.append(gradient)
        del gradient
        grads = _backward(end, sources, end)  # any number will do, and this one is there
        return (grads, grads.pop("")) if wrt_input else grads

    return a.detach(), pull_plainly


def pushforward(
    run: Callable[[Tensors, Tensor], Tensor], params: Tensors, x: Tensor, tangents: Tensors, dx: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return a = run(params, x) and its derivative along tangents, in one forward pass without a graph.

    Args:
        run: the function.
        params: its parameters.
        x: its input (B, ...).
        tangents: of the parameters.
        dx: of x; None stands for 0.
    """
    # Always by torch.func: plain dual numbers would take maps with their channels last, where GroupNorm has no tangent.
    if dx is None:
        return jvp(lambda params: run(params, x), (params,), (tangents,))
    return jvp(run, (params, x), (tangents, dx))


def _leaves(params: Tensors) -> Tensors:
    return {key: p.detach().requires_grad_() for key, p in params.items()}


def _backward(value: Tensor, leaves: Mapping[str, Tensor], gradient: Tensor) -> Tensors:
    if not value.requires_grad:
        return {key: torch.zeros_like(leaf) for key, leaf in leaves.items()}
    grads = torch.autograd.grad(value, list(leaves.values()), gradient, materialize_grads=True)
    return dict(zip(leaves, grads, strict=True))
