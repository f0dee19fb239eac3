"""A network as a stack of blocks.

A block is one weighted layer with what follows it (activation, pooling, normalisation). The last block is the output
block and makes class scores; the others are hidden. `Network` holds only the structure, on PyTorch's meta device: the
weights live in the plain dictionaries that rules pass around, keyed "{block}.{layer}.{parameter}".
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .batched import add_product, linear
from .blocks import NetworkError, blocks_of, describe
from .graph import pullback, pushforward, transformed
from .layers import functions_of
from .optimizer import Gradient, Product
from .seeds import Purpose, integer_seed

Tensors = dict[str, Tensor]
Gradients = dict[str, Gradient]
Pulled = Gradients | tuple[Gradients, Tensor]  # gradients in a block's parameters, and, if asked for, in its input
Pull = Callable[[Tensor], Pulled]  # of the gradient in the block's output


def close_(gradient: Tensor, a: Tensor) -> Tensor:
    """Set the gradient to 0 where a ReLU's output is; in place, but under vmap, which has no rule for that."""
    if transformed():
        return torch.ops.aten.threshold_backward(gradient, a, 0)
    return torch.ops.aten.threshold_backward.grad_input(gradient, a, 0, grad_input=gradient)  # a fifth of the time


# Activations whose derivative follows from their output a, so that nothing but the output need be kept: the function
# of z, and what turns (dL/da, a) into dL/dz; both in place.
ACTIVATIONS: dict[type[nn.Module], tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    nn.ReLU: (torch.relu_, close_),
    nn.Tanh: (torch.tanh_, lambda gradient, a: gradient.mul_(a.square().neg_().add_(1))),
    nn.Identity: (lambda z: z, lambda gradient, a: gradient),
}


class Dense(NamedTuple):
    """What is to be known of a block that is [Flatten] Linear [activation]."""

    activation: type[nn.Module]
    weight: str  # keys
    bias: str  # which need not be there

    def vectors(self, params: Tensors, x: Tensor) -> Tensor:
        """Return samples x (B, ...) as vectors; of replicas side by side they are."""
        return x if x.dim() == params[self.weight].dim() else x.flatten(1)

    def affine(self, params: Tensors, x: Tensor) -> Tensor:
        """Return x Wᵀ + b (B, n), which the block's activation is taken of."""
        return linear(self.vectors(params, x), params[self.weight], params.get(self.bias))

    def activated(self, z: Tensor) -> Tensor:
        """Pass the sums z through the block's activation, in place."""
        return ACTIVATIONS[self.activation][0](z)


