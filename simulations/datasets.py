"""Data sets: the built-in digits, a local folder, an array file or any data set of the Hugging Face hub.

`load` gives one `DataSet`: a train split that `partition` divides among the clients, or from which `resample` lets each
draw its own, and a central test split. Both are `Samples`, views of one array of all rows, so a thousand clients cost a
thousand index vectors and no copy. How data is found and decoded is in `sources.py`; what is decoded is kept, see
`cache.py`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from ..algorithms.seeds import Purpose, generator
from .cache import Source, fingerprint
from .refusal import DataError, require
from .resampling import Resampled
from .sources import BUILT_IN, locate, source

__all__ = ["BUILT_IN", "DataError", "DataSet", "Samples", "load", "partition", "resample", "split"]

_CATEGORIES = 1000  # most one-hot features of one column of a table
_TEST, _LIMIT, _PARTITION, _HOLDOUT, _RESAMPLE = range(5)  # second word of every random place of this module

log = logging.getLogger("fedforward")


@dataclass(frozen=True, eq=False)
class Samples:
    """Some rows of a data set: a view, nothing is copied before `batch`.

    Attributes:
        x: (N, *shape) uint8 or float32, shared by every view, possibly memory-mapped.
        y: (N,) int64 classes, shared by every view.
        index: (n,) int64 rows of `x` and `y` that belong to this view.
        scale: factor that brings `x.float()` into its range: 1/255 for bytes, 1 for floats.
        shift: what is added then.
    """

    x: Tensor
    y: Tensor
    index: Tensor
    scale: float
    shift: float = 0.0

    def __len__(self) -> int:
        return len(self.index)

    def batch(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return fresh tensors (b, *shape) float32 and (b,) int64 of `rows`, (b,) int64 positions in this view."""
        index = self.index.index_select(0, rows)
        x = self.x.index_select(0, index).float()
        x = x if self.scale == 1 else x.mul_(self.scale)
        return (x.add_(self.shift) if self.shift else x), self.y.index_select(0, index)

    def subset(self, rows: Tensor) -> Samples:
        """Return the view of `rows`, (m,) int64 positions in this view."""
        return Samples(self.x, self.y, self.index[rows], self.scale, self.shift)


@dataclass(frozen=True, eq=False)
class DataSet:
    """A data set ready for a simulation.

    Attributes:
        name: built-in or hub name, or the folder's or file's name.
        train: rows to divide among clients.
        test: the central test split.
        classes: number of classes; labels are 0 … classes−1 in both splits.
        shape: of one sample, channels first: (1, 28, 28) for images, (d,) for vectors and tables.
        columns: further columns of the train split, numbers or short strings, (len(train),) each, for natural clients.
    """

    name: str
    train: Samples
    test: Samples
    classes: int
    shape: tuple[int, ...]
    columns: dict[str, np.ndarray]


def load(
    name: str,
    *,
    image: str | None = None,
    label: str | None = None,
    negative: str | int | None = None,
    drop: Sequence[str] = (),
    test_fraction: float = 0.2,
    seed: int = 0,
    limit: int | None = None,
    standardize: bool = False,
    rotate: int = 0,
    resize: int = 0,
) -> DataSet:
    """Load a data set; a second call with the same arguments and unchanged files is free.

    The test split is `test`, `validation` or `valid`, or is cut from the train split. A table (no image and no vector
    column) becomes (d,) float32: numbers are standardised by mean and deviation of the train split (missing ones become
    the mean), strings are one-hot encoded over the values of the train split.

    Args:
        name: `digits`, a folder that `datasets.load_dataset` reads, an `.npz` file, or a hub data set.
        image: column (key of an .npz) of the inputs; None finds it by type, then by its usual names.
        label: column of the classes; None finds it by its usual names, then by type. Classes are numbered as they sort.
        negative: make two classes: this label, as the column holds it (a named class by its number), becomes 0, every
            other label 1.
        drop: columns to leave out, such as one that gives the answer away: --set 'data.drop=["difficulty"]'.
        test_fraction: share of every class that becomes the test split, when the data has none of its own.
        seed: run seed; decides the test split that is cut and the rows that `limit` keeps.
        limit: keep this many random training rows; None keeps all. The test split stays whole.
        rotate: turn images counterclockwise by 90, 180 or 270 degrees: another task for the same network.
        resize: make images this many pixels wide and high, with an antialiased bilinear filter; 0 leaves them.
        standardize: bring images or vectors to mean 0 and deviation 1, of all values of the train split together.

    Raises:
        DataError: unknown name or column, unreadable files, images of unequal size, no classes.
    """
    if limit is not None and limit < 1:
        raise DataError(f"limit={limit} leaves no training row: take at least 1")
    path = locate(name)
    stamp = "" if path is None else fingerprint([path] if path.is_file() else path.rglob("*"))
    if rotate not in (0, 90, 180, 270):
        raise DataError(f"rotate={rotate} is no quarter turn: use 90, 180 or 270")
    if resize < 0:
        raise DataError(f"resize={resize} is no width of an image: use pixels, such as 14")
    options = image, label, negative, tuple(drop), float(test_fraction), seed, limit, standardize, rotate, resize
    return _load(name, path, stamp, *options)


