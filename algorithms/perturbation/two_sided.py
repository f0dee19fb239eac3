"""What the two-sided rules of this family share: the losses at w + σ z and w − σ z, under one dropout mask.

Dropout whose masks differ between the two sides drowns their difference, which is of the size σ, in one of the size of
the loss. Here a step has one mask for each hidden block, made again in every pass from the step's place:

    a ← a · m / (1 − p)      m ~ Bernoulli(1 − p), of row j of the batch the same whatever stands below it
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ..directions import Directions
from ..network import Network
from ..rule import Batch, Stats, Tensors, cross_entropy
from ..seeds import Purpose

LEVELS = 65536  # a mask's bit is drawn from 16 random ones


def two_sided(
    loss: Callable[[], tuple[Tensor, Stats]], shift: Callable[[float], None], sigma: float
) -> tuple[Tensor, Tensor, Stats]:
    """Return (loss at w + σ z, loss at w − σ z, stats of the latter), and leave w where it was, within rounding.

    Args:
        loss: returns the loss at the parameters as they are, and its stats.
        shift: adds c · z to the parameters, in place. Three times: each rounds off by half a unit in the last place.
        sigma: σ.
    """
    shift(sigma)
    plus = loss()[0]
    shift(-2 * sigma)
    minus, stats = loss()
    shift(sigma)
    return plus, minus, stats


def loss_at(
    net: Network, params: Tensors, batch: Batch, directions: Directions, dropout: float = 0.0
) -> tuple[Tensor, Stats]:
    """Return the weighted mean cross-entropy and its stats; with dropout, hidden outputs pass the step's masks."""
    if not dropout:
        return cross_entropy(net.forward(params, batch.x), batch)
    x = batch.x
    for i in net.hidden:
        x = net.block(i, params, x)
        x = (x * mask(directions, i, x.shape, dropout).to(x.device)).div_(1 - int(dropout * LEVELS) / LEVELS)
    return cross_entropy(net.block(net.output, params, x), batch)


def mask(directions: Directions, block: int, shape: torch.Size, dropout: float) -> Tensor:
    """Return which outputs of a block are kept, bool, in the step that the directions belong to; `shape` is theirs."""
    name = (directions.client + 1) << 32 | block
    counter = (0, name, directions.step, directions.round)
    stream = np.random.Philox(key=directions.seed << 8 | Purpose.MASK, counter=counter)
    words = stream.random_raw(-(-shape.numel() // 4)).astype("<u8", copy=False)
    kept = words.view("<u2")[: shape.numel()] >= int(dropout * LEVELS)
    return torch.from_numpy(kept).view(shape)
