"""Seeded random sign directions, the same bits on every machine.

Direction k of a step is a vector of ±1 over all parameters. Its bits come from NumPy's counter-based Philox generator
(a stream that NumPy's compatibility policy fixes), keyed by the run seed and countered by (round, step, client, k), so
any replica makes any direction again from five integers. Signs are drawn in slices: a direction never costs a model's
memory. Adding c·z with z = ±1 rounds once, fused or not, so an update replays bit for bit on any IEEE-754 device.

    layout: tensors in the order of the dictionary, each beginning at a multiple of 256 signs
    bits:   little-endian 64-bit words of Philox, lowest bit first, 1 → +1 and 0 → −1
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .seeds import Place, Purpose, generator

Tensors = dict[str, Tensor]
Layout = tuple[tuple[str, int], ...]  # (key, number of values) of each tensor
BLOCK = 256  # signs in one Philox output of four 64-bit words
SHARED = -1  # in place of a client: all have the same


@dataclass(frozen=True)
class Directions:
    """The directions of one step of one round: z_0, z_1, … over a replica's parameters.

    Attributes:
        seed: the run seed.
        round: the server's round.
        step: the local step within the round.
        client: whose directions they are, or `SHARED`.
        candidates: which candidates of a pool they are; empty: they are new ones.
        base: which pool; a run may draw a new one from time to time.
    """

    seed: int
    round: int
    step: int
    client: int = SHARED
    candidates: tuple[int, ...] = ()
    base: int = 0

    @classmethod
    def at(cls, place: Place, count: int, pool: int, base: int = 0) -> Directions:
        """Return the directions of a place: new ones, or `count` different candidates of a pool (0: there is none)."""
        chosen: tuple[int, ...] = ()
        if pool:
            draws = generator(place.seed, Purpose.CANDIDATES, place.round, place.client + 1, place.step)
            chosen = tuple(draws.choice(pool, count, replace=False).tolist())
        return cls(place.seed, place.round, place.step, place.client, chosen, base)

    @classmethod
    def of_pool(cls, seed: int, pool: int, base: int = 0) -> Directions:
        """Return all candidates of a pool, in their order."""
        return cls(seed, 0, 0, candidates=tuple(range(pool)), base=base)

    def slices(self, params: Tensors, k: int, chunk: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (view of some parameters, their signs ±1) for direction k, drawing at most `chunk` signs at a time.

        Small tensors share a draw: what a slice costs beyond its signs is the same for any size. Whoever keeps what is
        yielded keeps a whole draw.

        Args:
            params: the parameters, in the order of the layout.
            k: the direction.
            chunk: signs drawn at a time, at most.
            start: blocks of signs of the direction that lie before these parameters.
        """
        groups = groups_of(layout_of(params), chunk)
        stream = self._stream(k, start)
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

    def tensors(self, params: Tensors, k: int, keys: Sequence[str], chunk: int) -> Tensors:
        """Return z_k of some of `params`, tensors like them; `keys` are neighbours, in their order."""
        if not keys:
            return {}
        before = itertools.takewhile(lambda key: key != keys[0], params)
        start = sum(-(-params[key].numel() // BLOCK) for key in before)
        wanted = {key: params[key] for key in keys}
        # Of replicas batched by vmap, one for all: not empty_like.
        made = {key: torch.empty(p.shape, dtype=p.dtype, device=p.device) for key, p in wanted.items()}
        for part, signs in self.slices(made, k, chunk, start):
            part.copy_(signs)
            del part, signs
        return made

    def products(self, layout: Layout, count: int, chunk: int) -> np.ndarray:
        """Return the inner products z_j · z_k, (count, count) float64 of exact integers.

        Two signs differ where their bits do, so no sign is made: `count` rows of chunk / 8 bytes at a time.
        """
        products, streams = np.zeros((count, count)), [self._stream(k) for k in range(count)]
        for group in self.visited(groups_of(layout, chunk)):
            used = np.concatenate([np.arange(part.signs) < part.size for part in group])
            mask = np.packbits(used, bitorder="little").view("<u8")
            words = np.stack([stream.random_raw(len(mask)) & mask for stream in streams])
            for k in range(count):
                products[k] += used.sum() - 2.0 * np.bitwise_count(words ^ words[k]).sum(1)
        return products

    def together(self, count: int, abreast: int) -> Iterator[range]:
        """Yield k = 0 … count − 1, so many at a time: loops over directions ask here, that a plan can make short."""
        for start in range(0, count, abreast):
            yield range(start, min(start + abreast, count))

    def each(self, count: int) -> Iterator[int]:
        """Yield k = 0 … count − 1, one at a time."""
        return (group.start for group in self.together(count, 1))

    def visited(self, groups: list[list[Part]]) -> list[list[Part]]:
        """Return the groups of slices that are drawn: all of them, but in a plan."""
        return groups

    def _stream(self, k: int, start: int = 0) -> np.random.Philox:
        # Word 0 of the counter runs through the direction, a block at a time; the others name it.
        if self.candidates:
            counter = (start, self.candidates[k], self.base, 0)
            return np.random.Philox(key=self.seed << 8 | Purpose.CANDIDATES, counter=counter)
        name = (self.client + 1) << 32 | k
        return np.random.Philox(key=self.seed << 8 | Purpose.DIRECTIONS, counter=(start, name, self.step, self.round))


class Part(NamedTuple):
    """Some values of one tensor."""

    key: str
    start: int
    size: int

    @property
    def signs(self) -> int:
        """Signs drawn for them."""
        return -(-self.size // BLOCK) * BLOCK


def layout_of(params: Tensors) -> Layout:
    """Return the tensors that directions run through."""
    return tuple((key, p.numel()) for key, p in params.items())


@lru_cache(maxsize=64)
def groups_of(layout: Layout, chunk: int) -> list[list[Part]]:
    """Cut tensors into parts of at most `chunk` values, and group neighbours whose signs fit into it."""
    chunk = max(BLOCK, chunk // BLOCK * BLOCK)
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
