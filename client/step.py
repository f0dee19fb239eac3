"""One training step of any rule, whole or in parts, with or without the meter.

The step that trains and the step that a plan runs on tensors without data are this same code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from ..algorithms.network import Network
from ..algorithms.rule import Batch, GradientRule, Rule, State, Stats, Tensors
from ..algorithms.scalar_rule import ScalarRule
from .memory import PeakMemory

Load = Callable[[Any], tuple[Tensor, Tensor]]  # rows -> inputs (B, *shape), labels (B,)


def take_step(
    rule: Rule, net: Network, state: State, parts: Iterable[Batch], lr: float, meter: PeakMemory | None = None
) -> tuple[Stats, Tensor | None]:
    """Learn from one batch, in place on `state`, and return (stats, what a scalar rule would send, else None).

    Args:
        rule: the rule.
        net: the network.
        state: the replica; if it holds `gradients` the parts add up to one update, else there is one part.
        parts: the batch, or its parts one after the other; each is dropped before the next is asked for.
        lr: the step's learning rate.
        meter: follows the step's memory. The batch comes from outside: what loading it takes is not the rule's.
    """
    watched = meter or nullcontext()
    for gradient in state.gradients.values():
        gradient.zero_()
    stats = answer = draws = None
    with torch.no_grad():
        for part in parts:
            if meter:
                meter.hold("batch", tensors_of(part))
            with watched:
                if isinstance(rule, ScalarRule):
                    draws, (numbers, more) = part.draws, rule.probe(net, state, part, lr)
                    answer = numbers if answer is None else answer.add_(numbers)
                    del numbers
                else:
                    more = rule.step(net, state, part, lr)
                stats = more if stats is None else Stats(*(a + b for a, b in zip(stats, more, strict=True)))
                del more
            del part
        with watched:
            if isinstance(rule, ScalarRule):
                rule.apply(state, draws, answer, lr)
            elif state.gradients:
                rule.update(state._replace(gradients={}), state.gradients, lr)
    return stats, answer


def score(
    rule: Rule, net: Network, state: State, x: Tensor, y: Tensor, meter: PeakMemory | None = None
) -> tuple[Tensor, Tensor]:
    """Return the summed cross-entropy of the rule's inference on x (B, *shape), and how many it got right."""
    if meter:
        meter.hold("batch", (x, y))
    with torch.no_grad(), meter or nullcontext():
        logits = rule.logits(net, state, x)
        right = (logits.argmax(1) == y).sum()
        return torch.nn.functional.cross_entropy(logits, y, reduction="sum"), right


def load_parts(load: Load, rows: Any, draws: Any, size: int) -> Iterator[Batch]:
    """Yield the batch of `rows` whole (size 0), or in parts of at most `size` samples, each loaded when asked for.

    Args:
        load: returns inputs and labels of some rows.
        rows: the batch's samples, anything with a length and slices.
        draws: what the rule drew for the whole batch.
        size: samples in a part.
    """
    count = len(rows)
    if not size or size >= count:
        yield batch_of(load, rows, draws)
        return
    for start in range(0, count, size):
        stop = min(start + size, count)
        drawn = draws[start:stop] if isinstance(draws, Tensor) else draws
        yield batch_of(load, rows[start:stop], drawn, count)


def batch_of(load: Load, rows: Any, draws: Any, whole: int | None = None) -> Batch:
    """Return the batch of `rows`, or a part of a batch of `whole` samples."""
    x, y = load(rows)
    total = None if whole is None else torch.tensor(float(whole), device=x.device)
    return Batch(x, y, torch.ones(len(rows), device=x.device), draws, total)


def accumulators(rule: Rule, params: Tensors) -> Tensors:
    """Return zeroed gradients in which the parts of a batch add up; scalar rules need none."""
    if not isinstance(rule, GradientRule):
        return {}
    return {key: torch.zeros_like(p) for key, p in rule.learned(params).items()}


def residents(state: State, anchor: Tensors) -> dict[str, Iterable[Tensor]]:
    """Return what is in memory before a step, by part; the batch comes with the step."""
    return {
        "parameters": state.params.values(),
        "state": [*state.fixed.values(), *anchor.values()],
        "optimizer": state.slots.values(),
        "gradients": state.gradients.values(),
    }


def tensors_of(batch: Batch) -> list[Tensor]:
    """Return the tensors of a batch."""
    return [field for field in batch if isinstance(field, Tensor)]
