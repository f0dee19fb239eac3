"""Pooling and reshaping as linear maps: max-pooling is one once its winners are held."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..graph import pullback

MAXIMA = {nn.MaxPool1d: 1, nn.MaxPool2d: 2, nn.MaxPool3d: 3, nn.AdaptiveMaxPool2d: 2}  # and the sides of their maps
MEANS = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d)


class Pooling:
    """A row of such layers. The first batch that goes up decides who wins, in each sample; later ones are its equals.

    It holds 8 bytes for each number that max-pooling makes.

    Args:
        layers: pooling of `MAXIMA` and `MEANS`, and `nn.Flatten`.
    """

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        self._layers = tuple(layers)
        self._held: list[tuple[tuple[int, ...], tuple[int, ...], Tensor | None]] = []  # shapes in and out, winners

    def up(self, x: Tensor) -> Tensor:
        """Return what the layers make of x (B, ...)."""
        for n, layer in enumerate(self._layers):
            if n == len(self._held):
                x = self._first(layer, x)
            elif (winners := self._held[n][2]) is None:
                x = layer(x)
            else:
                x = x.flatten(2).gather(2, winners).view(self._held[n][1])
        return x

    def down(self, s: Tensor) -> Tensor:
        """Return the transposed map of s, like what the layers make, to what is like their input."""
        for layer, (shape, _, winners) in zip(reversed(self._layers), reversed(self._held), strict=True):
            if winners is not None:
                spread = s.new_zeros(*shape[:2], torch.Size(shape[2:]).numel())
                s = spread.scatter_add_(2, winners, s.flatten(2)).view(shape)
                del spread
            elif isinstance(layer, nn.Flatten):
                s = s.reshape(shape)
            else:  # a mean is linear: where it is pulled back does not matter
                s = pullback(lambda none, x, layer=layer: layer(x), {}, s.new_zeros(shape), True)[1](s)[1]
        return s

    def _first(self, layer: nn.Module, x: Tensor) -> Tensor:
        winners = None
        if type(layer) in MAXIMA:
            layer = copy.copy(layer)
            layer.return_indices = True
            a, winners = layer(x)
            winners = winners.flatten(2)
        else:
            a = layer(x)
        self._held.append((x.shape, a.shape, winners))
        return a
