"""Noise of each sample's own, made where it is needed from one 64-bit seed a sample.

Noise as wide as a block is too much to draw before the step, and inside it no generator may run (`torch.func.vmap`). So
`Rule.draw` gives every sample a seed s, and word i of its noise is SplitMix64's (G. Steele, D. Lea, C. Flood, "Fast
Splittable Pseudorandom Number Generators", OOPSLA 2014), in integers that wrap around, the same on every machine:

    h = s + i γ      h ← (h ⊕ h≫30) · c₁      h ← (h ⊕ h≫27) · c₂      h ← h ⊕ h≫31
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .seeds import Place, Purpose, generator

GAMMA, C1, C2 = (c - 2**64 for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))  # as int64


def seeds(place: Place, count: int) -> Tensor:
    """Return a seed for each of `count` samples, (B,) int64."""
    rng = generator(place.seed, Purpose.RULE, place.round, place.client, place.step)
    return torch.from_numpy(rng.integers(-(2**63), 2**63, count))


def words(seeds: Tensor, stream: int, count: int, first: int = 0) -> Tensor:
    """Return `count` words of each sample's noise from word `first` on, (B, count) int64; no two streams share one."""
    start = (stream << 32) + first
    h = seeds.unsqueeze(-1) + torch.arange(start, start + count, device=seeds.device).mul_(GAMMA)
    for shift, factor in ((30, C1), (27, C2), (31, 1)):
        h ^= (h >> shift).bitwise_and_((1 << 64 - shift) - 1)  # >> copies the sign into what it frees
        h *= factor
    return h


def signs(seeds: Tensor, stream: int, times: int, count: int, dtype: torch.dtype) -> Iterator[Tensor]:
    """Yield `times` tensors of ±1 with equal chances, (B, count) each; their bits are made at once, and kept packed."""
    width = -(-count // 64)
    octets = words(seeds, stream, times * width).view(torch.uint8)
    for own in octets.split(8 * width, -1):
        yield _unpacked(own)[..., :count].to(dtype).mul_(2).sub_(1)


def _unpacked(octets: Tensor) -> Tensor:
    """Return the bits of bytes (B, n), lowest first, (B, 8 n)."""
    places = torch.arange(8, dtype=torch.uint8, device=octets.device)
    return (octets.unsqueeze(-1) >> places).bitwise_and_(1).flatten(-2)


def uniforms(seeds: Tensor, stream: int, count: int, dtype: torch.dtype, first: int = 0) -> Tensor:
    """Return numbers between 0 and 1, (B, count), from word `first` on: the middles of 2²³ intervals."""
    halves = words(seeds, stream, -(-count // 2), first).view(torch.int32)[..., :count].bitwise_and_((1 << 23) - 1)
    return halves.to(dtype).add_(0.5).div_(1 << 23)


def normals(seeds: Tensor, stream: int, count: int, dtype: torch.dtype, first: int = 0) -> Tensor:
    """Return standard normal numbers, (B, count): the inverse distribution function at the middles of 2²⁴ intervals."""
    halves = words(seeds, stream, -(-count // 2), first).view(torch.int32)
    halves >>= 8
    u = halves[..., :count].to(dtype)
    del halves
    return u.add_(0.5).div_(1 << 23).erfinv_().mul_(2**0.5)
