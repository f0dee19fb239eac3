"""Softmax with cross-entropy: the loss, its gradient in the class scores, and what a step observed of it."""

from __future__ import annotations

import torch
from torch import Tensor

from .rule import Batch, Stats


def cross_entropy(logits: Tensor, batch: Batch) -> tuple[Tensor, Stats]:
    """Return the weighted mean cross-entropy of `logits` (B, C), and the stats of it."""
    losses = torch.nn.functional.cross_entropy(logits, batch.y, reduction="none")
    stats = stats_of(losses.detach(), logits, batch)
    return losses.dot(batch.share(stats.weight)), stats


def cross_entropy_stats(logits: Tensor, batch: Batch) -> Stats:
    """Return the stats of the cross-entropy of `logits` (..., B, C)."""
    if logits.dim() == 2:
        losses = torch.nn.functional.cross_entropy(logits, batch.y, reduction="none")
    else:
        losses = _negated_at(logits.log_softmax(-1), batch.y)
    return stats_of(losses, logits, batch)


def softmax_error(logits: Tensor, batch: Batch) -> Tensor:
    """Return the gradient of the weighted mean cross-entropy in the logits: (softmax − onehot) · share, (..., B, C)."""
    return _error_(logits.softmax(-1), batch.y, batch.share())


def softmax_error_and_stats(logits: Tensor, batch: Batch) -> tuple[Tensor, Stats]:
    """Return the gradient of the cross-entropy in the logits, and the stats of it, from one softmax."""
    log_p = logits.log_softmax(-1)
    stats = stats_of(_negated_at(log_p, batch.y), logits, batch)
    return _error_(log_p.exp_(), batch.y, batch.share(stats.weight)), stats


def _negated_at(log_p: Tensor, y: Tensor) -> Tensor:
    """Return −log p of each sample's class, (..., B)."""
    return log_p.gather(-1, y.unsqueeze(-1)).squeeze(-1).neg()


def _error_(softmax: Tensor, y: Tensor, share: Tensor) -> Tensor:
    share = share.unsqueeze(-1)
    return softmax.mul_(share).scatter_add_(-1, y.unsqueeze(-1), -share)


def onehot(y: Tensor, classes: int, dtype: torch.dtype) -> Tensor:
    """Return labels (B,) as rows (B, C) of zeros and a one, without asking the device for a value."""
    return (y[:, None] == torch.arange(classes, device=y.device)).to(dtype)


def stats_of(losses: Tensor, logits: Tensor, batch: Batch) -> Stats:
    """Return the stats of per-sample `losses` (..., B) and class scores `logits` (..., B, C)."""
    correct = (logits.argmax(-1) == batch.y).to(batch.weight.dtype)
    return Stats(_dot(losses, batch.weight), _dot(correct, batch.weight), batch.weight.sum(-1))


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return a.dot(b) if a.dim() == 1 else (a * b).sum(-1)
