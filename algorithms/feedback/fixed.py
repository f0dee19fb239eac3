"""Fixed random matrices: they follow from the run seed, so they are the same on every client and never sent."""

from __future__ import annotations

import torch
from torch import Tensor

from ..network import Network
from ..seeds import Purpose, generator


def feedback(seed: int, i: int, classes: int, width: int, scale: float) -> Tensor:
    """Return matrix `i` of a run, (classes, width), uniform in ±scale/√width."""
    draws = generator(seed, Purpose.FIXED, i).uniform(-1, 1, (classes, width))
    return torch.from_numpy(scale * draws / width**0.5).to(torch.float32)


def feedbacks(net: Network, seed: int, scale: float) -> dict[str, Tensor]:
    """Return "{l}.feedback" (C, features of block l) for each hidden block."""
    widths = {i: torch.Size(net.sizes[i]).numel() for i in net.hidden}
    return {f"{i}.feedback": feedback(seed, i, net.classes, width, scale) for i, width in widths.items()}
