"""What a few numbers keep of a change, and that they are the same numbers everywhere."""

from itertools import pairwise
from math import sqrt

import pytest
import torch
from cases import equal, network
from fedforward.algorithms import RuleError
from fedforward.algorithms.directions import layout_of
from fedforward.algorithms.projection import CHUNK, basis, decode, encode, pieces_of

SIZES = {"a.weight": (60, 70), "a.bias": (60,), "b.weight": (3, 1, 5), "b.bias": (1,)}  # 4,276 values
D = 4276
SIGNS = basis(1, 2)


def tensors(seed, scale=1.0):
    g = torch.Generator().manual_seed(seed)
    return {key: scale * torch.randn(shape, generator=g) for key, shape in SIZES.items()}


def zeros():
    return {key: torch.zeros(shape) for key, shape in SIZES.items()}


def flat(params):
    return torch.cat([p.flatten() for p in params.values()])


def kept(change, count, signs=SIGNS, power=0.0):
    out = zeros()
    decode(out, encode(change, zeros(), signs, count), signs, count, power)
    return flat(out)


def test_numbers_are_the_coordinates_on_pieces_of_one_direction():
    change, count = tensors(0), 100
    z, numbers, found = zeros(), [], encode(change, zeros(), SIGNS, count)
    SIGNS.add(z, 0, 1.0, 4096)
    pieces = pieces_of(layout_of(change), count)
    for key, n in pieces.items():
        product = (z[key] * change[key]).flatten()
        cuts = [i * len(product) // n for i in range(n + 1)]
        numbers += [product[a:b].mean() for a, b in pairwise(cuts)]
    assert count == len(found) == len(numbers) and found.dtype == torch.float32
    torch.testing.assert_close(found, torch.stack(numbers), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("count", [4, 64, 1000])
def test_what_is_kept_is_an_orthogonal_projection(count):
    change = tensors(0)
    once = kept(change, count)
    again = kept(
        {k: p.view(SIZES[k]) for k, p in zip(SIZES, once.split([p.numel() for p in change.values()]), strict=True)},
        count,
    )
    torch.testing.assert_close(again, once, rtol=1e-5, atol=1e-6)
    assert float(once @ (flat(change) - once)) == pytest.approx(0, abs=1e-4 * float(once @ once))


@pytest.mark.parametrize("count", [64, 400, 2000])
def test_a_random_change_loses_all_but_the_root_of_k_of_d(count):
    change = tensors(3)
    whole, pieces = flat(change), kept(change, count)
    assert float((whole - pieces).norm() / whole.norm()) == pytest.approx(sqrt(1 - count / D), rel=0.03)
    found = [kept(change, count, basis(1, r), power=0.5) for r in range(10)]
    assert sum(float(f.norm() / whole.norm()) for f in found) / 10 == pytest.approx(1, rel=0.05)


def test_with_the_right_power_the_mean_over_rounds_is_the_change():
    change = tensors(3)
    found = torch.stack([kept(change, 400, basis(1, r), power=1.0) for r in range(400)])
    error = (found.mean(0) - flat(change)) / (found.std(0) / 20 + 1e-6)
    assert error.abs().max() < 5 and error.std() < 1.1  # of 4,276 normal numbers the largest is below 5


@pytest.mark.parametrize("count", [D, 2 * D])
def test_with_a_direction_a_value_nothing_is_lost(count):
    change = tensors(0)
    assert pieces_of(layout_of(change), count) == {key: p.numel() for key, p in change.items()}
    for power in (0.0, 0.5, 1.0):
        assert torch.equal(kept(change, count, power=power), flat(change))


def test_tiny_tensors_are_kept_whole_and_each_has_a_piece():
    layout = layout_of(tensors(0))
    assert list(pieces_of(layout, 4).values()) == [1, 1, 1, 1]
    pieces = pieces_of(layout, 300)
    assert sum(pieces.values()) == 300 and pieces["b.bias"] == 1
    assert pieces["a.weight"] / pieces["a.bias"] == pytest.approx(sqrt(70), rel=0.05)
    with pytest.raises(RuleError, match=r"3 directions for 4 tensors: use strategy\.directions ≥ 4"):
        pieces_of(layout, 3)


def test_the_mean_of_codes_is_the_code_of_the_mean():
    origin, models = tensors(0), [tensors(s) for s in (1, 2, 3)]
    mean = {key: sum(m[key] for m in models) / 3 for key in SIZES}
    codes = torch.stack([encode(m, origin, SIGNS, 200) for m in models])
    torch.testing.assert_close(codes.mean(0), encode(mean, origin, SIGNS, 200), rtol=0, atol=1e-6)


def test_neither_threads_nor_the_memory_that_a_model_lies_in_change_a_bit():
    change = {key: torch.randn(500, 300, generator=torch.Generator().manual_seed(i)) for i, key in enumerate("ab")}
    origin = {key: torch.ones_like(p) for key, p in change.items()}
    crooked = {key: torch.empty(p.numel() + 1)[1:].view_as(p).copy_(p) for key, p in change.items()}
    threads, found = torch.get_num_threads(), []
    try:
        for count, params in ((1, change), (4, change), (4, crooked)):
            torch.set_num_threads(count)
            numbers, out = encode(params, origin, SIGNS, 5000), {key: p.clone() for key, p in origin.items()}
            decode(out, numbers, SIGNS, 5000, 0.5)
            found.append((numbers, out))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(found[0][0], n) and equal(found[0][1], o) for n, o in found[1:])
    assert change["a"].numel() > 10 * CHUNK


def test_encoding_leaves_both_models_as_they_are():
    net = network("lenet")
    params, origin = net.init(1), net.init(2)
    before = {key: p.clone() for key, p in params.items()}, {key: p.clone() for key, p in origin.items()}
    encode(params, origin, SIGNS, 50)
    assert equal(params, before[0]) and equal(origin, before[1])
