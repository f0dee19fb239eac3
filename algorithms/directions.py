"""Seeded random sign directions, the same bits on every machine.

Direction k of a step is a vector of ±1 over all parameters. Its bits come from NumPy's counter-based Philox generator
(a stream that NumPy's compatibility policy fixes), keyed by the run seed and countered by (round, step, k), so any
replica makes any direction again from four integers. Signs are drawn in slices: a direction never costs a model's
memory. Adding c·z with z = ±1 rounds once, fused or not, so an update replays bit for bit on any IEEE-754 device.

    layout: tensors in the order of the dictionary, each beginning at a multiple of 256 signs
    bits:   little-endian 64-bit words of Philox, lowest bit first, 1 → +1 and 0 → −1
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .seeds import Purpose

Tensors = dict[str, Tensor]
BLOCK = 256  # signs in one Philox output of four 64-bit words


@dataclass(frozen=True)
class Directions:
    """The shared directions of one step of one round: z_0, z_1, … over a replica's parameters.

    Attributes:
        seed: the run seed.
        round: the server's round.
        step: the local step within the round.
    """

    seed: int
    round: int
    step: int

    def slices(self, params: Tensors, k: int, chunk: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (view of some parameters, their signs ±1) for direction k, drawing at most `chunk` signs at a time.

        Small tensors share a draw: what a slice costs beyond its signs is the same for any size. Whoever keeps what is
        yielded keeps a whole draw.
        """
        chunk = max(BLOCK, chunk // BLOCK * BLOCK)
        groups = groups_of(tuple((key, p.numel()) for key, p in params.items()), chunk)
        stream = self._stream(k)
        for group in self.visited(groups):
            signs = _signs(stream, sum(part.signs for part in group))
            offset = 0
            for part in group:
                values = params[part.key].view(-1)[part.start : part.start + part.size]
                yield values, signs[offset : offset + part.size].to(device=values.device, dtype=values.dtype)
                offset += part.signs
            del values, signs  # before the next draw

    def add(self, params: Tensors, k: int, c: float | Tensor, chunk: int) -> None:
        """Add c · z_k to `params` in place, slice by slice; c is a number or a 0-dim tensor."""
        for part, signs in self.slices(params, k, chunk):
            if isinstance(c, Tensor):
                part.add_(signs * c)
            else:
                part.add_(signs, alpha=c)
            del part, signs

    def each(self, count: int) -> Iterable[int]:
        """Return k = 0 … count − 1: a loop over directions asks here, so that a plan can make it short."""
        return range(count)

    def visited(self, groups: list[list[Part]]) -> list[list[Part]]:
        """Return the groups of slices that are drawn: all of them, but in a plan."""
        return groups

    def _stream(self, k: int) -> np.random.Philox:
        # Word 0 of the counter runs through the direction; the others name it.
        return np.random.Philox(key=(self.seed << 8 | Purpose.DIRECTIONS), counter=(0, k, self.step, self.round))


class Part(NamedTuple):
    """Some values of one tensor."""

    key: str
    start: int
    size: int

    @property
    def signs(self) -> int:
        """Signs drawn for them."""
        return -(-self.size // BLOCK) * BLOCK


@lru_cache(maxsize=64)
def groups_of(layout: tuple[tuple[str, int], ...], chunk: int) -> list[list[Part]]:
    """Cut tensors (key, values) into parts of at most `chunk` values, and group neighbours whose signs fit into it."""
    groups, group, taken = [], [], 0
    for key, count in layout:
        for start in range(0, count, chunk):
            part = Part(key, start, min(chunk, count - start))
            if taken + part.signs > chunk:
                groups.append(group)
                group, taken = [], 0
            group.append(part)
            taken += part.signs
    return [*groups, group]


def _signs(stream: np.random.Philox, count: int) -> Tensor:
    """Return the next `count` signs as float32; `count` is a multiple of 256."""
    words = stream.random_raw(count // 64).astype("<u8", copy=False)
    bits = np.unpackbits(words.view(np.uint8), bitorder="little")
    return torch.from_numpy(bits).to(torch.float32).mul_(2).sub_(1)


def stream_hash() -> str:
    """Return the SHA-256 of a fixed stretch of signs, by which two machines know that they draw the same."""
    params = {"0.weight": torch.zeros(30, 10), "0.bias": torch.zeros(10)}
    digest = sha256()
    for k in (0, 1, 1000):
        for _, signs in Directions(seed=1, round=2, step=3).slices(params, k, chunk=256):
            digest.update(signs.to(torch.int8).numpy().tobytes())
    return digest.hexdigest()
