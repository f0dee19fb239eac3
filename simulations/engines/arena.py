"""Models in memory that processes share: written by one, seen by all, copied by none.

The memory is anonymous: it has no name that could be left behind, and goes with the last process that maps it.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Mapping
from multiprocessing import reduction
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...algorithms.rule import Tensors

ALIGNED = 64  # bytes; as PyTorch aligns its own tensors, so that kernels sum in the same order on both


class Arena:
    """Places for a number of models of the same parameters; it can be given to a process that begins.

    Args:
        params: the parameters, float32; only keys and shapes are looked at.
        places: number of models.
    """

    def __init__(self, params: Mapping[str, Tensor], places: int) -> None:
        self.shapes = {key: tuple(p.shape) for key, p in params.items()}
        self.places = places
        self._fd = os.memfd_create("fedforward") if hasattr(os, "memfd_create") else _temporary_file()
        os.truncate(self._fd, max(self.places * self._stride, 1))
        self._map()

    @property
    def _stride(self) -> int:
        return sum(_aligned(4 * int(np.prod(shape))) for shape in self.shapes.values())

    def _map(self) -> None:
        self._memory = mmap.mmap(self._fd, max(self.places * self._stride, 1))

    def model(self, place: int) -> Tensors:
        """Return the model at a place: tensors in shared memory."""
        params, offset = {}, place * self._stride
        for key, shape in self.shapes.items():
            count = int(np.prod(shape))
            values = np.frombuffer(self._memory, np.float32, count, offset).reshape(shape)
            params[key] = torch.from_numpy(values)
            offset += _aligned(4 * count)
        return params

    def __getstate__(self) -> dict[str, Any]:
        return {"shapes": self.shapes, "places": self.places, "fd": reduction.DupFd(self._fd)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.shapes, self.places, self._fd = state["shapes"], state["places"], state["fd"].detach()
        self._map()

    def close(self) -> None:
        """Let go of the memory's file; it stays mapped as long as a tensor needs it."""
        os.close(self._fd)


def _aligned(size: int) -> int:
    return -(-size // ALIGNED) * ALIGNED


def _temporary_file() -> int:
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())
