"""The log of seeds and scalars from which any replica is rebuilt.

A round of a scalar rule is (round, learning rate, averaged scalars); the directions follow from the run seed. Replaying
the rounds on the initial model gives the server's model bit for bit, on any machine.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..algorithms.rule import ScalarRule, Tensors
from ..algorithms.seeds import Place


class ScalarRound(NamedTuple):
    """One round of the log."""

    round: int
    lr: float
    scalars: Tensor  # (steps · K,) float32


def apply_round(rule: ScalarRule, params: Tensors, seed: int, server_round: int, scalars: Tensor, lr: float) -> None:
    """Apply one round's averaged scalars (steps · K,) to `params` in place, step after step."""
    for step, answer in enumerate(scalars.view(-1, rule.directions)):
        draws = rule.draw(Place(seed, server_round, client=-1, step=step), 0, 0)
        rule.apply(params, draws, answer, lr)


def rebuild(rule: ScalarRule, params: Tensors, seed: int, log: Iterable[ScalarRound]) -> Tensors:
    """Replay `log` on the initial `params`, in place, and return them."""
    for server_round, lr, scalars in log:
        apply_round(rule, params, seed, server_round, scalars, lr)
    return params


def to_blob(scalars: Tensor) -> bytes:
    """Return scalars as little-endian float32 bytes, as the run database keeps them."""
    return scalars.numpy().astype("<f4").tobytes()


def from_blob(blob: bytes) -> Tensor:
    """Return the scalars of a run database's blob."""
    return torch.from_numpy(np.frombuffer(blob, dtype="<f4").astype(np.float32))
