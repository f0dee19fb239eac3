"""Data sets: the built-in digits, a local folder, an array file or any data set of the Hugging Face hub.

`load` gives one `DataSet`: a train split that `partition` divides among the clients and a central test split. Both are
`Samples`, views of one array of all rows, so a thousand clients cost a thousand index vectors and no copy. Images are
decoded once into a memory-mapped array under `$FEDFORWARD_CACHE` (default `~/.cache/fedforward`).
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import io
import logging
import os
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..algorithms.seeds import Purpose, generator

BUILT_IN = ("digits",)
IMAGE_NAMES = ("image", "img", "images", "pixel_values", "pixels", "x", "x_train", "train_images", "data", "features")
LABEL_NAMES = ("label", "labels", "fine_label", "y", "y_train", "train_labels", "target", "targets", "class")
TEST_NAMES = ("test", "validation", "valid")  # splits that serve as the central test split, best first

_FORMAT = 1  # of the cache on disk; raise it when `_Source` or its decoding changes
_GREY = ("1", "L", "LA", "I;16", "I")  # Pillow's modes with one channel; every other image becomes RGB
_LONGEST = 100  # characters of a category; longer strings are free text
_CATEGORIES = 1000  # most one-hot features of one column of a table
_TEST, _LIMIT, _PARTITION, _HOLDOUT = range(4)  # second word of every random place of this module

log = logging.getLogger("fedforward")


class DataError(ValueError):
    """A data set, column or partition that does not exist or does not fit; one line that names the remedy."""


@dataclass(frozen=True, eq=False)
class Samples:
    """Some rows of a data set: a view, nothing is copied before `batch`.

    Attributes:
        x: (N, *shape) uint8 or float32, shared by every view, possibly memory-mapped.
        y: (N,) int64 classes, shared by every view.
        index: (n,) int64 rows of `x` and `y` that belong to this view.
        scale: factor that brings `x.float()` into its range: 1/255 for bytes, 1 for floats.
    """

    x: Tensor
    y: Tensor
    index: Tensor
    scale: float

    def __len__(self) -> int:
        return len(self.index)

    def batch(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return fresh tensors (b, *shape) float32 and (b,) int64 of `rows`, (b,) int64 positions in this view."""
        index = self.index[rows]
        x = self.x[index].float()
        return (x if self.scale == 1 else x.mul_(self.scale)), self.y[index]

    def subset(self, rows: Tensor) -> Samples:
        """Return the view of `rows`, (m,) int64 positions in this view."""
        return Samples(self.x, self.y, self.index[rows], self.scale)


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
    test_fraction: float = 0.2,
    seed: int = 0,
    limit: int | None = None,
) -> DataSet:
    """Load a data set; a second call with the same arguments and unchanged files is free.

    The test split is `test`, `validation` or `valid`, or is cut from the train split. A table (no image and no vector
    column) becomes (d,) float32: numbers are standardised by mean and deviation of the train split (missing ones become
    the mean), strings are one-hot encoded over the values of the train split.

    Args:
        name: `digits`, a folder that `datasets.load_dataset` reads, an `.npz` file, or a hub data set.
        image: column (key of an .npz) of the inputs; None finds it by type, then by its usual names.
        label: column of the classes; None finds it by its usual names, then by type. Classes are numbered as they sort.
        test_fraction: share of every class that becomes the test split, when the data has none of its own.
        seed: run seed; decides the test split that is cut and the rows that `limit` keeps.
        limit: keep this many random training rows; None keeps all. The test split stays whole.

    Raises:
        DataError: unknown name or column, unreadable files, images of unequal size, no classes.
    """
    if limit is not None and limit < 1:
        raise DataError(f"limit={limit} leaves no training row: take at least 1")
    path = _locate(name)
    stamp = "" if path is None else _stamp([path] if path.is_file() else path.rglob("*"))
    return _load(name, path, stamp, image, label, float(test_fraction), seed, limit)


def partition(data: DataSet, spec: str, clients: int, seed: int) -> list[Tensor]:
    """Return the rows of `data.train` of every client: sorted int64, disjoint, a function of the arguments alone.

    Args:
        data: the data set to divide.
        spec: a partitioner of flwr-datasets and its argument: `iid`, `dirichlet:0.3`, `pathological:2`, `shard:2`,
            `linear`, `square`, `exponential`, `natural:COLUMN`. Every row is dealt out, but for the remainder of
            `shard`, the classes nobody drew in `pathological`, and the clients beyond `clients` of `natural`.
        clients: number of clients; 0 with `natural` takes every one there is.
        seed: run seed.

    Raises:
        DataError: unknown partition or column, more clients than samples, an impossible division.
    """
    from .partitions import divide  # imports flwr-datasets: seconds that loading alone should not cost

    return divide(data.train.y[data.train.index].numpy(), data.columns, spec, clients, seed, _PARTITION)


