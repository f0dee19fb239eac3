"""Fixed random matrices: they follow from the run seed, so they are the same on every client and never sent."""

from __future__ import annotations

import torch
from torch import Tensor

from ..network import Network
from ..rule import RuleError
from ..seeds import Purpose, generator

KINDS = ("uniform", "normal", "sign", "ternary")


def feedback(seed: int, i: int, classes: int, width: int, scale: float, kind: str = "uniform") -> Tensor:
    """Return matrix `i` of a run, (classes, width), whose numbers are scale/√width times those of a kind.

    "uniform" is U(−1, 1), "normal" N(0, 1)/√classes, "sign" −1 or 1, "ternary" −1, 0 or 1 with equal chances.

    Raises:
        RuleError: if the scale is not above 0.
    """
    if scale <= 0:
        raise RuleError("fixed random matrices need a rule.scale above 0")
    rng, shape = generator(seed, Purpose.FIXED, i), (classes, width)
    if kind == "uniform":
        draws = rng.uniform(-1, 1, shape)
    elif kind == "normal":
        draws = rng.standard_normal(shape) / classes**0.5
    else:
        draws = rng.choice([-1.0, 1.0] if kind == "sign" else [-1.0, 0.0, 1.0], shape)
    return torch.from_numpy(scale * draws / width**0.5).to(torch.float32)


def feedbacks(net: Network, seed: int, scale: float, kind: str = "uniform") -> dict[str, Tensor]:
    """Return "{l}.feedback" (C, features of block l) for each hidden block."""
    widths = {i: torch.Size(net.sizes[i]).numel() for i in net.hidden}
    return {f"{i}.feedback": feedback(seed, i, net.classes, width, scale, kind) for i, width in widths.items()}
