"""Sparse evolution: an evolution strategy that gives up the weights it is least sure of, and searches the others.

R. T. Lange, H. Sprekeler, "Lottery Tickets in Evolutionary Optimization: On Sparse Backpropagation-Free Trainability",
ICML 2023, arXiv 2306.00045. A strategy knows a mean m and a spread s of each weight; from time to time

    prune the weights of the smallest |m| / s, of all layers together, until a part ρ_n = max(ρ, r^n) is left
    search on among those that are left

The fewer coordinates d' are left, the nearer the gradient is the estimate: cosine √(K / (K + d' + 1)).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..directions import Directions
from ..network import Network
from ..rule import Batch, RuleError, State, Stats, Tensors
from .evolution import Evolution


@dataclass(frozen=True)
class SparseEvolution(Evolution):
    """Evolution among the weights that iterative pruning has left.

    A pruned weight is exactly 0, and stays so: the model is its own mask. It costs nothing on the wire, where scalars
    travel as well as where the model does, and every replica that replays the scalars prunes the same weights.

    Stores during a step: what `Evolution` stores and the mask, 1 byte a weight (biases and other vectors are exempt).
    Pruning looks for its threshold by bisection, slice by slice, and needs less than the step.

    Departs from the paper: the spread of sign mutations is σ for every weight, and each of their steps moves all
    weights equally far, so that |m| / s is in the order of |m|, and no spread is kept. Pruning goes on from the weights
    as they are; the paper rewinds them to those of the start and searches anew, for 20 whole runs. A weight that begins
    at 0 counts as pruned.

    Attributes:
        density: ρ, the part of the weights that is left in the end.
        rate: r, the part of them that each pruning leaves; 1 never prunes.
        every: rounds from one pruning to the next; the n-th is in the first step of round n · `every`.
        lr, sigma, shaping, directions, own, chunk, abreast: see `Evolution`.
    """

    name: ClassVar[str] = "sparse-evolution"
    paper: ClassVar[str] = "Lange & Sprekeler, ICML 2023, arXiv 2306.00045"
    linear: ClassVar[bool] = False

    density: float = 0.5
    rate: float = 0.8
    every: int = 10

    def __post_init__(self) -> None:
        if not (0 < self.density <= 1 and 0 < self.rate <= 1 and self.every >= 1):
            raise RuleError(f"{self.name} needs density and rate above 0 and not above 1, and every ≥ 1")
        super().__post_init__()

    def probe(self, net: Network, state: State, batch: Batch, lr: float) -> tuple[Tensor, Stats]:
        """Return the losses of the 2K members, which differ in the weights that are left; see `Evolution`."""
        mask = pruned(state.params)

        def add(params: Tensors, k: int, c: float, chunk: int) -> None:
            batch.draws.add(params, k, c, chunk)
            silence(params, mask)

        return self.losses(net, state, batch, add)

    def descend(self, state: State, draws: Sequence[Directions], coefficients: Tensor, lr: float) -> None:
        """Step along what is left of the directions, and prune if it is time to."""
        mask = pruned(state.params)
        super().descend(state, draws, coefficients, lr)
        silence(state.params, mask)
        del mask
        prunings, rest = divmod(draws[0].round, self.every)
        if prunings and not rest and not draws[0].step:
            prune(state.params, max(self.density, self.rate**prunings), self.chunk)


def pruned(params: Tensors) -> Tensors:
    """Return which weights are pruned, bool."""
    return {key: p == 0 for key, p in params.items() if p.dim() > 1}


def silence(params: Tensors, mask: Tensors) -> None:
    """Set the pruned weights to 0, in place."""
    for key, gone in mask.items():
        params[key].masked_fill_(gone, 0.0)


def prune(params: Tensors, density: float, chunk: int) -> None:
    """Set the smallest weights of all layers to 0, in place, so that at most a part `density` is left.

    Comparing and counting are exact, so the same weights go on every machine.
    """
    weights = [part for p in params.values() if p.dim() > 1 for part in p.view(-1).split(chunk)]
    wanted = density * sum(part.numel() for part in weights)
    low, high = 0.0, torch.stack([part.abs().max() for part in weights]).max()  # above high are not too many
    for _ in range(32):
        middle = (low + high) / 2
        many = sum((part.abs() > middle).sum() for part in weights) > wanted
        low, high = torch.where(many, middle, low), torch.where(many, high, middle)
    for part in weights:
        part.masked_fill_(part.abs() <= high, 0.0)
