"""Where data comes from: scikit-learn's digits, an .npz file, a folder, or a data set of the Hugging Face hub.

`source` opens what a name means, finds its columns, decodes it and gives it as arrays, through the cache on disk.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import zipfile
from collections.abc import Iterable, Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from .cache import Source, cache_folder, cache_key, cached, fingerprint
from .refusal import DataError, listed, near, one_line, require

BUILT_IN = ("digits",)
IMAGE_NAMES = ("image", "img", "images", "pixel_values", "pixels", "x", "x_train", "train_images", "data", "features")
LABEL_NAMES = ("label", "labels", "fine_label", "y", "y_train", "train_labels", "target", "targets", "class")
TEST_NAMES = ("test", "validation", "valid")  # splits that serve as the central test split, best first

_GREY = ("1", "L", "LA", "I;16", "I")  # Pillow's modes with one channel; every other image becomes RGB
_LONGEST = 100  # characters of a category; longer strings are free text

log = logging.getLogger("fedforward")


def locate(name: str) -> Path | None:
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


def source(name: str, path: Path | None, stamp: str, image: str | None, label: str | None) -> Source:
    """Open what `name` means.

    Args:
        name: see `datasets.load`.
        path: what `locate` says of it.
        stamp: fingerprint of the files under `path`.
        image: column of the inputs, or None to find it.
        label: column of the classes, or None to find it.
    """
    key = partial(cache_key, path.stem if path else name, image, label)
    if name in BUILT_IN:
        return cached(key(version("scikit-learn")), _digits)
    if path is None:
        return _from_hub(name, key, image, label)
    if path.suffix == ".npz":
        return cached(key(str(path), stamp), partial(_read_npz, path, image, label))
    if path.is_file():
        raise DataError(f"{name} is a file: give the folder it lies in, or an .npz file")
    failure = f"{name} is no data set folder (parquet, csv, json or images)"
    return cached(key(str(path), stamp), lambda: _read(path.name, _open(str(path), failure), image, label))


def _from_hub(name: str, key: partial[str], image: str | None, label: str | None) -> Source:
    """Open a data set of the hub; it is kept as long as the files that `datasets` made of it."""
    if "/" not in name and (close := near(name, BUILT_IN)):
        raise DataError(f"no data set '{name}'{close}")
    known = f"{', '.join(BUILT_IN)}, a folder, an .npz file or a hub name"
    splits = _open(name, f"no data set '{name}': expected {known}")
    files = [Path(file["filename"]) for part in splits.values() for file in part.cache_files]
    build = partial(_read, name, splits, image, label)
    return cached(key(fingerprint(files)), build) if files else build()


def _digits() -> Source:
    """Return scikit-learn's 1,797 digits of 8×8 pixels 0 … 16."""
    from sklearn.datasets import load_digits

    found = load_digits()
    return Source(found.images.astype(np.uint8)[:, None], found.target, len(found.target), 10, 1 / 16)


def _read_npz(path: Path, image: str | None, label: str | None) -> Source:
    """Read the arrays of an .npz: inputs, labels, and their test twins (`x_test`, `test_images`) if there are any."""
    try:
        with np.load(path) as file:
            arrays = {key: file[key] for key in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} cannot be read ({one_line(error)}): save plain arrays with numpy.savez") from None
    keys = _pick(arrays, image, IMAGE_NAMES, "image"), _pick(arrays, label, LABEL_NAMES, "label")
    if None in keys:
        lacking = "labels" if keys[0] else "inputs"
        raise DataError(f"{path.name} has no {lacking} among {listed(arrays)}: name them x and y")
    twins = [next((t for t in (f"{k}_test", k.replace("train", "test")) if t != k and t in arrays), None) for k in keys]
    pairs = [keys] if None in twins else [keys, tuple(twins)]
    for a, b in pairs:
        if arrays[b].size != len(arrays[a]):
            needs = f"'{b}' {arrays[b].shape} must hold one class for each row of '{a}' {arrays[a].shape}"
            raise DataError(f"{path.name}: {needs}")
    x = _array(np.concatenate([arrays[a] for a, _ in pairs]), keys[0])
    y = np.concatenate([arrays[b].ravel() for _, b in pairs])
    return Source(x, y, len(arrays[keys[0]]), 0, _scale(x))


# ---- folders and the hub: what `datasets.load_dataset` reads ---------------------------------------------------------


