"""Dropout that several passes of a step share: a mask is made again, of each sample's seed, wherever it is wanted."""

from __future__ import annotations

import torch
from torch import Tensor

from ..noise import words

LEVELS = 65536  # a mask's bit is drawn from 16 random ones


def thinned(a: Tensor, seeds: Tensor, stream: int, dropout: float) -> Tensor:
    """Return a · m / (1 − p) for m ~ Bernoulli(1 − p), the same for the same seeds and stream.

    Args:
        a: activity (..., B, n) or (B, channels, ...).
        seeds: of the samples, (..., B) int64.
        stream: of their words; see `noise`.
        dropout: p.
    """
    threshold, shape = int(dropout * LEVELS), a.shape[seeds.dim() :]
    halves = words(seeds, stream, -(-shape.numel() // 4)).view(torch.int16)[..., : shape.numel()]
    kept = (halves >= threshold - LEVELS // 2).view(a.shape)
    del halves
    return (a * kept).div_(1 - threshold / LEVELS)
