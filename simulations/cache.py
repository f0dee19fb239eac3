"""The cache of decoded data under `$FEDFORWARD_CACHE` (default `~/.cache/fedforward`).

A source is decoded once and kept under a key of everything that decides its content: `<key>.npy` holds the inputs and
is memory-mapped, `<key>.npz` holds the rest. Nothing there is the only copy: a file may be deleted at any time.
"""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

_FORMAT = 1  # raise it when `Source` or its decoding changes

log = logging.getLogger("fedforward")


@dataclass(frozen=True)
class Source:
    """A data set as it was found: both splits one under the other, N rows, those of the train split first."""

    x: np.ndarray | None  # (N, *shape) uint8 or float32; None for a table, whose features are its columns
    y: np.ndarray  # (N,) labels as found, numbers or strings
    train: int  # rows of the train split; N where there is no test split
    classes: int  # as the source declares them; 0: as many as occur
    scale: float  # see datasets.Samples
    columns: dict[str, np.ndarray] = field(default_factory=dict)  # (N,) each, numbers or short strings


def cache_folder() -> Path:
    """Return the folder of the cache."""
    return Path(os.environ.get("FEDFORWARD_CACHE") or "~/.cache/fedforward").expanduser()


def cache_key(*parts: str | None) -> str:
    """Return the cache's name for a source: `parts[0]`, readable, then a fingerprint of all `parts`."""
    readable = "".join(c if c.isalnum() else "-" for c in str(parts[0]))
    return f"{readable}-{hashlib.sha256(repr((_FORMAT, parts)).encode()).hexdigest()[:16]}"


def fingerprint(files: Iterable[Path]) -> str:
    """Return a fingerprint of files: names, sizes and times of change."""
    marks = sorted((str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files if f.is_file())
    return hashlib.sha256(repr(marks).encode()).hexdigest()


def cached(key: str, build: Callable[[], Source]) -> Source:
    """Return the source kept under `key`, its `x` memory-mapped; build and keep it where it is absent or broken."""
    folder = cache_folder()
    try:
        return _recall(folder, key)
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        log.warning("rebuilding the broken cache %s/%s (%s)", folder, key, error)
    source = build()
    try:
        _keep(folder, key, source)
        return _recall(folder, key)
    except OSError as error:
        log.warning("cannot keep the decoded data in %s (%s): set FEDFORWARD_CACHE to another folder", folder, error)
        return source


def _recall(folder: Path, key: str) -> Source:
    """Open a kept source; "c" maps it copy on write, so PyTorch meets no read-only array."""
    with np.load(folder / f"{key}.npz") as file:
        rest = {name: file[name] for name in file.files}
    x = np.load(folder / f"{key}.npy", mmap_mode="c") if rest["has_x"] else None
    columns = {name.removeprefix("column/"): values for name, values in rest.items() if name.startswith("column/")}
    return Source(x, rest["y"], int(rest["train"]), int(rest["classes"]), float(rest["scale"]), columns)


def _keep(folder: Path, key: str, source: Source) -> None:
    """Write a source, each of its files complete or not at all, the .npz last."""
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
