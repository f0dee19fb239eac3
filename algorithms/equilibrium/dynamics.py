"""Layers that drive each other both ways, settling, with or without a nudge at the read-out.

Layer l of H has activities s_l. W_l and b_l are the network's, B_l (shaped like W_l) leads from layer l back to the one
below, with gain γ, and the output block reads s_H, for the loss L. By F(u) = W s + b + γ B s − β ∂L/∂s − u, s = f(u), a
layer is moved to where its own F is 0, u ← u + F(u):

    s_l ← f(s_{l−1} W_lᵀ + b_l + γ s_{l+1} B_{l+1})          l < H
    s_H ← f(s_{H−1} W_Hᵀ + b_H − β ∂L/∂s_H)

A sweep moves them in turn, each by what the last has become: from below without a nudge, so that the first sweep, from
nothing, is the forward pass, and from above with one. What they settle to does not depend on the order. β may be
complex: then the activities are, and f and ∂L/∂s are taken of complex numbers as they stand, without a conjugate.
These are `dense` layers; `convolved` ones have other linear maps in place of W_l, with their transposed.
"""

from __future__ import annotations

from torch import Tensor

from ..network import Network
from ..repeats import alike
from ..rule import Batch, Tensors
from ..softmax import softmax_error
from .convolved import ConvolvedLayer
from .dense import DenseLayer

Layer = DenseLayer | ConvolvedLayer


def layers_of(net: Network, params: Tensors) -> list[Layer]:
    """Return the blocks of a replica as layers that settle on one batch."""
    kind = DenseLayer if net.is_dense else ConvolvedLayer
    return [kind(net, i, params) for i in range(len(net.blocks))]


def back(layer: Layer, i: int) -> str:
    """Return the key of the matrix from layer i back to the one below: W_i where no B_i is learned."""
    return f"{i}.back" if f"{i}.back" in layer.params else layer.weight


def rest(layers: list[Layer], x: Tensor, sweeps: int, gain: float) -> tuple[list[Tensor], Tensor]:
    """Return the activities (B, ...) of the hidden layers after some sweeps, and what the input x does to the first."""
    s, drive = [], layers[0].up(x)
    for i, layer in enumerate(layers[:-1]):
        s.append(layer.activated(layer.up(s[-1]) if i else drive.clone()))
    settle(layers, drive, s, sweeps - 1, gain)
    return s, drive


def settle(
    layers: list[Layer],
    drive: Tensor,
    s: list[Tensor],
    sweeps: int,
    gain: float,
    beta: complex = 0.0,
    top: Batch | None = None,
) -> None:
    """Let the layers sweep; the list of activities is changed, no tensor in it is.

    Args:
        layers: of the whole network, the output block too; B_l is in their parameters as "{l}.back", l ≥ 1, and where
            there is none it is W_l.
        drive: what the input does to the first layer, (B, ...).
        s: activities (B, ...) of the hidden layers, complex if β is.
        sweeps: how many.
        gain: γ.
        beta: β.
        top: labels, and how much each sample's loss counts in L, if β is not 0.
    """
    last = len(s) - 1
    for _ in alike(sweeps):
        for i in range(last, -1, -1) if beta else range(last + 1):
            above = layers[i + 1]
            u = layers[i].up(s[i - 1]) if i else drive.to(s[0].dtype, copy=True)
            if i < last:
                above.lead_back(u, above.params[back(above, i + 1)], s[i], s[i + 1], gain)
            elif beta:
                error = _error(above.up(s[i]), top)
                above.lead_back(u, above.params[above.weight], s[i], error, -beta)
                del error
            s[i] = layers[i].activated(u)
            del u


def _error(z: Tensor, top: Batch) -> Tensor:
    """Return (softmax(z) − y*) · share, of complex scores too; they are overwritten."""
    if not z.is_complex():
        return softmax_error(z, top)
    p = z.sub_(z.real.amax(-1, keepdim=True)).exp_()  # softmax is the same whatever is taken off
    share = top.share().to(p.dtype).unsqueeze(-1)
    return p.div_(p.sum(-1, keepdim=True)).mul_(share).scatter_add_(-1, top.y.unsqueeze(-1), -share)
