"""One run seed for everything: every random draw is a function of the seed, its purpose and its place.

A place is (round, client, step) or a part of it. Two draws with different places are independent; the same place draws
the same numbers on every engine, with any number of workers and after any crash.
"""

from __future__ import annotations

import enum
from typing import NamedTuple

import numpy as np


class Purpose(enum.IntEnum):
    """What a draw is for; keeps two uses of the same place apart. Numbers are stable: never reuse one."""

    INIT = 0  # initial parameters
    FIXED = 1  # fixed random matrices of a rule
    ORDER = 2  # the order in which a client visits its samples
    RULE = 3  # draws inside a rule's step
    DIRECTIONS = 4  # shared perturbation directions
    SERVER = 5  # sampling and noise on the server
    DATA = 6  # splits and partitions of a data set
    FLEET = 7  # which client is which device
    AUDIT = 8  # which client rounds are audited
    CANDIDATES = 9  # candidate directions of a pool, and which of them a step takes
    MASK = 10  # which activations a step leaves out


class Place(NamedTuple):
    """Where in a run a training step stands. `step` counts the client's own steps of the round from 0."""

    seed: int
    round: int
    client: int
    step: int


def generator(seed: int, purpose: Purpose, *place: int) -> np.random.Generator:
    """Return the generator of `purpose` at `place`, a function of its arguments alone."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(seed, spawn_key=(int(purpose), *place))))


def integer_seed(seed: int, purpose: Purpose, *place: int) -> int:
    """Return a 63-bit seed for a library that wants one integer."""
    return int(generator(seed, purpose, *place).integers(2**63))
