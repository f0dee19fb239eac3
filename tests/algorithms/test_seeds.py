"""Every draw is a function of the seed, its purpose and its place, for ever."""

from itertools import combinations

import numpy as np
from fedforward.algorithms.seeds import Purpose, generator, integer_seed


def test_the_same_place_draws_the_same_numbers_and_leaves_the_global_generator_alone():
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    a = generator(1, Purpose.ORDER, 2, 3, 4).permutation(100)
    assert (a == generator(1, Purpose.ORDER, 2, 3, 4).permutation(100)).all()
    assert (np.random.get_state()[1] == before).all()  # noqa: NPY002


def test_other_places_purposes_and_seeds_draw_independent_numbers():
    n = 10_000
    places = [(1, p, 2, 3) for p in Purpose] + [(2, 0, 2, 3), (1, 0, 3, 2), (1, 0, 2), (1, 0), (1, 0, 2, 3, 0)]
    draws = [generator(seed, Purpose(p), *place).standard_normal(n) for seed, p, *place in places]
    correlations = [abs(a @ b) / n for a, b in combinations(draws, 2)]
    assert max(correlations) < 4 / n**0.5


def test_stored_numbers_never_change():
    # Runs are repeated from their seeds: these literals change with NumPy's stream or ours, and neither may.
    assert {p.name: p.value for p in Purpose} == {
        "INIT": 0, "FIXED": 1, "ORDER": 2, "RULE": 3, "DIRECTIONS": 4, "SERVER": 5, "DATA": 6,
        "FLEET": 7, "AUDIT": 8, "CANDIDATES": 9, "MASK": 10,
    }  # fmt: skip
    assert generator(1, Purpose.ORDER, 2, 3, 4).permutation(8).tolist() == [2, 7, 0, 6, 4, 3, 1, 5]
    assert integer_seed(7, Purpose.INIT) == 446169084274489858


def test_integer_seeds_fit_every_library():
    seeds = {integer_seed(seed, Purpose.INIT, place) for seed in range(20) for place in range(20)}
    assert len(seeds) == 400 and min(seeds) >= 0 and max(seeds) < 2**63
