"""Approx-BP: activations whose derivative is a step function, stored in two bits an element.

Y. Yang, Y. Shi, C. Wang, X. Zhen, Y. Shi, J. Xu, "Reducing Fine-Tuning Memory Overhead by Approximate and
Memory-Sharing Backpropagation", ICML 2024, arXiv 2406.16282. The forward pass is f itself; the backward pass has for f'
the steps of the sum of three ReLUs that is nearest to f in L2:

    f(z) ≈ Σ_i a_i max(z − c_i, 0)      dL/dz = dL/df · Σ_i a_i [z > c_i]      Σ_i a_i = 1, Σ_i a_i c_i = 0

Of an element nothing is kept but how many of the c_i it exceeds, four elements to a byte. ReLU's f' is one step at 0,
so its backward pass is exact, and eight elements go to a byte.
"""

from __future__ import annotations

import copy
import weakref
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..network import Network
from ..rule import Batch, RuleError, State, Stats
from .sgd import Backprop


@dataclass(frozen=True)
class Steps:
    """A step function Σ_i a_i [z > c_i], and the bits that hold one of its levels."""

    a: tuple[float, ...]
    c: tuple[float, ...]  # ascending
    bits: int


STEPS: dict[type[nn.Module], Steps] = {
    nn.ReLU: Steps((1.0,), (0.0,), bits=1),
    nn.GELU: Steps(
        (-0.04922261145617846, 1.0979632065417297, -0.048740595085551286),
        (-3.1858810036855245, -0.001178821281161997, 3.190832613414926),
        bits=2,
    ),
    nn.SiLU: Steps(
        (-0.04060357190528599, 1.080925428529668, -0.040321856624382146),
        (-6.3050461001646445, -0.0008684942046214787, 6.325815242089708),
        bits=2,
    ),
}


@dataclass(frozen=True)
class ApproxBackprop(Backprop):
    """Backpropagation past GELU, SiLU and ReLU with their derivatives packed into bits.

    Stores during a step: what `backprop` does, but 2 bits for each input of a GELU or SiLU. Their outputs stay, as the
    inputs of the next layer, and so do the gradients.

    Packing ReLU gains next to nothing in the ready-made models: plain PyTorch keeps a ReLU's output, which the linear
    layer, convolution or max-pooling after it keeps anyway. The gradient is then exact, bit for bit.

    Departs from the paper: it also shares what a normalisation and the linear layer after it store, which needs their
    affine parts merged; this does not. And the paper fine-tunes: where the inputs of the activations are still small
    the steps are coarse. From scratch on digits (`mlp`, gelu) the gradients of the hidden blocks have a cosine of 0.7
    with the true ones at first and 0.99 after five epochs.
    """

    name: ClassVar[str] = "backprop-approx"
    paper: ClassVar[str] = "Yang et al., ICML 2024, arXiv 2406.16282"

    def check(self, net: Network) -> None:
        """Demand an activation that can be packed."""
        if not any(type(module) in STEPS for block in net.blocks for module in block.modules()):
            raise RuleError(
                "backprop-approx packs the derivatives of gelu, silu and relu, and this model has none of them:"
                " use --set model.activation=gelu"
            )

    def step(self, net: Network, state: State, batch: Batch, lr: float) -> Stats:
        """Descend the gradient of the network whose activations are packed."""
        return super().step(packed(net), state, batch, lr)


_PACKED: weakref.WeakKeyDictionary[Network, Network] = weakref.WeakKeyDictionary()


def packed(net: Network) -> Network:
    """Return `net` with packed activations in place of its own, made once for each network."""
    if net not in _PACKED:
        twin = copy.copy(net)
        weights = (p for block in net.blocks for p in block.parameters())
        twin.blocks = copy.deepcopy(net.blocks, {id(p): p for p in weights})  # the two share their (empty) weights
        for block in twin.blocks:
            for path, module in list(block.named_modules(remove_duplicate=False)):
                if type(module) in STEPS:
                    block.set_submodule(path, PackedActivation(module))
        twin.prepare()
        _PACKED[net] = twin
    return _PACKED[net]


class PackedActivation(nn.Module):
    """An activation that stores the level of its derivative instead of its input."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.activation, self.steps = activation, STEPS[type(activation)]
        self.activation.inplace = False  # the levels are read from the input, whose memory is not ours

    def forward(self, z: Tensor) -> Tensor:
        """Return the activation of z, exact."""
        return _Packed.apply(z, self.activation, self.steps)[0]


class _Packed(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(z: Tensor, activation: nn.Module, steps: Steps) -> tuple[Tensor, Tensor]:
        levels = (z > steps.c[0]).to(torch.uint8)
        for c in steps.c[1:]:
            levels += z > c
        levels = pack(levels, steps.bits)
        return activation(z), levels

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.steps = inputs[2]
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, gradient: Tensor, _: None) -> tuple[Tensor, None, None]:
        levels = unpack(ctx.saved_tensors[0], ctx.steps.bits, gradient.shape)
        slope = (levels > 0).to(gradient.dtype).mul_(ctx.steps.a[0])
        for i, a in enumerate(ctx.steps.a[1:], 1):
            slope.add_(levels > i, alpha=a)
        return slope.mul_(gradient), None, None


def pack(levels: Tensor, bits: int) -> Tensor:
    """Return levels (any shape) uint8 below 2^bits as bytes (⌈n · bits / 8⌉,), the first level in the lowest bits."""
    lanes = 8 // bits
    rows = nn.functional.pad(levels.flatten(), (0, -levels.numel() % lanes)).view(-1, lanes)
    whole = rows[:, 0]
    for lane in range(1, lanes):
        whole = whole | rows[:, lane] << lane * bits
    return whole


def unpack(whole: Tensor, bits: int, shape: torch.Size) -> Tensor:
    """Return the levels of `shape` uint8 that `pack` made into bytes."""
    rows = torch.stack([whole >> shift & 2**bits - 1 for shift in range(0, 8, bits)], 1)
    return rows.flatten()[: shape.numel()].view(shape)
