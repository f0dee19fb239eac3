"""A network that runs the other way: from class rows down to the shape of the input, one layer a block.

Below block l of the network stands its mirror, which has weights V_l and no bias:

    linear, n inputs                       b_{l−1} = f(V_l b_l)
    linear on a map averaged to one cell   b_{l−1} = f(V_l b_l) in every cell
    convolution                            b_{l−1} = f(V_l ∗ up(b_l))      (padded to keep its size)

where up repeats the nearest cell until the map is as large as the block's input, whatever stride or pooling made it
smaller, and f is the activation of block l − 1; none follows b_0, the mirror of an input.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn.functional import conv2d, interpolate

from ..blocks import describe
from ..models import ACTIVATIONS
from ..network import Network
from ..rule import RuleError


class Mirror(NamedTuple):
    """What leads from the features above a block to those below it; features (N, n) are rows, flattened maps too."""

    activation: nn.Module  # of the block, which follows the mirror of the block above
    weight: tuple[int, ...]  # the shape of V: (inputs, outputs), and of a convolution (inputs, outputs, *kernel)
    below: tuple[int, ...]  # the shape of one sample that the block takes
    above: tuple[int, ...]  # and of what it makes of it

    def run(self, weight: Tensor, b: Tensor) -> Tensor:
        """Return the sums below the block (N, inputs) of features above it (N, outputs)."""
        if weight.dim() > 2:
            b = b.unflatten(1, self.above)
            if self.above[1:] != self.below[1:]:
                b = interpolate(b, size=self.below[1:])
            return conv2d(b, weight, padding=[side // 2 for side in self.weight[2:]]).flatten(1)
        z, cells = b @ weight.T, math.prod(self.below) // self.weight[0]
        return z if cells == 1 else z[:, :, None].expand(-1, -1, cells).flatten(1)


def mirrors(net: Network) -> list[Mirror]:
    """Return the mirrors of a network's blocks.

    Raises:
        RuleError: if a block has none.
    """
    found = [_mirror(net, i) for i in range(len(net.blocks))]
    for i, mirror in enumerate(found):
        if mirror is None:
            raise RuleError(
                f"counter-current mirrors dense layers and 2-d convolutions of odd kernels without groups, with an"
                f" activation of model.activation and one max-pooling at most, and block {i} is"
                f" {describe(net.blocks[i])}: use --model mlp, lenet or cnn, or mono-forward for this model"
            )
    return found


def _mirror(net: Network, i: int) -> Mirror | None:
    below, above = net.sizes[i - 1] if i else net.shape, net.sizes[i]
    layers = [layer for layer in net.blocks[i] if not isinstance(layer, nn.Flatten)]
    averaged = bool(layers) and type(layers[0]) is nn.AdaptiveAvgPool2d and layers[0].output_size in (1, (1, 1))
    weighted, *rest = layers[averaged:] or [None]
    if type(weighted) is nn.Linear:
        act, *more = rest or [nn.Identity()]
        vectors = weighted.in_features == (below[0] if averaged else math.prod(below))
        plain = not more and above == (weighted.out_features,) and not any(True for _ in act.parameters())
        return Mirror(act, (weighted.in_features, weighted.out_features), below, above) if vectors and plain else None
    if type(weighted) is not nn.Conv2d or averaged or not _is_mirrored(weighted):
        return None
    if rest and isinstance(rest[0], nn.GroupNorm):
        rest = rest[1:]
    pools = [layer for layer in rest if type(layer) is nn.MaxPool2d and not layer.return_indices]
    acts = [layer for layer in rest if type(layer) in ACTIVATIONS.values()]  # of each number by itself
    if len(above) != 3 or len(pools) > 1 or len(acts) > 1 or len(pools) + len(acts) < len(rest):
        return None
    weight = (weighted.in_channels, weighted.out_channels, *weighted.kernel_size)
    return Mirror(acts[0] if acts else nn.Identity(), weight, below, above)


def _is_mirrored(layer: nn.Conv2d) -> bool:
    """Return whether a convolution with as many channels the other way round and padding can keep a map's size."""
    return layer.groups == 1 and layer.dilation == (1, 1) and all(side % 2 for side in layer.kernel_size)