def split(rows: Tensor, holdout: float, seed: int, client: int) -> tuple[Tensor, Tensor]:
    """Divide a client's rows into those it learns from and those it is judged by, both sorted.

    A positive `holdout` holds back at least one row where there are two or more; one row at least is learned from.

    Raises:
        DataError: `holdout` is not in [0, 1).
    """
    if not 0 <= holdout < 1:
        raise DataError(f"holdout={holdout} must be at least 0 and below 1")
    held = min(max(round(holdout * len(rows)), int(holdout > 0)), max(len(rows) - 1, 0))
    order = torch.from_numpy(generator(seed, Purpose.DATA, _HOLDOUT, client).permutation(len(rows)))
    return rows[order[held:].sort().values], rows[order[:held].sort().values]


# ---- from a source to a data set ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Source:
    """A data set as it was found: both splits one under the other, N rows, those of the train split first."""

    x: np.ndarray | None  # (N, *shape) uint8 or float32; None for a table, whose features are its columns
    y: np.ndarray  # (N,) labels as found, numbers or strings
    train: int  # rows of the train split; N where there is no test split
    classes: int  # as the source declares them; 0: as many as occur
    scale: float  # see Samples
    columns: dict[str, np.ndarray] = field(default_factory=dict)  # (N,) each, numbers or short strings


@lru_cache(maxsize=8)
def _load(name, path, stamp, image, label, test_fraction, seed, limit) -> DataSet:
    """Do the work of `load`; `stamp` is there to notice files that have changed."""
    source = _source(name, path, stamp, image, label)
    title = name if path is None else path.name.removesuffix(".npz")
    y, classes = _number(source)
    train, test = np.arange(source.train), np.arange(source.train, len(y))
    if not len(test):
        train, test = _cut(y, test_fraction, seed)
    x = _features(source.columns, train) if source.x is None else source.x
    if unseen := len(np.setdiff1d(y[test], y[train])):
        log.warning("%s: %d of %d classes occur in the test split alone and cannot be learned", title, unseen, classes)
    if limit is not None and limit < len(train):
        train = np.sort(generator(seed, Purpose.DATA, _LIMIT).permutation(train)[:limit])
    views = [
        Samples(torch.from_numpy(x), torch.from_numpy(y), torch.from_numpy(i), source.scale) for i in (train, test)
    ]
    columns = {key: values[train] for key, values in source.columns.items()}
    return DataSet(title, *views, classes, tuple(x.shape[1:]), columns)


def _number(source: _Source) -> tuple[np.ndarray, int]:
    """Return the classes as int64 0, 1, … in the labels' sorted order, and how many there are."""
    y = source.y
    if not len(y):
        raise DataError("the data set has no rows: check its files")
    if y.dtype.kind == "f" and not np.array_equal(y, np.floor(y)):
        raise DataError(
            "the label column holds real or missing numbers: name a column of classes, --set data.label=COLUMN"
        )
    if y.dtype.kind == "U" and (y == "").any():
        raise DataError("some rows have no label: remove them, or name another column, --set data.label=COLUMN")
    if source.classes:
        if y.min() < 0 or y.max() >= source.classes:
            raise DataError("some rows have no label (−1): remove them, or the split that holds them")
        return y.astype(np.int64), source.classes
    known, numbers = np.unique(y, return_inverse=True)
    return numbers.astype(np.int64), len(known)


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
                raise DataError(f"column '{name}' has {len(known)} different strings, no category: remove it")
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


# ---- sources --------------------------------------------------------------------------------------------------------


def _locate(name: str) -> Path | None:
    """Return the folder or file called `name`, None for a built-in or hub name; DataError for a path to nothing."""
    path = Path(name).expanduser()
    if name in BUILT_IN:
        return None
    if path.exists():
        return path.resolve()
    if name.startswith(("/", ".", "~")) or path.suffix == ".npz" or name.count("/") > 1:  # the hub knows owner/name
        there = os.listdir(path.parent) if path.parent.is_dir() else []
        raise DataError(f"no data at {name}{near(path.name, there)}: expected a data set folder or an .npz file")
    return None


