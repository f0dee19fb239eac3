"""Products of one replica or of several side by side: stacked along a first axis, or batched by `torch.func.vmap`.

vmap has no fast rule for them: where all operands are batched alike, here they are one batched product.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._C._functorch import _add_batch_dim, get_unwrapped, is_batchedtensor, maybe_get_bdim, maybe_get_level


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return x Wᵀ + b for x (..., m), weight (n, m) and bias (n,) or None; or of stacked ones, x (C, B, m)."""
    if weight.dim() == 3:
        return x @ weight.mT if bias is None else torch.baddbmm(bias[:, None], x, weight.mT)
    if is_batchedtensor(weight) and bias is not None and x.dim() == 2 and (stacked := _stacked(x, weight, bias)):
        x, w, b = stacked
        return _add_batch_dim(torch.baddbmm(b[:, None], x, w.mT), 0, maybe_get_level(weight))
    return torch.nn.functional.linear(x, weight, bias)


def add_product(target: Tensor, left: Tensor, right: Tensor, scale: float) -> None:
    """Add scale · leftᵀ right to `target` (n, m) in place, for left (B, n) and right (B, m), or stacked ones."""
    if target.dim() == 3:
        target.baddbmm_(left.mT, right, alpha=scale)
    elif not is_batchedtensor(target):
        target.addmm_(left.T, right, alpha=scale)
    elif stacked := _stacked(target, left, right):
        target, left, right = stacked
        target.baddbmm_(left.mT, right, alpha=scale)
    else:
        target.add_(left.T @ right, alpha=scale)


def _stacked(*tensors: Tensor) -> list[Tensor] | None:
    """Return what one vmap has batched along the first axis, with that axis; None if it has not batched all so."""
    batched = all(is_batchedtensor(t) and maybe_get_bdim(t) == 0 for t in tensors)
    if batched and len({maybe_get_level(t) for t in tensors}) == 1:
        inner = [get_unwrapped(t) for t in tensors]
        if not any(map(is_batchedtensor, inner)):
            return inner
    return None
