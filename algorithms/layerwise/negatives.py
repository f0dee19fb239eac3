"""What Forward-Forward is to be quiet for, beside labels drawn blindly: labels that are easily mistaken, and hybrids.

G. Hinton, arXiv 2212.13345, 2022, sections 3.2 and 3.3. A hard label is a wrong one drawn by the softmax of a read-out.
A hybrid is m x + (1 − m) x', whose smooth mask m of 0 and 1 keeps what is near together and breaks what is far.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..network import Network
from ..noise import seeds, signs, words
from ..rule import RuleError
from ..seeds import Place, Purpose, generator

NEGATIVES = ("label", "hybrid", "hard")
BLURS = 6  # of a mask


def demand_room(negatives: str, net: Network) -> None:
    """Refuse a network whose inputs have no room for a label, or of which no hybrids can be made."""
    inputs = torch.Size(net.shape).numel()
    if negatives == "hybrid":
        if len(net.shape) < 2:
            raise RuleError("hybrids want samples with neighbours, (channels, ...): use rule.negatives=label")
    elif inputs <= net.classes:
        raise RuleError(f"the label is written into the first {net.classes} inputs, and there are only {inputs}")


def chances(negatives: str, place: Place, batch_size: int, classes: int) -> Tensor:
    """Return what a batch's negatives are made of, one a sample (B,).

    Of labels, offsets in 1 … C − 1 that turn right ones into wrong ones, uniformly; of hard ones, numbers in [0, 1); of
    hybrids, seeds.
    """
    if negatives == "hybrid":
        return seeds(place, batch_size)
    rng = generator(place.seed, Purpose.RULE, place.round, place.client, place.step)
    if negatives == "hard":
        return torch.from_numpy(rng.random(batch_size, dtype="float32"))
    return torch.from_numpy(rng.integers(1, classes, batch_size))


def hard_offsets(scores: Tensor, y: Tensor, uniform: Tensor) -> Tensor:
    """Return offsets (B,) in 1 … C − 1 from labels y to wrong ones, drawn by the softmax of the scores (B, C) of these.

    Args:
        scores: of all classes.
        y: right labels (B,).
        uniform: chance (B,), in [0, 1).
    """
    classes = scores.shape[1]
    others = (y[:, None] + torch.arange(1, classes, device=y.device)) % classes
    reached = scores.gather(1, others).softmax(1).cumsum(1)
    drawn = uniform.to(scores.dtype)[:, None] * reached[:, -1:]
    return (reached <= drawn).sum(1).clamp_max(classes - 2) + 1


def hybrids(x: Tensor, weight: Tensor, seeds: Tensor) -> Tensor:
    """Return each sample of x (B, channels, ...) mixed with another that counts, by a smooth mask of chance.

    Args:
        x: the samples.
        weight: (B,), 0 of those that do not count: nobody's partners.
        seeds: of the partner and the mask, (B,) int64.
    """
    mask = next(signs(seeds, 1, 1, x[0, 0].numel(), x.dtype)).reshape(len(x), *x.shape[2:])
    for _ in range(BLURS):
        for axis in range(1, mask.dim()):
            mask = _blurred(mask, axis)
    return torch.where((mask > 0).unsqueeze(1), x, x[partners(weight, seeds)])


def partners(weight: Tensor, seeds: Tensor) -> Tensor:
    """Return for each sample another of those that count (B,), all as likely; itself if it is alone.

    Samples are numbered among those that count, so that what does not count changes no choice.
    """
    counts = weight > 0
    order, number = counts.logical_not().to(torch.uint8).argsort(stable=True), counts.cumsum(0) - 1
    total = counts.sum()
    ahead = 1 + words(seeds, 0, 1)[:, 0] % (total - 1).clamp_min(1)
    return order[(number + ahead) % total.clamp_min(1)]


def _blurred(mask: Tensor, axis: int) -> Tensor:
    """Return ¼, ½, ¼ of the neighbours along an axis; beyond the edge is 0. Of signs exact in float32, 6 times each."""
    out, size = mask / 2, mask.shape[axis] - 1
    out.narrow(axis, 1, size).add_(mask.narrow(axis, 0, size), alpha=0.25)
    out.narrow(axis, 0, size).add_(mask.narrow(axis, 1, size), alpha=0.25)
    return out