def _source(name: str, path: Path | None, stamp: str, image: str | None, label: str | None) -> _Source:
    """Open what `name` means, through the cache."""
    key = partial(_key, path.stem if path else name, image, label)
    if name in BUILT_IN:
        return _cached(key(version("scikit-learn")), _digits)
    if path is None:
        if "/" not in name and (close := near(name, BUILT_IN)):
            raise DataError(f"no data set '{name}'{close}")
        splits = _open(
            name, f"no data set '{name}': expected {', '.join(BUILT_IN)}, a folder, an .npz file or a hub name"
        )
        files = [Path(file["filename"]) for part in splits.values() for file in part.cache_files]
        build = partial(_read, name, splits, image, label)
        return _cached(key(_stamp(files)), build) if files else build()
    if path.suffix == ".npz":
        return _cached(key(str(path), stamp), partial(_read_npz, path, image, label))
    if path.is_file():
        raise DataError(f"{name} is a file: give the folder it lies in, or an .npz file")
    failure = f"{name} is no data set folder (parquet, csv, json or images)"
    return _cached(key(str(path), stamp), lambda: _read(path.name, _open(str(path), failure), image, label))


def _digits() -> _Source:
    """Return scikit-learn's 1,797 digits of 8×8 pixels 0 … 16."""
    from sklearn.datasets import load_digits

    found = load_digits()
    return _Source(found.images.astype(np.uint8)[:, None], found.target, len(found.target), 10, 1 / 16)


def _read_npz(path: Path, image: str | None, label: str | None) -> _Source:
    """Read the arrays of an .npz: inputs, labels, and their test twins (`x_test`, `test_images`) if there are any."""
    try:
        with np.load(path) as file:
            arrays = {key: file[key] for key in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} cannot be read ({_line(error)}): save plain arrays with numpy.savez") from None
    keys = _pick(arrays, image, IMAGE_NAMES, "image"), _pick(arrays, label, LABEL_NAMES, "label")
    if None in keys:
        raise DataError(
            f"{path.name} has no {'labels' if keys[0] else 'inputs'} among {_names(arrays)}: name them x and y"
        )
    twins = [next((t for t in (f"{k}_test", k.replace("train", "test")) if t != k and t in arrays), None) for k in keys]
    pairs = [keys] if None in twins else [keys, tuple(twins)]
    for a, b in pairs:
        if arrays[b].size != len(arrays[a]):
            raise DataError(
                f"{path.name}: '{b}' {arrays[b].shape} must hold one class for each row of '{a}' {arrays[a].shape}"
            )
    x = _array(np.concatenate([arrays[a] for a, _ in pairs]), keys[0])
    y = np.concatenate([arrays[b].ravel() for _, b in pairs])
    return _Source(x, y, len(arrays[keys[0]]), 0, 1 / 255 if x.dtype == np.uint8 else 1.0)


def _open(target: str, failure: str) -> Any:
    """Return the splits of a folder or hub data set, a `datasets.DatasetDict`; DataError that begins with `failure`."""
    import datasets

    with _quiet():
        try:
            return datasets.load_dataset(target)
        except ConnectionError as error:
            raise DataError(f"{failure}; the hub could not be reached") from error
        except Exception as error:  # the builders of `datasets` raise whatever their readers raise
            raise DataError(f"{failure}; {_line(error)}") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the progress bars and log lines of `datasets` and the hub's client, and give them their voice back."""
    import datasets

    loggers = [logging.getLogger(library) for library in ("datasets", "huggingface_hub")]
    levels, bars = [logger.level for logger in loggers], datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if bars:
            datasets.enable_progress_bars()


def _read(name: str, splits: Any, image: str | None, label: str | None) -> _Source:
    """Decode the train and test splits of a `datasets.DatasetDict`."""
    from datasets import ClassLabel

    if "train" not in splits and len(splits) > 1:
        raise DataError(f"{name} has no train split among {_names(splits)}: call one of them train")
    train = splits["train"] if "train" in splits else next(iter(splits.values()))
    parts = [train, *(splits[s] for s in TEST_NAMES if s in splits and splits[s] is not train)][:2]
    features = train.features
    if lost := set(features) - set(parts[-1].features):
        raise DataError(f"{name}: the test split lacks {_names(lost)}: give both splits the same columns")
    classes = [column for column, feature in features.items() if isinstance(feature, ClassLabel)]
    label = _pick(features, label, LABEL_NAMES, "label") or (classes[0] if len(classes) == 1 else None)
    if label is None:
        raise DataError(f"{name} has no label column among {_names(features)}: name it, --set data.label=COLUMN")
    image = _pick(features, image, (), "image") or _find_input({c: f for c, f in features.items() if c != label})
    y = _values(parts, label)
    if y is None:
        raise DataError(f"{name}: column '{label}' holds no classes: name another one, --set data.label=COLUMN")
    declared = features[label].num_classes if label in classes else 0
    columns = {c: _values(parts, c) for c in features if c not in (image, label)}
    columns |= {c: np.array([*features[c].names, ""])[columns[c]] for c in classes if c in columns}  # −1: missing
    if image is None and (odd := [c for c, values in columns.items() if values is None]):
        raise DataError(
            f"{name}: {_names(odd)}: neither number nor category; FedForward reads images, vectors and tables"
        )
    x = None if image is None else _inputs(name, parts, image)
    scale = 1 / 255 if x is not None and x.dtype == np.uint8 else 1.0
    return _Source(x, y, len(train), declared, scale, {c: v for c, v in columns.items() if v is not None})


