"""Dense layers that drive each other both ways, settling, with or without a nudge at the read-out.

Layer l of H has activities s_l. W_l and b_l are the network's, B_l (shaped like W_l) leads from layer l back to the one
below, with gain γ, and the output block reads s_H, for the loss L. By F(u) = W s + b + γ B s − β ∂L/∂s − u, s = f(u), a
layer is moved to where its own F is 0, u ← u + F(u):

    s_l ← f(s_{l−1} W_lᵀ + b_l + γ s_{l+1} B_{l+1})          l < H
    s_H ← f(s_{H−1} W_Hᵀ + b_H − β ∂L/∂s_H)

A sweep moves them in turn, each by what the last has become: from below without a nudge, so that the first sweep, from
nothing, is the forward pass, and from above with one. What they settle to does not depend on the order. β may be
complex: then the activities are, and f and ∂L/∂s are taken of complex numbers as they stand, without a conjugate.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..batched import add_product
from ..network import Network
from ..repeats import alike
from ..rule import Batch, Tensors
from ..softmax import softmax_error


def back(net: Network, params: Tensors, i: int) -> str:
    """Return the key of the matrix from layer i back to the one below: W_i where no B_i is learned."""
    return f"{i}.back" if f"{i}.back" in params else net.dense(i).weight


def affine(net: Network, i: int, params: Tensors, x: Tensor) -> Tensor:
    """Return x Wᵀ + b of dense block i, of which it takes its activation; x may be complex."""
    dense = net.dense(i)
    if not x.is_complex():
        return dense.affine(params, x)
    z = _product(x, params[dense.weight].mT)
    return z if dense.bias not in params else z.add_(params[dense.bias].unsqueeze(-2))


def rest(net: Network, params: Tensors, x: Tensor, sweeps: int, gain: float) -> tuple[list[Tensor], Tensor]:
    """Return the activities (B, n) of the hidden layers after some sweeps, and what the input x does to the first."""
    s, drive = [], affine(net, 0, params, x)
    for i in net.hidden:
        s.append(net.dense(i).activated(affine(net, i, params, s[-1]) if i else drive.clone()))
    settle(net, params, drive, s, sweeps - 1, gain)
    return s, drive


def settle(
    net: Network,
    params: Tensors,
    drive: Tensor,
    s: list[Tensor],
    sweeps: int,
    gain: float,
    beta: complex = 0.0,
    top: Batch | None = None,
) -> None:
    """Let the layers sweep; the list of activities is changed, no tensor in it is.

    Args:
        net: a dense network.
        params: its weights, and B_l as "{l}.back", l ≥ 1; where there is none it is W_l.
        drive: what the input does to the first layer, (B, n).
        s: activities (B, n) of the hidden layers, complex if β is.
        sweeps: how many.
        gain: γ.
        beta: β.
        top: labels, and how much each sample's loss counts in L, if β is not 0.
    """
    last = len(net.hidden) - 1
    for _ in alike(sweeps):
        for i in reversed(net.hidden) if beta else net.hidden:
            u = affine(net, i, params, s[i - 1]) if i else drive.to(s[0].dtype, copy=True)
            if i < last:
                _add(u, s[i + 1], params[back(net, params, i + 1)], gain)
            elif beta:
                error = _error(affine(net, net.output, params, s[i]), top)
                _add(u, error, params[net.dense(net.output).weight], -beta)
                del error
            s[i] = net.dense(i).activated(u)
            del u


def _error(z: Tensor, top: Batch) -> Tensor:
    """Return (softmax(z) − y*) · share, of complex scores too; they are overwritten."""
    if not z.is_complex():
        return softmax_error(z, top)
    p = z.sub_(z.real.amax(-1, keepdim=True)).exp_()  # softmax is the same whatever is taken off
    share = top.share().to(p.dtype).unsqueeze(-1)
    return p.div_(p.sum(-1, keepdim=True)).mul_(share).scatter_add_(-1, top.y.unsqueeze(-1), -share)


def _product(s: Tensor, matrix: Tensor) -> Tensor:
    """Return s M of complex s and real M."""
    return torch.complex(s.real @ matrix, s.imag @ matrix)


def _add(u: Tensor, s: Tensor, matrix: Tensor, scale: complex) -> None:
    """Add scale · s M to u in place, of real M."""
    if s.is_complex():
        u.add_(_product(s, matrix).mul_(scale))
    else:
        add_product(u, s.mT, matrix, scale)