def _open(target: str, failure: str) -> Any:
    """Return the splits of a folder or hub data set, a `datasets.DatasetDict`; DataError that begins with `failure`."""
    import datasets

    with _quiet():
        try:
            return datasets.load_dataset(target)
        except ConnectionError as error:
            raise DataError(f"{failure}; the hub could not be reached") from error
        except Exception as error:  # the builders of `datasets` raise whatever their readers raise
            raise DataError(f"{failure}; {one_line(error)}") from error


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


def _read(name: str, splits: Any, image: str | None, label: str | None) -> Source:
    """Decode the train and test splits of a `datasets.DatasetDict`."""
    from datasets import ClassLabel

    parts = _train_and_test(name, splits)
    features = parts[0].features
    names = {c: feature.names for c, feature in features.items() if isinstance(feature, ClassLabel)}
    label = _pick(features, label, LABEL_NAMES, "label") or (next(iter(names)) if len(names) == 1 else None)
    if label is None:
        raise DataError(f"{name} has no label column among {listed(features)}: name it, --set data.label=COLUMN")
    image = _pick(features, image, (), "image") or _find_input({c: f for c, f in features.items() if c != label})
    y = _values(parts, label)
    if y is None:
        raise DataError(f"{name}: column '{label}' holds no classes: name another one, --set data.label=COLUMN")
    columns = {c: _values(parts, c) for c in features if c not in (image, label)}
    columns |= {c: np.array([*names[c], ""])[columns[c]] for c in names if c in columns}  # −1: missing
    if image is None and (odd := [c for c, values in columns.items() if values is None]):
        what = "neither number nor category; FedForward reads images, vectors and tables"
        raise DataError(f"{name}: {listed(odd)}: {what}")
    x = None if image is None else _inputs(name, parts, image)
    columns = {c: values for c, values in columns.items() if values is not None}
    return Source(x, y, len(parts[0]), len(names.get(label, ())), _scale(x), columns)


def _train_and_test(name: str, splits: Any) -> list:
    """Return the train split and, where there is one, the test split."""
    if "train" not in splits and len(splits) > 1:
        raise DataError(f"{name} has no train split among {listed(splits)}: call one of them train")
    train = splits["train"] if "train" in splits else next(iter(splits.values()))
    parts = [train, *(splits[s] for s in TEST_NAMES if s in splits and splits[s] is not train)][:2]
    if lost := set(train.features) - set(parts[-1].features):
        raise DataError(f"{name}: the test split lacks {listed(sorted(lost))}: give both splits the same columns")
    return parts


def _find_input(features: dict[str, Any]) -> str | None:
    """Return the column of images, else of vectors: the first with a usual name, or the first. None: a table."""
    for fits in (_is_image, _is_vector):
        if found := [column for column, feature in features.items() if fits(feature)]:
            return _pick(found, None, IMAGE_NAMES, "image") or found[0]
    return None


def _is_image(feature: Any) -> bool:
    """Say whether a column holds encoded images: the type Image, or the bytes that pandas writes for one."""
    from datasets import Image

    is_bytes = getattr(feature, "dtype", None) in ("binary", "large_binary")
    return isinstance(feature, Image) or is_bytes or (isinstance(feature, dict) and "bytes" in feature)


def _is_vector(feature: Any) -> bool:
    return hasattr(feature, "feature") or hasattr(feature, "shape")  # List, Array2D …


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

    log.info("decoding %s: %d images (once; kept in %s)", name, rows, cache_folder())
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
            raise DataError(f"{name}: image {row} cannot be read ({one_line(error)}): repair or remove it") from None
        if pixels.shape[:2] != x.shape[2:]:
            (h, w), (height, width) = x.shape[2:], pixels.shape[:2]
            raise DataError(f"{name}: image {row} is {height}×{width}, those before {h}×{w}: resize all to one size")
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


def _scale(x: np.ndarray | None) -> float:
    return 1 / 255 if x is not None and x.dtype == np.uint8 else 1.0


def _pick(known: Iterable[str], named: str | None, usual: Iterable[str], option: str) -> str | None:
    """Return the column that was `named`, else the first `usual` one, else None; DataError if it is absent."""
    if named is None:
        return next((column for column in usual if column in known), None)
    require("column", named, known, f"data.{option}=COLUMN")
    return named