def _find_input(features: dict[str, Any]) -> str | None:
    """Return the column of images, else of vectors: the first with a usual name, or the first. None: a table."""
    for fits in (
        _is_image,
        lambda feature: hasattr(feature, "feature") or hasattr(feature, "shape"),
    ):  # List, Array2D …
        found = [column for column, feature in features.items() if fits(feature)]
        if found:
            return _pick(found, None, IMAGE_NAMES, "image") or found[0]
    return None


def _is_image(feature: Any) -> bool:
    """Say whether a column holds encoded images: the type Image, or the bytes that pandas writes for one."""
    from datasets import Image

    is_bytes = getattr(feature, "dtype", None) in ("binary", "large_binary")
    return isinstance(feature, Image) or is_bytes or (isinstance(feature, dict) and "bytes" in feature)


def _values(parts: list, column: str) -> np.ndarray | None:
    """Return a column of all rows as numbers (missing: NaN) or short strings (missing: ""), None if it is neither."""
    import pyarrow as pa
    import pyarrow.compute as pc

    values = pa.chunked_array([chunk for part in parts for chunk in part.data.column(column).chunks])
    if pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
        longest = pc.max(pc.utf8_length(values)).as_py() or 0
        return None if longest > _LONGEST else np.array(values.fill_null("").to_pylist(), dtype=str)
    if pa.types.is_integer(values.type) or pa.types.is_floating(values.type) or pa.types.is_boolean(values.type):
        return (values.cast(pa.float64()) if values.null_count else values).to_numpy()
    return None


def _inputs(name: str, parts: list, column: str) -> np.ndarray:
    """Return the images or vectors of all rows: (N, *shape)."""
    if _is_image(parts[0].features[column]):
        cells = (cell for part in parts for chunk in part.data.column(column).chunks for cell in chunk.to_pylist())
        return _decode(name, cells, sum(map(len, parts)))
    try:
        x = np.concatenate([np.array(part.with_format(None)[column][:]) for part in parts])
    except ValueError:
        raise DataError(f"{name}: rows of '{column}' differ in length: pad them to one length") from None
    return _array(x, column)


def _decode(name: str, cells: Iterable[Any], rows: int) -> np.ndarray:
    """Decode images, each its bytes or {bytes, path}: (rows, 1 or 3, height, width) uint8; grey if all of them are."""
    from PIL import Image

    log.info("decoding %s: %d images (once; kept in %s)", name, rows, _cache())
    x = None
    for row, cell in enumerate(cells):
        cell = cell if isinstance(cell, dict) else {"bytes": cell}
        try:
            with Image.open(io.BytesIO(cell["bytes"]) if cell["bytes"] else cell["path"]) as picture:
                grey = picture.mode in _GREY
                if x is None:
                    x = np.empty((rows, 1 if grey else 3, picture.height, picture.width), np.uint8)
                elif x.shape[1] == 1 and not grey:
                    x = np.repeat(x, 3, axis=1)
                pixels = np.asarray(picture.convert("L" if x.shape[1] == 1 else "RGB"))
        except (OSError, KeyError, AttributeError, ValueError) as error:
            raise DataError(f"{name}: image {row} cannot be read ({_line(error)}): repair or remove it") from None
        if pixels.shape[:2] != x.shape[2:]:
            (h, w), (height, width) = x.shape[2:], pixels.shape[:2]
            raise DataError(
                f"{name}: image {row} is {height}×{width}, those before are {h}×{w}: resize all to one size"
            )
        x[row] = pixels if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    return x


