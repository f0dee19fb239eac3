"""Gradient-isolated modules: each learns from the loss of auxiliary nets of its own, and no gradient leaves it.

    a_m = f_m(a_{m−1})      dW_m, dA_m = ∂L_m(a_m; A_m) / ∂(W_m, A_m)      a_{m−1} held fixed

for m = 1 … K: module m has weights W_m, those of one block or of several, and auxiliary nets A_m, which inference does
not use. It is run, updated and dropped before m + 1 runs on what it said, a_m. The last module ends in the network's
own output and learns from its cross-entropy. What an auxiliary net is and what L_m is, the rules say.
"""

from __future__ import annotations

import weakref
from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from ..blocks import NetworkError, describe
from ..graph import gradients
from ..network import Network
from ..rule import Batch, GradientRule, RuleError, State, Stats, Tensors
from ..seeds import Purpose, integer_seed
from ..softmax import cross_entropy


class Auxiliary(NamedTuple):
    """A small net that reads the output of a block."""

    net: Network  # its structure
    prefix: str  # of its parameters' keys: "{block}.{name}."

    @property
    def keys(self) -> list[str]:
        """Its parameters' keys, without the prefix."""
        return [key for i in range(len(self.net.blocks)) for key in self.net.keys(i)]

    def __call__(self, params: Tensors, a: Tensor) -> Tensor:
        """Return what the net says (B, n) of a block's output a."""
        return self.net.forward({key: params[self.prefix + key] for key in self.keys}, a)


class Module(NamedTuple):
    """Some blocks of a network and what they learn from."""

    blocks: range
    auxiliaries: dict[str, Auxiliary]  # by name; of the module that ends in the network's output there is none
    along: float = 0.0  # of the modules with auxiliary nets, 0 is the first and 1 the last

    def keys(self, net: Network) -> list[str]:
        """Return the keys of all that the module trains."""
        own = [key for i in self.blocks for key in net.keys(i)]
        return own + [each.prefix + key for each in self.auxiliaries.values() for key in each.keys]

    def run(self, net: Network, params: Tensors, x: Tensor) -> Tensor:
        """Return the output of the module's last block."""
        for i in self.blocks:
            x = net.block(i, params, x)
        return x


@dataclass(frozen=True)
class Isolated(GradientRule):
    """Base of the rules that train such modules; a rule says how a network is cut and what a module's loss is.

    Stores during a step: one module's input, its activations and those of its auxiliary nets, and their gradients. The
    graph is the module's.
    """

    family: ClassVar[str] = "layerwise"
    travels: ClassVar[str] = "weights and auxiliary nets"
    autograd: ClassVar[str] = "inside a module"
    unsplittable: ClassVar[str] = ""

    @abstractmethod
    def cut(self, net: Network) -> Iterator[Module]:
        """Yield the modules from the first to the last, all blocks of the network among them."""

    @abstractmethod
    def local_loss(self, module: Module, params: Tensors, a: Tensor, batch: Batch) -> Tensor:
        """Return the loss (0-dim) that a module with auxiliary nets learns from, a being its output."""

    def modules(self, net: Network) -> tuple[Module, ...]:
        """Return the modules, made once for each network: by `check`, for they cannot be made under vmap."""
        made = _MADE.setdefault(net, {})
        if self not in made:
            with _disable_current_modes():  # nobody is to count a structure's bytes, or to fake it
                made[self] = tuple(self.cut(net))
        return made[self]

    def check(self, net: Network) -> None:
        """Demand a network that can be cut."""
        self.modules(net)

    def init(self, net: Network, seed: int) -> State:
        """Return the network's own initial weights, and auxiliary nets "{block}.{name}.{key}" beside them."""
        params = net.init(seed)
        for module in self.modules(net):
            for i, each in enumerate(module.auxiliaries.values()):
                drawn = each.net.init(integer_seed(seed, Purpose.INIT, module.blocks[-1], i))
                params |= {each.prefix + key: p for key, p in drawn.items()}
        return State(params, {}, self.slots(params))

    def step(self, net: Network, state: State, batch: Batch, lr: float) -> Stats:
        """Run, update and drop one module after the other; stats are those of the network's output."""
        x = batch.x
        for module in self.modules(net):

            def objective(params: Tensors, module: Module = module, x: Tensor = x) -> tuple[Tensor, Tensor | Stats]:
                a = module.run(net, params, x)
                if not module.auxiliaries:
                    return cross_entropy(a, batch)
                return self.local_loss(module, params, a, batch), a.detach()

            grads, told = gradients(objective, {key: state.params[key] for key in module.keys(net)})
            del objective
            self.update(state, grads, lr)
            del grads
            x = told  # the last module's are stats
        return x


_MADE: weakref.WeakKeyDictionary[Network, dict[Isolated, tuple[Module, ...]]] = weakref.WeakKeyDictionary()


def module(net: Network, blocks: range, along: float, **nets: tuple[Callable[[], nn.Sequential], int]) -> Module:
    """Return the module of these blocks, with an auxiliary net of each name: what makes it, and how much it says."""
    last, made = blocks[-1], {}
    if len(net.sizes[last]) > 4:
        raise RuleError(f"block {last} ends in {net.sizes[last]}: auxiliary nets read maps of up to three dimensions")
    for name, (build, outputs) in nets.items():
        try:
            made[name] = Auxiliary(Network(build, net.sizes[last], outputs), f"{last}.{name}.")
        except NetworkError as error:
            raise RuleError(f"block {last} ({describe(net.blocks[last])}) can have no {name} net: {error}") from None
    return Module(blocks, made, along)


def stretches(net: Network, count: int, rule: str) -> list[tuple[range, float]]:
    """Return the blocks of `count` modules and how far along each is: of as many hidden blocks each as can be.

    Args:
        net: the network, whose output block goes with the last hidden ones.
        count: K; 0 makes a module of each hidden block.
        rule: in whose name a network is refused.
    """
    if count < 0 or count == 1:
        raise RuleError(f"{rule} needs rule.local_modules of 2 or more, or 0 for one a hidden block")
    hidden = len(net.hidden)
    demand_hidden(net, 2, rule)
    if count > hidden:
        raise RuleError(
            f"{rule} was asked for {count} modules, and this model has {hidden} hidden blocks: use"
            f" rule.local_modules={hidden} or less"
        )
    count = count or hidden
    ends = [hidden * m // count for m in range(1, count)] + [hidden + 1]
    starts = [0, *ends]
    return [(range(starts[m], ends[m]), m / max(count - 2, 1)) for m in range(count)]


def demand_hidden(net: Network, least: int, rule: str) -> None:
    """Refuse a network of fewer hidden blocks in the name of a rule."""
    if len(net.hidden) < least:
        raise RuleError(
            f"{rule} isolates hidden blocks from one another and the output, and this model has"
            f" {len(net.hidden)} of the {least} that this takes: add a layer before the output"
        )
