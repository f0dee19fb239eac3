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

from .seeds import Purpose, integer_seed

Tensors = dict[str, Tensor]
Pull = Callable[[Tensor], Tensors]  # gradient in a block's output -> gradients in its parameters

# Layers that only reshape belong to the block that wants the new shape, so a hidden block's output keeps its map.
RESHAPING = (nn.Flatten, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)
NORMS = (nn.GroupNorm, nn.LayerNorm, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.LocalResponseNorm)

# Activations whose derivative follows from their output a, so that nothing but the output need be kept: the function
# of z (in place), and what turns (dL/da, a) into dL/dz.
ACTIVATIONS: dict[type[nn.Module], tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    nn.ReLU: (torch.relu_, lambda gradient, a: gradient * (a > 0)),
    nn.Tanh: (torch.tanh_, lambda gradient, a: gradient * (1 - a * a)),
    nn.Identity: (lambda z: z, lambda gradient, a: gradient),
}


class NetworkError(ValueError):
    """A network cannot be used; the message says why and what to do."""


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

    def block_vjp(self, i: int, params: Tensors, x: Tensor, *, open_relu: bool = False) -> tuple[Tensor, Pull]:
        """Run block `i` and return its output with the function that pulls an output gradient back, once.

        A block that is linear and an activation is pulled back in closed form: nothing is kept but its input and
        output, dz = da · f'(z), dW = dzᵀ x, db = Σ dz. Any other block keeps its own graph, never a neighbour's.

        Args:
            i: the block.
            params: parameters of the network; only this block's are used.
            x: the block's input (B, ...).
            open_relu: passes the gradient through the ReLU of a closed-form block unchanged.
        """
        dense = self.dense(i)
        if dense is None:
            own = {key: params[key] for key in self.keys(i)}
            output, pull = vjp(lambda p: self.block(i, p, x), own)
            return output, lambda gradient: pull(gradient, retain_graph=False, create_graph=False)[0]
        linear, activation = dense
        flat, a = x.flatten(1), self.block(i, params, x)

        def pull_dense(gradient: Tensor) -> Tensors:
            if not (open_relu and activation is nn.ReLU):
                gradient = ACTIVATIONS[activation][1](gradient, a)  # frees the caller's, unless the caller keeps it
            grads = {f"{i}.{linear}.weight": gradient.T @ flat}
            if f"{i}.{linear}.bias" in params:
                grads[f"{i}.{linear}.bias"] = gradient.sum(0)
            return grads

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
                    f"block {i} ({_describe(block)}) cannot take inputs of shape {tuple(x.shape[1:])}: {error}"
                ) from None
            sizes.append(tuple(x.shape[1:]))
        if sizes[-1] != (self.classes,):
            raise NetworkError(f"the network ends in shape {sizes[-1]}, but the data has {self.classes} classes")
        return tuple(sizes)


def blocks_of(sequential: nn.Module) -> list[nn.Sequential]:
    """Cut a Sequential into blocks: its children if all are Sequentials, else one block per weighted layer."""
    if not isinstance(sequential, nn.Sequential):
        raise NetworkError(f"a model must be an nn.Sequential of layers or blocks, not {type(sequential).__name__}")
    for module in sequential.modules():
        _refuse(module)
    children = list(sequential)
    if children and all(isinstance(child, nn.Sequential) for child in children):
        return [_named(block) for block in children]
    groups: list[list[nn.Module]] = [[]]
    for layer in children:
        weighted = any(True for _ in layer.parameters()) and not isinstance(layer, NORMS)
        current_is_full = any(True for m in groups[-1] for _ in m.parameters())
        if current_is_full and (weighted or isinstance(layer, RESHAPING)):
            groups.append([])
        groups[-1].append(layer)
    if not any(True for m in groups[-1] for _ in m.parameters()) and len(groups) > 1:
        groups[-2].extend(groups.pop())  # a reshaping layer at the very end
    if not any(True for _ in sequential.parameters()):
        raise NetworkError("the model has no parameters to train")
    return [_named(group) for group in groups]


def _named(layers: Sequence[nn.Module] | nn.Sequential) -> nn.Sequential:
    """Return the layers as a Sequential whose children are named after their types: linear, relu, conv2d, conv2d_2."""
    block, seen = nn.Sequential(), {}
    for layer in layers:
        name = type(layer).__name__.lower()
        seen[name] = seen.get(name, 0) + 1
        block.add_module(name if seen[name] == 1 else f"{name}_{seen[name]}", layer)
    return block


def _refuse(module: nn.Module) -> None:
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        raise NetworkError(
            f"{type(module).__name__} mixes samples and keeps statistics outside the parameters: use nn.GroupNorm"
        )
    if isinstance(module, nn.modules.dropout._DropoutNd):
        raise NetworkError(
            f"{type(module).__name__} draws from the global generator, so runs would not repeat: take it out"
        )
    if any(True for _ in module.buffers(recurse=False)):
        raise NetworkError(f"{type(module).__name__} keeps state outside the parameters: use a layer without buffers")


def _describe(block: nn.Sequential) -> str:
    return "-".join(name for name, _ in block.named_children())
