"""Dense layers that drive each other both ways: what one takes from below, leads back, and learns from."""

from __future__ import annotations

import torch
from torch import Tensor

from ..batched import add_product
from ..network import Gradients, Network
from ..optimizer import Product
from ..rule import Tensors


class DenseLayer:
    """Block i of a dense network, or of replicas side by side. It holds nothing but the replica's parameters.

    Args:
        net: the network.
        i: the block.
        params: the replica's.
    """

    def __init__(self, net: Network, i: int, params: Tensors) -> None:
        self.dense, self.params = net.dense(i), params
        self.weight = self.dense.weight

    def up(self, x: Tensor) -> Tensor:
        """Return x Wᵀ + b (B, n), of complex x too."""
        if not x.is_complex():
            return self.dense.affine(self.params, x)
        z = _product(x, self.params[self.weight].mT)
        return z if self.dense.bias not in self.params else z.add_(self.params[self.dense.bias].unsqueeze(-2))

    def activated(self, u: Tensor) -> Tensor:
        """Pass the sums u through the activation, in place."""
        return self.dense.activated(u)

    def lead_back(self, u: Tensor, matrix: Tensor, x: Tensor, s: Tensor, scale: complex) -> None:
        """Add scale · s M, which s leads back to the layer's input x, to u in place; M is shaped like W."""
        if s.is_complex():
            u.add_(_product(s, matrix).mul_(scale))
        else:
            add_product(u, s.mT, matrix, scale)

    def gradients(self, x: Tensor, delta: Tensor) -> Gradients:
        """Return the gradients of W and b in Σ δ · (x Wᵀ + b)."""
        grads: Gradients = {self.weight: Product(delta, self.dense.vectors(self.params, x))}
        if self.dense.bias in self.params:
            grads[self.dense.bias] = delta.sum(-2)
        return grads

    def returned(self, dx: Tensor, s: Tensor) -> Product:
        """Return the gradient of M in Σ s · (dx Mᵀ)."""
        return Product(s, dx)

    def uses(self, x: Tensor, share: Tensor) -> Tensor:
        """Return how often each weight is in the Jacobian, once, times the sum of shares (..., B)."""
        return share.sum(-1)[..., None, None]


def _product(s: Tensor, matrix: Tensor) -> Tensor:
    """Return s M of complex s and real M."""
    return torch.complex(s.real @ matrix, s.imag @ matrix)
