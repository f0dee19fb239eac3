"""Convolutions with pooling that drive each other both ways: what a layer takes from below, leads back, learns from.

A block is f(A(x)), with A: [Flatten, pooling] a weighted layer W x + b (a convolution or dense) [pooling]. f may stand
before max-pooling too, for it grows with its argument: the largest f(z) is f of the largest z. Which input passes a
window of max-pooling is decided once, by what goes up first, and held: chosen anew in every sweep, winners that are led
back what lowers them would take turns with the second best and never settle. So A is linear but for b, of complex
numbers too. With a matrix M in place of W, A[M] x its part that is linear, and Aᵀ[M] s the same transposed,

    what s leads back     Aᵀ[B] s                           from the pooled map to the winners, and back through B
    dW, db                of Σ δ · A(x)                     dB of Σ s · A[B] dx
    ‖A[W] − A[B]‖²        Σ N (W − B)²

N counts the uses of a weight: of a convolution's all places where it reads an input and not the padding, and below
max-pooling once in a window, where the winner is. Average pooling adds several uses up before they are squared: then
there is no N.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..blocks import CONVOLUTIONS, describe
from ..feedback import ways
from ..feedback.transport import Crossing
from ..layers import functions_of
from ..network import ACTIVATIONS, Gradients, Network
from ..optimizer import Gradient, made
from ..rule import RuleError, Tensors
from .pooling import MAXIMA, MEANS, Pooling

WEIGHTED, BENT = (nn.Linear, *CONVOLUTIONS), (nn.ReLU, nn.Tanh)


def check(net: Network, rule: str, counts: bool = False) -> None:
    """Demand, in the name of a rule, blocks that are such a map, with ReLU or tanh but for the last.

    Args:
        net: the network.
        rule: the rule's name.
        counts: demand also that N be known of what is between hidden layers.
    """
    ways.check(net, rule)
    for i, block in enumerate(net.blocks):
        kinds = [type(layer) for layer in block]
        bends = [n for n, kind in enumerate(kinds) if kind in BENT]
        if (
            len(bends) != (i in net.hidden)
            or any(kind not in (nn.Flatten, *WEIGHTED, *MAXIMA, *MEANS, *BENT) for kind in kinds)
            or any(kind in WEIGHTED + MEANS for n in bends for kind in kinds[n:])
            or not _pools_maps(block, net.sizes[i - 1] if i else net.shape)
        ):
            raise RuleError(
                f"{rule} settles hidden layers below a linear output, and block {i} ({describe(block)}) is no such: use"
                " model.activation=tanh, no norm, average pooling before the activation, and max-pooling of maps"
            )
        first = next(kind for kind in kinds if kind in WEIGHTED or kind in MAXIMA)
        if counts and i in net.hidden[1:] and (first in MAXIMA or any(kind in MEANS for kind in kinds)):
            raise RuleError(
                "homeostasis counts uses of weights, which are not to be told where pooling averages, or comes before"
                " a weighted layer: use rule.homeostasis=0 or rule.feedback=tied"
            )


def _pools_maps(block: nn.Sequential, shape: Sequence[int]) -> bool:
    """Return whether max-pooling gets a map (channels, sides) each time, of inputs of this shape."""
    x = torch.empty(1, *shape, device="meta")
    for layer in block:
        if x.dim() != MAXIMA.get(type(layer), x.dim() - 2) + 2:
            return False
        x = layer(x)
    return True


class ConvolvedLayer:
    """Block i of a network that `check` lets pass, at one batch: it holds the winners of max-pooling once it has run.

    Args:
        net: the network.
        i: the block.
        params: the replica's.
    """

    def __init__(self, net: Network, i: int, params: Tensors) -> None:
        self.params, self._shape = params, net.sizes[i]
        layers = [(name, layer) for name, layer in net.blocks[i]._modules.items() if not isinstance(layer, BENT)]
        at = next(n for n, (_, layer) in enumerate(layers) if isinstance(layer, WEIGHTED))
        name, self.layer = layers[at]
        self.weight, self.bias = f"{i}.{name}.weight", f"{i}.{name}.bias"
        (self._weighted,) = functions_of(nn.Sequential(OrderedDict([layers[at]])), i)
        self._before, self._after = (Pooling([layer for _, layer in part]) for part in (layers[:at], layers[at + 1 :]))
        self._activation = next((type(layer) for layer in net.blocks[i] if isinstance(layer, BENT)), nn.Identity)

    def up(self, x: Tensor) -> Tensor:
        """Return A(x), of complex x too if it has run before."""
        if x.is_complex():
            unbiased = {key: torch.zeros_like(self.params[key]) for key in (self.bias,) if key in self.params}
            return torch.complex(self.up(x.real), self._mapped(x.imag, self.params | unbiased))
        return self._mapped(x, self.params)

    def activated(self, u: Tensor) -> Tensor:
        """Pass u through the activation, in place."""
        return ACTIVATIONS[self._activation][0](u)

    def lead_back(self, u: Tensor, matrix: Tensor, x: Tensor, s: Tensor, scale: complex) -> None:
        """Add scale · Aᵀ[M] s to u in place; x, the layer's input, says no more than its shape."""
        if s.is_complex():
            parts = (self._crossing(x.real, part).through(matrix) for part in (s.real, s.imag))
            u.add_(torch.complex(*parts).mul_(scale))
        else:
            u.add_(self._crossing(x, s).through(matrix), alpha=scale)

    def gradients(self, x: Tensor, delta: Tensor) -> Gradients:
        """Return the gradients of W and b in Σ δ · A(x)."""
        at = self._crossing(x, delta)
        grads = {self.weight: at.gradient(self.params[self.weight], at.error)}
        if self.bias in self.params:
            units = -1 if isinstance(self.layer, nn.Linear) else 1
            grads[self.bias] = at.error.movedim(units, 0).flatten(1).sum(1)
        return grads

    def returned(self, dx: Tensor, s: Tensor) -> Gradient:
        """Return the gradient of M in Σ s · A[M] dx."""
        return self.gradients(dx, s)[self.weight]

    def uses(self, x: Tensor, share: Tensor) -> Tensor:
        """Return N, its mean over a batch with these shares (B,); x is the layer's input, of any values."""
        weights = share.reshape(-1, *[1] * len(self._shape)).expand(-1, *self._shape)
        at = self._crossing(x, weights)
        return made(at._replace(x=torch.ones_like(at.x)).gradient(self.params[self.weight], at.error))

    def _mapped(self, x: Tensor, params: Tensors) -> Tensor:
        return self._after.up(self._weighted(params, self._before.up(x)))

    def _crossing(self, x: Tensor, s: Tensor) -> Crossing:
        """Return where s, above, crosses the weighted layer on its way back."""
        return Crossing(self.layer, self._after.down(s), self._before.up(x), self._before.down)
