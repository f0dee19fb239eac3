"""Clients that draw their own samples: as many of them as one likes, each made when it is asked for.

A partition deals every row to one client, so there are at most as many clients as rows, and all are dealt to before the
first one trains. Here a client's rows are a function of (seed, client) alone: clients overlap, a client that no round
samples costs nothing, and a million of them begin as fast as a thousand. With n samples a client and n_c rows of
class c, the rows of client i are n draws without repetition from

    iid                  all rows
    dirichlet:ALPHA      classes in proportions q_c ∝ n_c g_c, with g ~ Dir(ALPHA, …, ALPHA)
    pathological:K       K classes that it draws, in equal parts

The proportions of `dirichlet` are those that the partition of that name comes to when clients are many. Only where more
rows of a class are drawn than there are, some come again.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..algorithms.seeds import Purpose, generator
from .refusal import DataError
from .specs import Takes, parse

SAMPLES = 100  # of a client, if the data have as many
WAYS = {"iid": Takes(None), "dirichlet": Takes("0.5", float), "pathological": Takes("2", int)}


class Resampled(Sequence[Tensor]):
    """The rows of every client, sorted int64, drawn when asked for.

    Args:
        labels: (n,) int64 classes of rows 0 … n−1.
        spec: a name in `WAYS` and its argument after a colon.
        clients: number of clients.
        samples: rows of a client; 0 takes `SAMPLES`, or all rows if they are fewer.
        seed: run seed.
        place: keeps these draws apart from other draws of purpose DATA.

    Raises:
        DataError: for another partition, an impossible argument, or more samples than there are rows.
    """

    def __init__(self, labels: np.ndarray, spec: str, clients: int, samples: int, seed: int, place: int) -> None:
        self.name, self.argument = _way(spec)
        self.clients, self.samples = clients, samples or min(SAMPLES, len(labels))
        self.seed, self.place = seed, place
        self.rows = np.argsort(labels, kind="stable")  # class by class
        self.sizes = np.unique(labels, return_counts=True)[1]
        self.starts = self.sizes.cumsum() - self.sizes
        self._check()

    def __len__(self) -> int:
        return self.clients

    def __getitem__(self, client: int) -> Tensor:
        if not 0 <= client < self.clients:
            raise IndexError(f"no client {client} among {self.clients}")
        rng = generator(self.seed, Purpose.DATA, self.place, client)
        if self.name == "iid":
            rows = rng.choice(len(self.rows), self.samples, replace=False, shuffle=False)
        else:
            counts = self._dirichlet(rng) if self.name == "dirichlet" else self._pathological(rng)
            drawn = np.flatnonzero(counts)
            rows = np.concatenate([self.rows[self.starts[c] + _draw(rng, self.sizes[c], counts[c])] for c in drawn])
        rows.sort()
        return torch.from_numpy(rows)

    def _dirichlet(self, rng: np.random.Generator) -> np.ndarray:
        """Return how many rows of each class a client draws."""
        weights = self.sizes * rng.dirichlet(np.full(len(self.sizes), self.argument))
        return rng.multinomial(self.samples, weights / weights.sum())

    def _pathological(self, rng: np.random.Generator) -> np.ndarray:
        """Return how many rows of each class a client draws: equal numbers, and one more of some where it must be."""
        share, rest = divmod(self.samples, self.argument)
        counts = np.zeros(len(self.sizes), np.int64)
        counts[rng.choice(len(counts), self.argument, replace=False)] = share + (np.arange(self.argument) < rest)
        return counts

    def _check(self) -> None:
        """Raise DataError unless every client can draw its samples."""
        rows, classes, argument = len(self.rows), len(self.sizes), self.argument
        if self.samples > rows:
            raise DataError(f"samples-per-client ({self.samples}) is more than the {rows} training samples: lower it")
        if self.name == "dirichlet" and not argument > 0:
            raise DataError(f"dirichlet:{argument:g} has no proportions to draw: take an ALPHA above 0")
        if self.name == "pathological" and not 1 <= argument <= min(classes, self.samples):
            least = f"{classes} classes" if classes <= self.samples else f"{self.samples} samples a client"
            raise DataError(f"pathological:{argument} cannot be drawn from {least}: take 1 to {least.split()[0]}")


def _way(spec: str) -> tuple[str, float | int | str]:
    """Return name and argument of a partition that can be drawn client by client."""
    try:
        return parse(spec, WAYS)
    except DataError as error:
        remedy = "" if spec.partition(":")[0] in WAYS else " with --resample, or leave that out"
        raise DataError(f"{error}{remedy}") from None


def _draw(rng: np.random.Generator, size: int, count: int) -> np.ndarray:
    """Return `count` of the numbers 0 … size−1, each as often as any other or once more."""
    again, rest = divmod(count, size)
    drawn = rng.choice(size, rest, replace=False, shuffle=False)
    return np.concatenate([np.tile(np.arange(size), again), drawn]) if again else drawn