class Network:
    """The structure of a network of blocks.

    Args:
        build: makes the `nn.Sequential` (called on the meta device for the structure, and under a seeded generator for
            initial weights), or an `nn.Sequential` whose own weights are then the initial ones.
        shape: shape of one input, channels first.
        classes: number of classes.

    Raises:
        NetworkError: if it is not a Sequential, holds batch normalisation, dropout or another layer with buffers, or
            its scores are not (batch, classes).
    """

    def __init__(self, build: nn.Sequential | Callable[[], nn.Sequential], shape: Sequence[int], classes: int) -> None:
        self.shape, self.classes = tuple(shape), classes
        self._build = (lambda: copy.deepcopy(build)) if isinstance(build, nn.Module) else build
        with torch.device("meta"):
            self.blocks = tuple(block.to("meta") for block in blocks_of(self._build()))
        self.sizes = self._output_sizes()
        self.hidden = range(len(self.blocks) - 1)
        self.output = len(self.blocks) - 1
        self.prepare()

    def prepare(self) -> None:
        """Work out what every step asks of the blocks; to be called again if one of them is changed."""
        self._keys = [[f"{i}.{name}" for name, _ in block.named_parameters()] for i, block in enumerate(self.blocks)]
        self._layers = [functions_of(block, i) for i, block in enumerate(self.blocks)]
        self._dense = [self._dense_form(i) for i in range(len(self.blocks))]

    def init(self, seed: int) -> Tensors:
        """Return initial parameters, drawn from `seed` by the layers' own initialisation."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(integer_seed(seed, Purpose.INIT))  # other devices' take milliseconds
            blocks = blocks_of(self._build())
        return {
            f"{i}.{name}": p.detach().clone().contiguous()
            for i, block in enumerate(blocks)
            for name, p in block.named_parameters()
        }

    def keys(self, i: int) -> list[str]:
        """Return the parameter keys of block `i`."""
        return self._keys[i]

    def block(self, i: int, params: Tensors, x: Tensor) -> Tensor:
        """Run block `i` on x (B, ...), or on replicas side by side (see `Rule.stackable`)."""
        if (dense := self._dense[i]) is not None:
            return dense.activated(dense.affine(params, x))
        for layer in self._layers[i]:
            x = layer(params, x)
        return x

    def forward(self, params: Tensors, x: Tensor) -> Tensor:
        """Return class scores (B, classes)."""
        for i in range(len(self.blocks)):
            x = self.block(i, params, x)
        return x

    def block_vjp(
        self, i: int, params: Tensors, x: Tensor, *, open_relu: bool = False, wrt_input: bool = False
    ) -> tuple[Tensor, Pull]:
        """Run block `i` and return its output with the function that pulls an output gradient back, once.

        A block that is linear and an activation is pulled back in closed form: nothing is kept but its input and
        output, dz = da · f'(z), dW = dzᵀ x (not multiplied out), db = Σ dz, dx = dz W. Any other block keeps its own
        graph, never a neighbour's. Pull before the block's parameters change; the pull may overwrite the gradient.

        Args:
            i: the block.
            params: parameters of the network; only this block's are used.
            x: the block's input (B, ...).
            open_relu: passes the gradient through the ReLU of a closed-form block unchanged.
            wrt_input: the pull returns (gradients in the parameters, gradient in x) instead of the former alone.
        """
        dense = self._dense[i]
        if dense is None:
            own = {key: params[key] for key in self._keys[i]}
            return pullback(lambda own, x: self.block(i, own, x), own, x, wrt_input)
        shape, flat = x.shape, dense.vectors(params, x)
        a = self.block(i, params, flat)
        del x  # of a map with its channels last, `flat` is a copy

        def pull_dense(gradient: Tensor) -> Pulled:
            nonlocal a
            if not (open_relu and dense.activation is nn.ReLU):
                gradient = ACTIVATIONS[dense.activation][1](gradient, a)
            del a
            grads: dict[str, Gradient] = {dense.weight: Product(gradient, flat)}
            if dense.bias in params:
                grads[dense.bias] = gradient.sum(-2)
            return (grads, (gradient @ params[dense.weight]).view(shape)) if wrt_input else grads

        return a, pull_dense

    def block_jvp(
        self, i: int, params: Tensors, tangents: Tensors, x: Tensor, dx: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Run block `i`; return its output a, and the derivative of a along `tangents` and `dx`. No graph is made.

        A block that is linear and an activation has a closed form: ȧ = f'(z) · (x Ẇᵀ + ḃ + ẋ Wᵀ).

        Args:
            i: the block.
            params: parameters of the network; only this block's are used.
            tangents: of this block's parameters, by their keys.
            x: the block's input (B, ...).
            dx: the tangent of x, like x; None stands for 0.
        """
        dense = self._dense[i]
        if dense is None:
            own = {key: params[key] for key in self._keys[i]}
            return pushforward(lambda own, x: self.block(i, own, x), own, x, tangents, dx)
        x = dense.vectors(params, x)
        a = self.block(i, params, x)
        da = linear(x, tangents[dense.weight], tangents.get(dense.bias))
        if dx is not None:
            add_product(da, dense.vectors(params, dx).mT, params[dense.weight].mT, 1.0)
        return a, ACTIVATIONS[dense.activation][1](da, a)

    def dense(self, i: int) -> Dense | None:
        """Return what is to be known of block `i` if it is [Flatten] Linear [activation], else None.

        A linear layer that maps the last of several dimensions is not one: its output is no vector.
        """
        return self._dense[i]

    @property
    def is_dense(self) -> bool:
        """Whether every block is [Flatten] Linear [activation]."""
        return all(dense is not None for dense in self._dense)

    def _dense_form(self, i: int) -> Dense | None:
        layers = [(n, m) for n, m in self.blocks[i]._modules.items() if not isinstance(m, nn.Flatten)]
        if not layers or type(layers[0][1]) is not nn.Linear or len(layers) > 2:
            return None
        linear, activation = layers[0][0], type(layers[1][1]) if len(layers) == 2 else nn.Identity
        if self.sizes[i] != (layers[0][1].out_features,) or activation not in ACTIVATIONS:
            return None
        return Dense(activation, f"{i}.{linear}.weight", f"{i}.{linear}.bias")

    def _output_sizes(self) -> tuple[tuple[int, ...], ...]:
        """Return the shape of one sample after each block, found on the meta device."""
        sizes, x = [], torch.empty(1, *self.shape, device="meta")
        for i, block in enumerate(self.blocks):
            try:
                x = block(x)
            except (RuntimeError, ValueError) as error:
                raise NetworkError(
                    f"block {i} ({describe(block)}) cannot take inputs of shape {tuple(x.shape[1:])}: {error}"
                ) from None
            sizes.append(tuple(x.shape[1:]))
        if sizes[-1] != (self.classes,):
            raise NetworkError(f"the network ends in shape {sizes[-1]}, but the data has {self.classes} classes")
        return tuple(sizes)
