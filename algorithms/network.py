"""A network as a stack of blocks.

A block is one weighted layer with what follows it (activation, pooling, normalisation). The last block is the output
block and makes class scores; the others are hidden. `Network` holds only the structure, on PyTorch's meta device: the
weights live in the plain dictionaries that rules pass around, keyed "{block}.{layer}.{parameter}".
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp

from .blocks import NetworkError, blocks_of, describe
from .optimizer import Gradient, Product
from .seeds import Purpose, integer_seed

Tensors = dict[str, Tensor]
Gradients = dict[str, Gradient]
Pulled = Gradients | tuple[Gradients, Tensor]  # gradients in a block's parameters, and, if asked for, in its input
Pull = Callable[[Tensor], Pulled]  # of the gradient in the block's output

# Activations whose derivative follows from their output a, so that nothing but the output need be kept: the function
# of z, and what turns (dL/da, a) into dL/dz; both in place.
ACTIVATIONS: dict[type[nn.Module], tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    nn.ReLU: (torch.relu_, lambda gradient, a: gradient.masked_fill_(a <= 0, 0)),
    nn.Tanh: (torch.tanh_, lambda gradient, a: gradient.mul_(a.square().neg_().add_(1))),
    nn.Identity: (lambda z: z, lambda gradient, a: gradient),
}


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

    def init(self, seed: int) -> Tensors:
        """Return initial parameters, drawn from `seed` by the layers' own initialisation."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(integer_seed(seed, Purpose.INIT))
            blocks = blocks_of(self._build())
        return {
            f"{i}.{name}": p.detach().clone().contiguous()
            for i, block in enumerate(blocks)
            for name, p in block.named_parameters()
        }

    def keys(self, i: int) -> list[str]:
        """Return the parameter keys of block `i`."""
        return [f"{i}.{name}" for name, _ in self.blocks[i].named_parameters()]

    def block(self, i: int, params: Tensors, x: Tensor) -> Tensor:
        """Run block `i` on x (B, ...)."""
        if (dense := self.dense(i)) is not None:
            linear, activation = dense
            z = nn.functional.linear(x.flatten(1), params[f"{i}.{linear}.weight"], params.get(f"{i}.{linear}.bias"))
            return ACTIVATIONS[activation][0](z)
        own = {key.partition(".")[2]: params[key] for key in self.keys(i)}
        return functional_call(self.blocks[i], own, (x,))

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
        dense = self.dense(i)
        if dense is None:
            own = {key: params[key] for key in self.keys(i)}
            waiting: list[Tensor] = []

            # The graph ends in a number whose gradient a hook replaces: torch.func.vjp would keep the block's output
            # and its gradient to the end of the pull. The backward pass of a sum stores nothing.
            def run(p: Tensors, x: Tensor = x) -> tuple[Tensor, Tensor]:
                a = self.block(i, p, x)
                if a.requires_grad:
                    a.register_hook(lambda _: waiting.pop())
                return a.sum(), a

            end, pull, a = vjp(run, *((own, x) if wrt_input else (own,)), has_aux=True)

            def pull_graph(gradient: Tensor) -> Pulled:
                waiting.append(gradient)
                del gradient
                pulled = pull(end, retain_graph=False, create_graph=False)
                return pulled if wrt_input else pulled[0]

            return a, pull_graph
        linear, activation = dense
        weight, bias = f"{i}.{linear}.weight", f"{i}.{linear}.bias"
        flat, a = x.flatten(1), self.block(i, params, x)

        def pull_dense(gradient: Tensor) -> Pulled:
            nonlocal a
            if not (open_relu and activation is nn.ReLU):
                gradient = ACTIVATIONS[activation][1](gradient, a)
            del a
            grads: dict[str, Gradient] = {weight: Product(gradient, flat)}
            if bias in params:
                grads[bias] = gradient.sum(0)
            return (grads, (gradient @ params[weight]).view_as(x)) if wrt_input else grads

        return a, pull_dense

    def dense(self, i: int) -> tuple[str, type[nn.Module]] | None:
        """Return (name of the linear layer, activation) if block `i` is [Flatten] Linear [activation], else None.

        A linear layer that maps the last of several dimensions is not one: its output is no vector.
        """
        layers = [(n, m) for n, m in self.blocks[i].named_children() if not isinstance(m, nn.Flatten)]
        if not layers or type(layers[0][1]) is not nn.Linear or len(layers) > 2:
            return None
        if self.sizes[i] != (layers[0][1].out_features,):
            return None
        activation = type(layers[1][1]) if len(layers) == 2 else nn.Identity
        return (layers[0][0], activation) if activation in ACTIVATIONS else None

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