def partition(data: DataSet, spec: str, clients: int, seed: int) -> list[Tensor]:
    """Return the rows of `data.train` of every client: sorted int64, disjoint, a function of the arguments alone.

    Args:
        data: the data set to divide.
        spec: a partitioner of flwr-datasets and its argument: `iid`, `dirichlet:0.3`, `pathological:2`, `shard:2`,
            `linear`, `square`, `exponential`, `natural:COLUMN`. Every row is dealt out, but for the remainder of
            `shard`, the classes nobody drew in `pathological`, and the clients beyond `clients` of `natural`.
        clients: number of clients.
        seed: run seed.

    Raises:
        DataError: unknown partition or column, more clients than samples, an impossible division.
    """
    from .partitions import divide  # imports flwr-datasets: seconds that loading alone should not cost

    return divide(data.train.y[data.train.index].numpy(), data.columns, spec, clients, seed, _PARTITION)


def resample(data: DataSet, spec: str, clients: int, samples: int, seed: int) -> Resampled:
    """Return the rows of `data.train` of every client, each drawing its own, made when asked for: see `resampling`.

    Args:
        data: the data set to draw from.
        spec: `iid`, `dirichlet:ALPHA` or `pathological:CLASSES`.
        clients: number of clients.
        samples: rows of a client; 0 for 100, or all rows if they are fewer.
        seed: run seed.

    Raises:
        DataError: another partition, an impossible argument, more samples than rows.
    """
    return Resampled(data.train.y[data.train.index].numpy(), spec, clients, samples, seed, _RESAMPLE)


def split(rows: Tensor, holdout: float, seed: int, client: int) -> tuple[Tensor, Tensor]:
    """Divide a client's rows into those it learns from and those it is judged by, both sorted.

    A positive `holdout` holds back at least one row where there are two or more; one row at least is learned from.

    Raises:
        DataError: `holdout` is not in [0, 1).
    """
    if not 0 <= holdout < 1:
        raise DataError(f"holdout={holdout} must be at least 0 and below 1")
    held = len(rows) - learned(len(rows), holdout)
    if not held:
        return rows.sort().values, rows[:0]
    order = torch.from_numpy(generator(seed, Purpose.DATA, _HOLDOUT, client).permutation(len(rows)))
    return rows[order[held:].sort().values], rows[order[:held].sort().values]


def learned(samples: int, holdout: float) -> int:
    """Return how many of a client's samples it learns from, see `split`."""
    return samples - min(max(round(holdout * samples), int(holdout > 0)), max(samples - 1, 0))


# ---- from a source to a data set ------------------------------------------------------------------------------------


