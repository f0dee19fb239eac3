"""The noise of a sample: the generator's own bits, and what is made of them."""

from itertools import combinations

import numpy as np
import pytest
import torch
from fedforward.algorithms.noise import normals, seeds, signs, uniforms, words
from fedforward.algorithms.seeds import Place

SEEDS = seeds(Place(1, 2, 3, 4), 50)


def split_mix(state, count):
    """Return the first outputs of Steele, Lea & Flood's SplitMix64, after `state`, in integers of any length."""
    found, mask = [], 2**64 - 1
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) & mask
        h = ((state ^ state >> 30) * 0xBF58476D1CE4E5B9) & mask
        h = ((h ^ h >> 27) * 0x94D049BB133111EB) & mask
        found.append(h ^ h >> 31)
    return found


@pytest.mark.parametrize("stream", [0, 1, 70])
def test_words_are_those_of_splitmix64(stream):
    got = words(SEEDS, stream, 9).numpy().view(np.uint64)
    for seed, row in zip(SEEDS.tolist(), got, strict=True):
        before = seed + ((stream << 32) - 1) * 0x9E3779B97F4A7C15
        assert row.tolist() == split_mix(before % 2**64, 9)
    # Published first outputs of state 1234567.
    assert split_mix(1234567, 2) == [6457827717110365317, 3203168211198807973]


def test_signs_are_the_bits_of_the_words():
    made = torch.stack(list(signs(SEEDS, 5, 3, 100, torch.float64)))
    bits = np.unpackbits(words(SEEDS, 5, 6).numpy().view(np.uint8), axis=1, bitorder="little").reshape(50, 3, 128)
    assert torch.equal(made, torch.from_numpy(2.0 * bits[:, :, :100] - 1).transpose(0, 1))


def test_noise_is_balanced_and_independent_between_samples_streams_and_units():
    n = 4096
    both = {"signs": next(signs(SEEDS, 0, 1, n, torch.float64)), "normals": normals(SEEDS, 1, n, torch.float64)}
    for noise in both.values():
        assert abs(noise.mean()) < 4 / noise.numel() ** 0.5
        assert abs(noise.square().mean() - 1) < 4 * 2**0.5 / noise.numel() ** 0.5
        assert abs((noise[:, 1:] * noise[:, :-1]).mean()) < 4 / noise.numel() ** 0.5
    rows = [*both["signs"][:12], *both["normals"][:12], *normals(SEEDS, 2, n, torch.float64)[:12]]
    products = torch.stack([(a * b).mean() for a, b in combinations(rows, 2)]) * n**0.5
    assert products.abs().max() < 5 and abs(products.std() - 1) < 0.15


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_normals_follow_the_normal_law_in_its_tails_too(dtype):
    drawn = normals(SEEDS, 0, 20_000, dtype).flatten()  # a million
    assert drawn.isfinite().all() and drawn.dtype == dtype
    law = torch.distributions.Normal(0.0, 1.0)
    for z in (-4.0, -2.0, -0.5, 0.0, 1.0, 3.0, 4.0):
        p = float(law.cdf(torch.tensor(z)))
        assert abs((drawn <= z).double().mean() - p) < 4 * (p * (1 - p) / len(drawn)) ** 0.5


def test_batched_by_vmap_they_are_the_same():
    stacked = SEEDS.view(5, 10)
    for make in (
        lambda s: normals(s, 3, 70, torch.float32),
        lambda s: torch.stack(list(signs(s, 3, 2, 70, torch.float32))),
    ):
        assert torch.equal(torch.func.vmap(make)(stacked), torch.stack([make(s) for s in stacked]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_uniform_numbers_are_uniform_strictly_inside_and_streams_apart(dtype):
    one = torch.tensor([7])
    u, other = (uniforms(one, stream, 100_001, dtype)[0].double() for stream in (3, 4))
    assert 0 < u.min() < 1e-4 and 1 - 1e-4 < u.max() < 1
    assert abs(u.mean() - 0.5) < 0.004 and abs(u.var() - 1 / 12) < 0.002
    assert abs(torch.corrcoef(torch.stack([u, other]))[0, 1]) < 0.02
    assert torch.equal(uniforms(one, 3, 100, dtype, first=500)[0].double(), u[1000:1100])
    ends = torch.tensor([0, (1 << 23) - 1]).to(dtype).add_(0.5).div_(1 << 23)
    assert ends[0] > 0 and ends[1] < 1