def _array(x: np.ndarray, name: str) -> np.ndarray:
    """Return inputs as uint8 or float32, images channels first; (N, height, width) gains a channel."""
    if x.dtype != np.uint8 and x.dtype.kind != "f":
        raise DataError(f"inputs '{name}' are {x.dtype}: give bytes (uint8) or floats")
    if x.ndim == 3:
        x = x[:, None]
    elif x.ndim == 4 and x.shape[1] not in (1, 3) and x.shape[3] in (1, 3):
        x = x.transpose(0, 3, 1, 2)
    return np.ascontiguousarray(x, np.uint8 if x.dtype == np.uint8 else np.float32)


# ---- the cache on disk ----------------------------------------------------------------------------------------------


def _cache() -> Path:
    return Path(os.environ.get("FEDFORWARD_CACHE") or "~/.cache/fedforward").expanduser()


def _stamp(files: Iterable[Path]) -> str:
    """Return a fingerprint of files: names, sizes and times of change."""
    marks = sorted((str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files if f.is_file())
    return hashlib.sha256(repr(marks).encode()).hexdigest()


def _key(*parts: str | None) -> str:
    """Return the cache's name for a source: readable, then a fingerprint of everything that decides its content."""
    readable = "".join(c if c.isalnum() else "-" for c in str(parts[0]))
    return f"{readable}-{hashlib.sha256(repr((_FORMAT, parts)).encode()).hexdigest()[:16]}"


def _cached(key: str, build: Callable[[], _Source]) -> _Source:
    """Return the source kept under `key`, its `x` memory-mapped; build and keep it where it is absent or broken."""
    folder = _cache()
    try:
        return _recall(folder, key)
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        log.warning("rebuilding the broken cache %s/%s (%s)", folder, key, _line(error))
    source = build()
    try:
        _keep(folder, key, source)
        return _recall(folder, key)
    except OSError as error:
        log.warning(
            "cannot keep the decoded data in %s (%s): set FEDFORWARD_CACHE to another folder", folder, _line(error)
        )
        return source


def _recall(folder: Path, key: str) -> _Source:
    """Open a kept source; "c" maps it copy on write, so PyTorch meets no read-only array."""
    with np.load(folder / f"{key}.npz") as file:
        rest = {name: file[name] for name in file.files}
    x = np.load(folder / f"{key}.npy", mmap_mode="c") if rest["has_x"] else None
    if x is not None and len(x) != len(rest["y"]):
        raise ValueError("its two files do not belong together")
    columns = {name.removeprefix("column/"): values for name, values in rest.items() if name.startswith("column/")}
    return _Source(x, rest["y"], int(rest["train"]), int(rest["classes"]), float(rest["scale"]), columns)


def _keep(folder: Path, key: str, source: _Source) -> None:
    """Write a source: `x` as .npy, the rest as .npz, each complete or not at all, the .npz last."""
    folder.mkdir(parents=True, exist_ok=True)
    if source.x is not None:
        _write(folder / f"{key}.npy", lambda file: np.save(file, source.x))
    numbers = {"train": source.train, "classes": source.classes, "scale": source.scale, "has_x": source.x is not None}
    columns = {f"column/{name}": values for name, values in source.columns.items()}
    _write(folder / f"{key}.npz", lambda file: np.savez(file, y=source.y, **numbers, **columns))


def _write(path: Path, save: Callable[[Any], None]) -> None:
    """Let `save` fill a temporary file beside `path`, then put it in place at once."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name, suffix=".tmp", delete=False) as file:
        try:
            save(file)
            file.close()
            os.replace(file.name, path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise


# ---- words ----------------------------------------------------------------------------------------------------------


def _pick(known: Iterable[str], named: str | None, usual: Iterable[str], keyword: str) -> str | None:
    """Return the column that was `named`, else the first `usual` one, else None; DataError if it is absent."""
    if named is None:
        return next((column for column in usual if column in known), None)
    if named not in known:
        raise DataError(f"no column '{named}' among {_names(known)}{near(named, known)}: --set data.{keyword}=COLUMN")
    return named


def near(word: str, known: Iterable[str]) -> str:
    """Return " (did you mean …?)" with the names closest to `word`, or nothing."""
    close = difflib.get_close_matches(word, list(known), n=3)
    return f" (did you mean {' or '.join(close)}?)" if close else ""


def _names(names: Iterable[str]) -> str:
    """Return names as a list in words, the first dozen of them."""
    names = list(names)
    return ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")


def _line(error: BaseException) -> str:
    """Return what an exception says on one line of at most 200 characters."""
    return " ".join(str(error).split())[:200] or type(error).__name__