@lru_cache(maxsize=8)
def _load(
    name, path, stamp, image, label, negative, drop, test_fraction, seed, limit, standardize, rotate, resize
) -> DataSet:
    """Do the work of `load`; `stamp` is there to notice files that have changed."""
    found = source(name, path, stamp, image, label)
    title = name if path is None else path.name.removesuffix(".npz")
    y, classes = _number(found, negative)
    for column in drop:
        require("column", column, found.columns, "'data.drop=[\"COLUMN\"]'")
    columns = {column: values for column, values in found.columns.items() if column not in drop}
    train, test = np.arange(found.train), np.arange(found.train, len(y))
    if not len(test):
        train, test = _cut(y, test_fraction, seed)
    x = _features(columns, train) if found.x is None else found.x
    for asked, change in ((rotate, "rotate turns"), (resize, "resize scales")):
        if asked and x.ndim != 4:
            raise DataError(f"{change} images, and a sample here has shape {x.shape[1:]}: leave it out")
    x = np.ascontiguousarray(np.rot90(x, rotate // 90, axes=(2, 3))) if rotate else x
    x = _resized(x, resize) if resize else x
    if unseen := len(np.setdiff1d(y[test], y[train])):
        log.warning("%s: %d of %d classes occur in the test split alone and cannot be learned", title, unseen, classes)
    if limit is not None and limit < len(train):
        train = np.sort(generator(seed, Purpose.DATA, _LIMIT).permutation(train)[:limit])
    tensors = torch.from_numpy(x), torch.from_numpy(y)
    unit = _unit(tensors[0], train, found.scale) if standardize and found.x is not None else (found.scale, 0.0)
    views = [Samples(*tensors, torch.from_numpy(rows), *unit) for rows in (train, test)]
    columns = {column: values[train] for column, values in columns.items()}
    return DataSet(title, *views, classes, tuple(x.shape[1:]), columns)


def _resized(x: np.ndarray, size: int) -> np.ndarray:
    """Return images (N, C, H, W) as (N, C, size, size) of the same type, in slices."""
    made = np.empty((*x.shape[:2], size, size), x.dtype)
    for start in range(0, len(x), 1000):
        images = torch.from_numpy(x[start : start + 1000])
        scaled = interpolate(images.float(), (size, size), mode="bilinear", antialias=True)
        made[start : start + 1000] = scaled if images.is_floating_point() else scaled.round_()
    return made


def _unit(x: torch.Tensor, train: np.ndarray, scale: float) -> tuple[float, float]:
    """Return the scale and shift that bring the train rows of `x` to mean 0 and deviation 1, in slices."""
    total = square = count = 0.0
    for rows in torch.from_numpy(train).split(1000):
        values = x[rows].double()
        total, square, count = (
            total + float(values.sum()),
            square + float(values.square().sum()),
            count + values.numel(),
        )
    mean = total / count
    deviation = max(square / count - mean**2, 0.0) ** 0.5
    return (1 / deviation, -mean / deviation) if deviation > 1e-9 * abs(mean) else (scale, -mean * scale)


def _number(found: Source, negative: str | int | None) -> tuple[np.ndarray, int]:
    """Return the classes as int64 0, 1, … in the labels' sorted order, and how many there are."""
    _check_labels(found)
    if negative is not None:
        words = found.y.astype(str)
        require("label", str(negative), np.unique(words).tolist(), "data.negative=LABEL")
        return (words != str(negative)).astype(np.int64), 2
    if found.classes:
        return found.y.astype(np.int64), found.classes
    known, y = np.unique(found.y, return_inverse=True)
    return y.astype(np.int64), len(known)


def _check_labels(found: Source) -> None:
    """Raise DataError unless there are rows and each has a class."""
    y = found.y
    if not len(y):
        raise DataError("the data set has no rows: check its files")
    if y.dtype.kind == "f" and not np.array_equal(y, np.floor(y)):
        raise DataError(
            "the label column holds real or missing numbers: name a column of classes, --set data.label=COLUMN"
        )
    if y.dtype.kind == "U" and (y == "").any():
        raise DataError("some rows have no label: remove them, or name another column, --set data.label=COLUMN")
    if found.classes and (y.min() < 0 or y.max() >= found.classes):
        raise DataError("some rows have no label (−1): remove them, or the split that holds them")


def _cut(y: np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Divide all rows into train and test rows, class by class; a class keeps at least one train row."""
    if not 0 < fraction < 1:
        raise DataError(f"test_fraction={fraction} must lie between 0 and 1: the data has no test split of its own")
    order = generator(seed, Purpose.DATA, _TEST).permutation(len(y))
    groups = [order[y[order] == c] for c in np.unique(y)]
    test = np.sort(np.concatenate([g[: min(round(fraction * len(g)), len(g) - 1)] for g in groups]))
    if not len(test):
        raise DataError(f"too few rows to cut a test split from ({len(y)}): raise test_fraction or add a test split")
    return np.setdiff1d(np.arange(len(y)), test), test


def _features(columns: dict[str, np.ndarray], train: np.ndarray) -> np.ndarray:
    """Return a table's columns as (N, d) float32, standardised and one-hot encoded by the `train` rows alone."""
    parts = []
    for name, values in columns.items():
        if values.dtype.kind == "U":
            known = np.unique(values[train])
            if len(known) > _CATEGORIES:
                raise DataError(
                    f"column '{name}' has {len(known)} different strings, no category: --set 'data.drop=[\"{name}\"]'"
                )
            parts.append(values[:, None] == known)
        else:
            values = values.astype(np.float64)
            seen = values[train][np.isfinite(values[train])]
            mean, deviation = (seen.mean(), seen.std()) if len(seen) else (0.0, 1.0)
            unit = (values - mean) / (deviation if deviation > 1e-9 * abs(mean) else 1.0)
            parts.append(np.where(np.isfinite(unit), unit, 0.0)[:, None])
    if not parts:
        raise DataError("the data has a label column and nothing to learn it from: add an image column or numbers")
    return np.concatenate(parts, axis=1, dtype=np.float32)
