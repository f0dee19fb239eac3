"""What a linear predictor reads of a block, and where on the simplex sparsemax takes its scores."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


def grid(shape: Sequence[int], most: int) -> list[int]:
    """Return the finest grid over the positions of a map (channels, ...) with at most `most` features, if any has."""
    channels, *positions = shape
    cells = 1
    while cells < max(positions, default=1):
        finer = [min(cells + 1, size) for size in positions]
        if channels * math.prod(finer) > most:
            break
        cells += 1
    return [min(cells, size) for size in positions]


def features_of(a: Tensor, most: int) -> Tensor:
    """Return what predictors read of a block's output a (B, ...): (B, n + 1), of mean 0 and variance 1, and a 1."""
    cells = grid(a.shape[1:], most)
    if cells != list(a.shape[2:]):
        pool = (nn.functional.adaptive_avg_pool1d, nn.functional.adaptive_avg_pool2d, nn.functional.adaptive_avg_pool3d)
        a = pool[len(cells) - 1](a, cells)
    a = a.flatten(1)
    return nn.functional.pad(nn.functional.layer_norm(a, a.shape[1:]), (0, 1), value=1.0)


def sparsemax(z: Tensor) -> Tensor:
    """Return the point of the probability simplex that is nearest to each row of z (B, C)."""
    ordered = z.sort(1, descending=True)[0]
    places = torch.arange(1, z.shape[1] + 1, dtype=z.dtype, device=z.device)
    excess = ordered.cumsum(1) - 1
    size = (places * ordered > excess).sum(1, keepdim=True)
    threshold = excess.gather(1, size - 1) / size
    return (z - threshold).relu_()
