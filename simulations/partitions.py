"""How the rows of a data set are divided among clients: the partitioners of flwr-datasets by name.

Importing this module imports flwr-datasets (seconds), so `datasets.partition` does it when it is called.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import flwr_datasets.partitioner as flwr
import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from ..algorithms.seeds import Purpose, generator, integer_seed
from .refusal import DataError, near
from .specs import Takes, parse


class Partition(NamedTuple):
    """A partitioner by name: the argument it takes and how to build it."""

    takes: Takes
    build: Callable[[int, Any, int], flwr.Partitioner]  # (clients, argument, seed) -> partitioner


# min_partition_size=0: small alphas leave some client without a sample in almost every draw, see `_feed`.
# first-deterministic: the mode of the partitioner's paper; the classes are all used where there are clients enough.
PARTITIONS: dict[str, Partition] = {
    "iid": Partition(Takes(None), lambda n, _, seed: flwr.IidPartitioner(n)),
    "linear": Partition(Takes(None), lambda n, _, seed: flwr.LinearPartitioner(n)),
    "square": Partition(Takes(None), lambda n, _, seed: flwr.SquarePartitioner(n)),
    "exponential": Partition(Takes(None), lambda n, _, seed: flwr.ExponentialPartitioner(n)),
    "dirichlet": Partition(
        Takes("0.5", float),
        lambda n, alpha, seed: flwr.DirichletPartitioner(n, "label", alpha, min_partition_size=0, seed=seed),
    ),
    "pathological": Partition(
        Takes("2", int),
        lambda n, k, seed: flwr.PathologicalPartitioner(n, "label", k, "first-deterministic", seed=seed),
    ),
    "shard": Partition(Takes("2", int), lambda n, k, seed: flwr.ShardPartitioner(n, "label", k, seed=seed)),
    "natural": Partition(Takes(""), lambda n, column, seed: flwr.NaturalIdPartitioner("natural")),
}


class Rows(Dataset):
    """The table a partitioner divides: labels and row numbers. A part of it is an array, not one more table.

    A `Dataset` fingerprints, copies and wraps every selection: 10 ms a client. Ten thousand clients would take minutes.
    """

    @classmethod
    def of(cls, rows: np.ndarray, **columns: np.ndarray) -> Rows:
        """Build the table whose line i stands for row `rows[i]`; all arrays are (n,)."""
        table = cls.from_dict(columns)
        table.rows, table.columns = rows, columns
        return table

    def select(self, indices: Any, **_: Any) -> np.ndarray:
        """Return the row numbers of some lines, (m,) int64."""
        return self.rows[np.fromiter(indices, np.int64)]

    def sort(self, column: str, **_: Any) -> Rows:
        """Return the table sorted by a column; ties keep their order."""
        order = np.argsort(self.columns[column], kind="stable")
        return Rows.of(self.rows[order], **{name: values[order] for name, values in self.columns.items()})


def divide(
    labels: np.ndarray, columns: dict[str, np.ndarray], spec: str, clients: int, seed: int, place: int
) -> list[Tensor]:
    """Divide rows 0 … n−1 among clients; see `datasets.partition`.

    Args:
        labels: (n,) int64 classes.
        columns: further columns, (n,) each, for `natural`.
        spec: a name in `PARTITIONS` and its argument after a colon.
        clients: number of clients.
        seed: run seed.
        place: keeps these draws apart from other draws of purpose DATA.
    """
    name, argument = parse(spec, {name: each.takes for name, each in PARTITIONS.items()})
    if clients < 1:
        raise DataError(f"{clients} clients: take at least 1, --clients 1")
    if clients > len(labels):
        remedy = "lower --clients or add --resample"
        raise DataError(f"more clients ({clients}) than training samples ({len(labels)}): {remedy}")
    rows = generator(seed, Purpose.DATA, place).permutation(len(labels))
    table = {"label": labels[rows]}
    if name == "natural":
        table["natural"] = _natural(columns, argument)[rows]
    try:
        partitioner = PARTITIONS[name].build(clients, argument, integer_seed(seed, Purpose.DATA, place, 1))
        partitioner.dataset = Rows.of(rows, **table)
        with _quiet():
            found = partitioner.num_partitions
            if name == "natural" and clients > found:
                raise DataError(f"column '{argument}' knows {found} clients, not {clients}: lower --clients")
            parts = [np.sort(partitioner.load_partition(i)) for i in range(clients)]
    except DataError:
        raise
    except (ValueError, TypeError, KeyError, IndexError, ZeroDivisionError) as error:
        reason = " ".join(str(error).split()).partition(". ")[0].rstrip(".")
        remedy = f"lower --clients or take another partition than {spec}"
        raise DataError(f"cannot divide {len(labels)} samples among {clients} clients ({reason}): {remedy}") from error
    return [torch.from_numpy(part) for part in _feed(parts)]


def _natural(columns: dict[str, np.ndarray], column: str) -> np.ndarray:
    """Return the column that says whose each row is."""
    if column not in columns:
        known = f"one of {', '.join(columns)}" if columns else "the data set has no further column"
        raise DataError(f"natural:COLUMN, no column '{column}'{near(column, columns)}: {known}")
    return columns[column]


def _feed(parts: list[np.ndarray]) -> list[np.ndarray]:
    """Give every empty client the first sample of the then largest one, so that each has something to learn from."""
    sizes = np.array([len(part) for part in parts])
    for i in np.flatnonzero(sizes == 0):
        largest = sizes.argmax()
        parts[i], parts[largest] = parts[largest][:1], parts[largest][1:]
        sizes[i], sizes[largest] = 1, sizes[largest] - 1
    return parts


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the progress bars and warnings of the partitioners."""
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
