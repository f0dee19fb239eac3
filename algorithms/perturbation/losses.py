"""Losses near a replica's parameters: what every rule of this family is made of.

The losses at w + c z_k, for directions z_k and a few c, are found one after the other, in place and in the memory of
inference, or several directions abreast: as many copies of the parameters, in one batched program.

With dropout the copies have the same masks. Those that differ between two sides drown the difference of their losses,
which is of the size σ, in one of the size of the loss. Here a step has one mask for each hidden block, made again in
every pass from the step's place:

    a ← a · m / (1 − p)      m ~ Bernoulli(1 − p), of row j of the batch the same whatever stands below it
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.func import vmap

from ..directions import Directions
from ..network import Network
from ..rule import Batch, RuleError, Stats, Tensors
from ..scalar_rule import ScalarRule
from ..seeds import Purpose
from ..softmax import cross_entropy

LEVELS = 65536  # a mask's bit is drawn from 16 random ones

Add = Callable[..., None]  # of (params, k, c, chunk): w ← w + c z_k in place


def losses_along(
    rule: ScalarRule,
    net: Network,
    params: Tensors,
    batch: Batch,
    shifts: Sequence[float],
    dropout: float = 0.0,
    add: Add | None = None,
    home: bool = False,
) -> Iterator[tuple[slice, list[Tensor], Stats]]:
    """Yield (which directions, their losses at w + c z_k for each c of `shifts`, stats of the last pass).

    Of one direction a loss is 0-dim, of several abreast (P,). Parameters end as they began: abreast to the bit, in
    place within rounding, by half a unit in the last place for each shift and one for the way back; with `home` that
    does not add up over directions, since there and back from where that ends is the same way again. What is yielded is
    to be dropped before the next is asked for.

    Args:
        rule: has the directions' number, how many are looked along abreast, and the chunk.
        net: the network.
        params: w.
        batch: the batch, with the directions.
        shifts: c.
        dropout: see `loss_at`.
        add: moves parameters in place; None: `Directions.add`.
        home: go back to w between two shifts of a direction, for one pass over the parameters more.
    """
    loss = partial(loss_at, net, batch=batch, dropout=dropout)
    add = partial(add or batch.draws.add, chunk=rule.chunk)
    for group in batch.draws.together(rule.directions, rule.abreast):
        losses, at = [], 0.0
        for c in shifts:
            stats = None  # those of the pass before are free, unless they were asked for
            if len(group) == 1:
                add(params, group.start, c - at)
                found, stats = loss(params)
                at = c
                if home:
                    add(params, group.start, -at)
                    at = 0.0
            else:
                found, stats = batched(loss)(_members(params, group, partial(add, c=c)))
                stats = Stats(*(each[-1] for each in stats))
            losses.append(found)
            del found
        if at:
            add(params, group.start, -at)
        yield slice(group.start, group.stop), losses, stats
        del losses


def batched(run: Callable[..., Any], in_dims: tuple = (0,)) -> Callable[..., Any]:
    """Return `vmap` of a function that runs a network.

    Raises:
        RuleError: when it is called, if a layer of the network cannot be batched.
    """

    def call(*args: Any) -> Any:
        try:
            return vmap(run, in_dims=in_dims)(*args)
        except RuntimeError as error:
            if "vmap" not in str(error):
                raise
            remedy = f"leave rule.abreast out ({str(error).splitlines()[0]})"
            raise RuleError(f"this network cannot be batched over directions: {remedy}") from error

    return call


def _members(params: Tensors, group: range, add: Add) -> Tensors:
    """Return w + c z_k for each direction of a group, stacked."""
    members = {key: p.expand(len(group), *p.shape).clone() for key, p in params.items()}
    for j, k in enumerate(group):
        add({key: stacked[j] for key, stacked in members.items()}, k)
    return members


def loss_at(net: Network, params: Tensors, batch: Batch, dropout: float = 0.0) -> tuple[Tensor, Stats]:
    """Return the weighted mean cross-entropy and its stats; with dropout, hidden outputs pass the step's masks."""
    if not dropout:
        return cross_entropy(net.forward(params, batch.x), batch)
    x = batch.x
    for i in net.hidden:
        x = net.block(i, params, x)
        x = (x * mask(batch.draws, i, x.shape, dropout).to(x.device)).div_(1 - int(dropout * LEVELS) / LEVELS)
    return cross_entropy(net.block(net.output, params, x), batch)


def mask(directions: Directions, block: int, shape: torch.Size, dropout: float) -> Tensor:
    """Return which outputs of a block are kept, bool, in the step that the directions belong to; `shape` is theirs."""
    name = (directions.client + 1) << 32 | block
    counter = (0, name, directions.step, directions.round)
    stream = np.random.Philox(key=directions.seed << 8 | Purpose.MASK, counter=counter)
    words = stream.random_raw(-(-shape.numel() // 4)).astype("<u8", copy=False)
    kept = words.view("<u2")[: shape.numel()] >= int(dropout * LEVELS)
    return torch.from_numpy(kept).view(shape)
