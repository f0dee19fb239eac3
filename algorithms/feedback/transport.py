"""The way back block by block, through other matrices than the forward ones.

A block is [layers without parameters] a weighted layer z = W x (dense or a convolution) [activation, pooling, norm].
Its own parameters learn as in backpropagation, from the gradient dz in the layer's linear output. Below the layer
backpropagation sends dz W (of a convolution: the transposed convolution of dz with W); here a rule sends dz B, or what
else it makes of dz.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..graph import pullback
from ..layers import Layer
from ..network import Gradients, Network
from ..optimizer import Gradient, Product
from ..rule import Batch, State, Stats, Tensors
from ..softmax import softmax_error_and_stats
from .ways import ways


class Crossing(NamedTuple):
    """The error at a weighted layer, before it goes below."""

    layer: nn.Module
    error: Tensor  # dz, the gradient in the layer's linear output
    x: Tensor  # the layer's input
    below: Callable[[Tensor], Tensor]  # takes the gradient in x to the gradient in the block's input, once

    def through(self, matrix: Tensor, error: Tensor | None = None) -> Tensor:
        """Return the gradient in the block's input as if `matrix`, shaped like W, had made z of x.

        Args:
            matrix: stands for W.
            error: stands for dz, if given: any number of units or channels, as many as `matrix` has.
        """
        error = self.error if error is None else error
        if isinstance(self.layer, nn.Linear):
            return self.below(error @ matrix)
        return self.below(self._backward(error, matrix, (True, False, False))[0])

    def gradient(self, matrix: Tensor, error: Tensor) -> Gradient:
        """Return the gradient in `matrix`, which makes of x something that has the gradient `error`."""
        if not isinstance(self.layer, nn.Linear):
            return self._backward(error, matrix, (False, True, False))[1]
        if self.x.dim() > matrix.dim():  # the last of several dimensions is mapped
            return Product(error.flatten(0, -2), self.x.flatten(0, -2))
        return Product(error, self.x)

    def _backward(self, error: Tensor, matrix: Tensor, wanted: tuple[bool, bool, bool]) -> tuple[Tensor, ...]:
        layer = self.layer
        return torch.ops.aten.convolution_backward(
            error,
            self.x,
            matrix,
            None,
            layer.stride,
            layer.padding,
            layer.dilation,
            False,  # not transposed
            [0] * len(layer.stride),
            layer.groups,
            wanted,
        )


# Takes the gradient in a block's output, alone in a list, so that it can be freed inside.
Pull = Callable[[list[Tensor]], tuple[Gradients, Crossing | None]]


def run(net: Network, i: int, params: Tensors, x: Tensor) -> tuple[Tensor, Pull]:
    """Run block `i` and return its output with its pull: the parameters' gradients, and the error where it crosses.

    A block that is linear and an activation keeps its input and output, any other its own graph (see
    `Network.block_vjp`). Nothing crosses the first block, which has no other below it.
    """
    if i == 0 or net.dense(i) is not None:
        return _run_closed(net, i, params, x)
    way, below = ways(net)[i], _as_it_is
    if way.before:
        x, pull_before = pullback(lambda none, x: _applied(way.before, none, x), {}, x, True)
        below = lambda gradient: pull_before(gradient)[1]  # noqa: E731
    errors: list[Tensor] = []

    def onward(own: Tensors, x: Tensor) -> Tensor:
        z = way.onward[0](own, x)
        z.register_hook(errors.append)
        after = way.onward[1:]
        return _applied(after, own, z) if after else z.view_as(z)  # `pullback` has a hook of its own on the output

    a, pull_onward = pullback(onward, {key: params[key] for key in net.keys(i)}, x, False)

    def pull(passing: list[Tensor]) -> tuple[Gradients, Crossing]:
        grads = pull_onward(passing.pop())
        return grads, Crossing(way.layer, errors.pop(), x, below)

    return a, pull


def _run_closed(net: Network, i: int, params: Tensors, x: Tensor) -> tuple[Tensor, Pull]:
    shape = x.shape
    a, pull_block = net.block_vjp(i, params, x)

    def pull(passing: list[Tensor]) -> tuple[Gradients, Crossing | None]:
        grads = pull_block(passing.pop())
        if i == 0:
            return grads, None
        way = ways(net)[i]
        error, flat = grads[way.weight]
        return grads, Crossing(way.layer, error, flat, lambda gradient: gradient.view(shape))

    return a, pull


def learn(
    net: Network,
    state: State,
    batch: Batch,
    send: Callable[[int, Crossing, Gradients], Tensor],
    update: Callable[[Gradients], None],
) -> Stats:
    """Run forward, then take the error of the cross-entropy back, and update every block once it has passed.

    Args:
        net: the network.
        state: the replica.
        batch: the batch.
        send: of block i, makes the gradient in the block's input from its crossing; nothing of the block has changed
            by then. It may add gradients of what else learns there.
        update: takes one parameter's gradient.
    """
    x, pulls = batch.x, []
    for i in range(len(net.blocks)):
        x, pull = run(net, i, state.params, x)
        pulls.append(pull)
    error, stats = softmax_error_and_stats(x, batch)
    passing = [error]
    del x, pull, error
    for i in reversed(range(len(net.blocks))):
        grads, crossing = pulls.pop()(passing)
        if crossing is not None:
            passing.append(send(i, crossing, grads))
        del crossing
        for key in list(grads):
            update({key: grads.pop(key)})
    return stats


def _as_it_is(gradient: Tensor) -> Tensor:
    return gradient


def _applied(layers: tuple[Layer, ...], params: Tensors, x: Tensor) -> Tensor:
    for layer in layers:
        x = layer(params, x)
    return x
