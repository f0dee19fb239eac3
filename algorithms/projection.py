"""A model's change in K numbers, whatever rule has made it.

Y. Shu, W. Hu, S.-K. Ng, B. K. H. Low, F. Yu, "Ferret: Federated Full-Parameter Tuning at Scale for Large Language
Models", arXiv 2409.06277, ICML 2025: a change Δ is projected, block by block, on random directions that everybody can
make again from a seed. Here a block has one direction: the signs z of a step, cut into K pieces z_1 … z_K of d_k
neighbouring values, each within one tensor,

    encode:  s_k = z_k · Δ / d_k        decode:  w ← w + Σ_k d_k^p s_k z_k        Σ_k d_k = d

Pieces do not overlap, so with p = 0 this is the orthogonal projection. It keeps the part K/d of ‖Δ‖² on average, as
one on K directions of d signs each does, but needs no Gram matrix, and d signs where that needs K·d. Where a piece is
one value nothing is lost. With p = 1 it is unbiased, and ‖Δ‖ grows by √(d/K); with p = ½ it keeps its length.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from heapq import heapify, heappop, heapreplace
from itertools import pairwise
from math import sqrt
from typing import NamedTuple

import torch
from torch import Tensor

from .directions import BLOCK, Directions, Layout, Tensors, layout_of
from .rule import RuleError

CHUNK = 1024  # values at a time, about 40 bytes each


def basis(seed: int, server_round: int) -> Directions:
    """Return the signs of a round, the same for all clients."""
    return Directions(seed, server_round, step=0)


def encode(params: Tensors, origin: Tensors, directions: Directions, count: int) -> Tensor:
    """Return params − origin as numbers (min(count, d),) float32, on the CPU.

    Sums run in float64 in the order of the values: on a CPU, their bits depend on no number of threads.

    Raises:
        RuleError: if there are fewer directions than tensors.
    """
    sizes = torch.tensor(_sizes(layout_of(params), count), dtype=torch.float64)
    sums = torch.zeros_like(sizes, device=next(iter(params.values())).device)
    for key, part in _parts(params, directions, count):
        change = (part.values - origin[key].view(-1)[part.place]).mul_(part.signs)
        sums.index_add_(0, part.owners, change.double())
        del part, change
    return sums.cpu().div_(sizes).float()


def decode(params: Tensors, numbers: Tensor, directions: Directions, count: int, power: float = 0.0) -> None:
    """Add what `encode` kept of a change, times d_k^power, to `params`, in place: with the same bits on every machine.

    Args:
        params: the model that the change was of.
        numbers: (min(count, d),) float32.
        directions: those that it was encoded on.
        count: what `encode` was given.
        power: p, one of 0, ½ and 1.
    """
    sizes = torch.tensor(_sizes(layout_of(params), count), dtype=torch.float64)
    scale = {0.0: torch.ones_like(sizes), 0.5: sizes.sqrt(), 1.0: sizes}[power]
    numbers = (numbers.double() * scale).float()
    for _, part in _parts(params, directions, count):
        part.values.add_(part.signs * numbers[part.owners])
        del part


class _Part(NamedTuple):
    """Some values of one tensor."""

    values: Tensor  # (n,) a view
    signs: Tensor  # (n,)
    place: slice  # in the flattened tensor
    owners: Tensor  # (n,) int64, the piece of each value


def _parts(params: Tensors, directions: Directions, count: int) -> Iterator[tuple[str, _Part]]:
    """Yield (key, part) of all values, in their order; whoever keeps one keeps a draw."""
    piece = block = 0  # that the next tensor begins with
    for key, pieces in pieces_of(layout_of(params), count).items():
        p, start = params[key], 0
        for values, signs in directions.slices({key: p}, 0, CHUNK, block):
            stop = start + len(values)
            owners = torch.arange(start + 1, stop + 1, device=p.device)  # value j is of piece ⌈(j + 1) K / d⌉ − 1
            owners.mul_(pieces).sub_(1).div_(p.numel(), rounding_mode="floor").add_(piece)
            yield key, _Part(values, signs, slice(start, stop), owners)
            start = stop
            del values, signs, owners
        piece, block = piece + pieces, block + -(-p.numel() // BLOCK)


def pieces_of(layout: Layout, count: int) -> dict[str, int]:
    """Return into how many pieces each tensor is cut: at least one, at most one a value, min(count, d) in all.

    In proportion to the square root of its size. Ferret deals in proportion to ‖Δ‖ of a block, which is that where all
    values change alike; in proportion to size, biases and last layers are lost among many weights.

    Raises:
        RuleError: if there are fewer directions than tensors.
    """
    return dict(_dealt(layout, count))


@lru_cache(maxsize=64)
def _dealt(layout: Layout, count: int) -> tuple[tuple[str, int], ...]:
    if count < len(layout):
        raise RuleError(f"{count} directions for {len(layout)} tensors: use strategy.directions ≥ {len(layout)}")
    dealt = {key: 1 for key, _ in layout}
    next_of = [(1 / sqrt(size), place, key, size) for place, (key, size) in enumerate(layout) if size > 1]
    heapify(next_of)
    for _ in range(min(count, sum(size for _, size in layout)) - len(layout)):
        _, place, key, size = next_of[0]
        dealt[key] += 1
        if dealt[key] < size:
            heapreplace(next_of, (dealt[key] / sqrt(size), place, key, size))
        else:
            heappop(next_of)
    return tuple(dealt.items())


@lru_cache(maxsize=64)
def _sizes(layout: Layout, count: int) -> tuple[int, ...]:
    """Return d_k of every piece; those of a tensor differ by one at most."""
    cuts = (
        ((i * size // n for i in range(n + 1))) for (_, size), (_, n) in zip(layout, _dealt(layout, count), strict=True)
    )
    return tuple(stop - start for ends in cuts for start, stop in pairwise(ends))
