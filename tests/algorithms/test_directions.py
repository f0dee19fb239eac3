"""Directions: the same bits for ever, independent of each other, laid out so that a model can grow."""

from itertools import combinations

import pytest
import torch
from fedforward.algorithms.directions import BLOCK, Directions, stream_hash

GOLDEN = "fe93311eb60e1548a6e906bf6319ba26cbe04a498e7ccec2b13137131dde6daf"


def draw(seed=0, round=0, step=0, k=0, size=4096, chunk=BLOCK):
    params = {"a": torch.zeros(size)}
    return torch.cat([signs for _, signs in Directions(seed, round, step).slices(params, k, chunk)])


def test_the_stream_never_changes():
    # If this fails, every stored log of scalars has lost its meaning: do not update the literals.
    assert stream_hash() == GOLDEN
    first = "".join("+" if s > 0 else "-" for s in draw(seed=1, round=2, step=3, k=4, size=32))
    assert first == "--+--++-+++----+--++++-+----+-+-"


def test_streams_of_other_places_are_uncorrelated():
    n = 4096
    places = [(r, s, k) for r in (0, 1, 2) for s in (0, 1, 2) for k in (0, 1, 2)]
    streams = [draw(round=r, step=s, k=k, size=n) for r, s, k in places] + [
        draw(seed=1, size=n),
        draw(seed=256, size=n),
    ]
    products = torch.stack([(a * b).mean() for a, b in combinations(streams, 2)])
    assert products.abs().max() < 5 / n**0.5  # 406 pairs: 5 standard errors for all, 4 for each but one in 15,000
    assert (products.abs() < 4 / n**0.5).float().mean() > 0.99
    assert abs(products.std() * n**0.5 - 1) < 0.15


def test_signs_are_balanced_and_nothing_but_signs():
    n = 1_000_000
    z = draw(size=n, chunk=65536)
    assert set(z.unique().tolist()) == {-1.0, 1.0}
    assert abs(z.mean()) < 4 / n**0.5
    assert abs((z[1:] * z[:-1]).mean()) < 4 / n**0.5


@pytest.mark.parametrize("chunk", [1, 300, 1024, 10**6])
def test_the_chunk_never_changes_the_signs(chunk):
    assert torch.equal(draw(size=5000, chunk=chunk), draw(size=5000, chunk=BLOCK))


def test_slices_are_views_no_longer_than_the_chunk():
    p = torch.zeros(10, 100)
    for part, signs in Directions(0, 0, 0).slices({"a": p}, 0, chunk=512):
        assert len(part) == len(signs) <= 512
        part.copy_(signs)
    assert torch.equal(p.view(-1), draw(size=1000))


def test_each_tensor_begins_at_a_multiple_of_the_block():
    whole = draw(size=4 * BLOCK)
    params = {"a": torch.zeros(BLOCK + 1), "b": torch.zeros(3, 2), "c": torch.zeros(())}
    Directions(0, 0, 0).add(params, 0, 1.0, chunk=BLOCK)
    assert torch.equal(params["a"], whole[: BLOCK + 1])
    assert torch.equal(params["b"].view(-1), whole[2 * BLOCK : 2 * BLOCK + 6])
    assert params["c"] == whole[3 * BLOCK]


def test_a_parameter_added_at_the_end_leaves_the_signs_of_the_others():
    short = {"a": torch.zeros(300), "b": torch.zeros(17)}
    long = {"a": torch.zeros(300), "b": torch.zeros(17), "c": torch.zeros(9)}
    for params in (short, long):
        Directions(3, 1, 4).add(params, 1, 1.0, chunk=BLOCK)
    assert all(torch.equal(short[key], long[key]) for key in short)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("c", [1e-3, -0.3, 3e-9])
def test_adding_rounds_once_for_a_number_and_for_a_tensor(c, dtype):
    p = torch.randn(5000, dtype=dtype, generator=torch.Generator().manual_seed(0))
    wanted = p + draw(size=5000).to(dtype) * torch.tensor(c, dtype=dtype)  # the product with ±1 is exact
    for number in (c, torch.tensor(c, dtype=dtype)):
        params = {"a": p.clone()}
        Directions(0, 0, 0).add(params, 0, number, chunk=BLOCK)
        assert torch.equal(params["a"], wanted)
