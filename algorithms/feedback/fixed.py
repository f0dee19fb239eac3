"""Fixed random matrices: they follow from the run seed, so they are the same on every client and never sent.

A device keeps them, or makes them again wherever they are used and drops them: then it keeps one number, and no more
than one of them at a time. What is made again is of the same kind and size, with other numbers than what is kept.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..network import Network
from ..noise import normals, uniforms
from ..rule import RuleError, Tensors
from ..seeds import Purpose, generator, integer_seed

KINDS = ("uniform", "normal", "sign", "ternary")
AT_ONCE = 1 << 14  # numbers, even: about 200 KiB of temporaries


def feedback(seed: int, i: int, classes: int, width: int, scale: float, kind: str = "uniform") -> Tensor:
    """Return matrix `i` of a run, (classes, width), whose numbers are scale/√width times those of a kind.

    "uniform" is U(−1, 1), "normal" N(0, 1)/√classes, "sign" −1 or 1, "ternary" −1, 0 or 1 with equal chances.

    Raises:
        RuleError: if the scale is not above 0.
    """
    _check(scale)
    rng, shape = generator(seed, Purpose.FIXED, i), (classes, width)
    if kind == "uniform":
        draws = rng.uniform(-1, 1, shape)
    elif kind == "normal":
        draws = rng.standard_normal(shape) / classes**0.5
    else:
        draws = rng.choice([-1.0, 1.0] if kind == "sign" else [-1.0, 0.0, 1.0], shape)
    return torch.from_numpy(scale * draws / width**0.5).to(torch.float32)


def feedbacks(net: Network, seed: int, scale: float, kind: str = "uniform", regenerate: bool = False) -> Tensors:
    """Return "{l}.feedback" (C, features of block l) for each hidden block, or the "seed" that they are made of."""
    if regenerate:
        return kept_seed(seed, scale)
    widths = {i: features(net, i) for i in net.hidden}
    return {f"{i}.feedback": feedback(seed, i, net.classes, width, scale, kind) for i, width in widths.items()}


def feedback_of(
    fixed: Tensors, net: Network, i: int, scale: float, dtype: torch.dtype, kind: str = "uniform"
) -> Tensor:
    """Return block i's matrix as `feedbacks` has it, kept or made again."""
    if "seed" not in fixed:
        return fixed[f"{i}.feedback"]
    width = features(net, i)
    return remade(fixed["seed"], i, torch.Size((net.classes, width)), scale / width**0.5, dtype, kind)


def xavier(shape: torch.Size) -> float:
    """Return the root mean square of Glorot's weights of this shape: √(2 / (fan in + fan out))."""
    fan_in, field = shape[1:].numel(), shape[2:].numel()
    return (2 / (fan_in + shape[0] * field)) ** 0.5


def uniform(generator: np.random.Generator, shape: torch.Size, rms: float) -> Tensor:
    """Return numbers of mean 0 and this root mean square, uniform."""
    return torch.from_numpy(generator.uniform(-1, 1, tuple(shape)) * (3**0.5 * rms)).to(torch.float32)


def features(net: Network, i: int) -> int:
    """Return how many numbers block i makes of a sample."""
    return torch.Size(net.sizes[i]).numel()


def kept_seed(seed: int, scale: float = 1.0) -> Tensors:
    """Return what is kept in place of matrices: the "seed" () int64.

    Raises:
        RuleError: if the scale is not above 0.
    """
    _check(scale)
    return {"seed": torch.tensor(integer_seed(seed, Purpose.FIXED))}


def remade(seed: Tensor, i: int, shape: torch.Size, size: float, dtype: torch.dtype, kind: str = "uniform") -> Tensor:
    """Return matrix `i` of this shape, `size` times numbers of a kind (see `feedback`; of "normal" C = shape[0]).

    Some twenty operations a number, most of them on integers, a piece at a time.
    """
    matrix = torch.empty(shape, dtype=dtype, device=seed.device)
    flat = matrix.view(-1)
    for first in range(0, len(flat), AT_ONCE):
        piece = flat[first : first + AT_ONCE]
        piece.copy_(_numbers(seed, i, first, len(piece), dtype, kind, shape[0]).mul_(size))
    return matrix


def _numbers(seed: Tensor, i: int, first: int, count: int, dtype: torch.dtype, kind: str, classes: int) -> Tensor:
    if kind == "normal":
        return normals(seed, i, count, dtype, first // 2).div_(classes**0.5)
    u = uniforms(seed, i, count, dtype, first // 2)
    if kind == "uniform":
        return u.mul_(2).sub_(1)
    if kind == "sign":
        return u.sub_(0.5).sign_()
    return u.mul_(3).floor_().sub_(1)


def _check(scale: float) -> None:
    if scale <= 0:
        raise RuleError("fixed random matrices need a rule.scale above 0")
