"""The backward pass of the whole network, one block at a time: what the rules that update inside it share."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ..network import Network, Pull

Tensors = dict[str, Tensor]


def pull_back(
    net: Network, pull_of: Callable[[int], Pull], passing: list[Tensor], apply: Callable[[Tensors], None]
) -> None:
    """Pull the error back from the output block to the first, handing every gradient on as soon as it is known.

    Args:
        net: the network.
        pull_of: gives block i's pull (see `Network.block_vjp`), asked once a block from the last to the first; the
            pulls of all blocks but the first also return the gradient in the block's input.
        passing: holds the gradient of the objective in the network's output (B, C), and nothing else in the end: it
            is a list so that a block's output gradient can be freed inside the pull that uses it.
        apply: takes a parameter's gradient; the whole block is pulled by then, so the parameter may change.
    """
    for i in reversed(range(len(net.blocks))):
        grads = pull_of(i)(passing.pop())
        if i > 0:
            grads, gradient = grads
            passing.append(gradient)
            del gradient
        for key in list(grads):
            apply({key: grads.pop(key)})
