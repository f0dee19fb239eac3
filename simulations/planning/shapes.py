"""The shape of a data set without the data: all that a plan needs of it."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from ..datasets import DataSet, Samples
from ..experiment import Experiment, ExperimentError
from ..naming import is_reference
from ..parts import build_data
from ..refusal import closest

# By the names under which the data sets are known; what is named here is neither read nor downloaded.
KNOWN = {
    "digits": ((1, 8, 8), 10),
    "mnist": ((1, 28, 28), 10),
    "fashion_mnist": ((1, 28, 28), 10),
    "cifar10": ((3, 32, 32), 10),
    "cifar100": ((3, 32, 32), 100),
    "svhn": ((3, 32, 32), 10),
}


def find_shape(experiment: Experiment, shape: str | None, classes: int | None) -> DataSet:
    """Return data of the shape and classes given, or else the experiment's, read only if there is no other way.

    Raises:
        ExperimentError, DataError: if there is neither.
    """
    if shape is not None:
        for option in experiment.set.get("data", {}):
            raise ExperimentError(f"--shape stands for data, which have options: drop data.{option}")
        return data_like(shape, classes)
    if classes is not None:
        raise ExperimentError(f"--classes goes with --shape: drop it, the classes of {experiment.data} are known")
    return data_of(experiment)


def data_of(experiment: Experiment) -> DataSet:
    """Return the experiment's data: without a row if its shape is known, else the data themselves.

    Raises:
        ExperimentError, DataError: if there is no such data, with the near names.
    """
    name = experiment.data
    if is_reference(name) or Path(name).expanduser().exists() or experiment.set.get("data"):
        return build_data(experiment)  # options may change the classes
    if name in KNOWN:
        return without_rows(name, *KNOWN[name])
    if "/" not in name and (near := closest(name, KNOWN)):
        raise ExperimentError(
            f"unknown data '{name}': did you mean {near}? known shapes: {', '.join(KNOWN)}; else a folder, an .npz,"
            " owner/name on the hub, or --shape 1x28x28 --classes 10"
        )
    return build_data(experiment)


def data_like(shape: str, classes: int | None) -> DataSet:
    """Return data without a row, of a shape such as `1x28x28` and so many classes.

    Raises:
        ExperimentError: if either is missing or is none.
    """
    if not re.fullmatch(r"0*[1-9]\d*(x0*[1-9]\d*)*", shape):
        raise ExperimentError(f"--shape wants sizes above 0, as in 1x28x28 (channels first) or 784, not '{shape}'")
    if classes is None or classes < 2:
        told = "nothing" if classes is None else classes
        raise ExperimentError(f"--shape needs the number of classes, at least 2, as in --classes 10; it has {told}")
    return without_rows(shape, tuple(int(size) for size in shape.split("x")), classes)


def without_rows(name: str, shape: tuple[int, ...], classes: int) -> DataSet:
    """Return a data set that has a shape and classes, and no samples."""
    none = torch.empty(0, dtype=torch.int64)
    empty = Samples(torch.empty(0, *shape), none, none, 1.0)
    return DataSet(name, empty, empty, classes, shape, {})
