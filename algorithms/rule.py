"""The contract every learning rule keeps.

A rule is a frozen dataclass of its hyper-parameters and holds no tensor. Tensors live in plain dictionaries keyed
"{block}.{parameter}", and three methods say how a network learns:

    init(net, seed)              -> State    parameters, fixed random matrices, optimizer memory
    step(net, state, batch, lr)  -> Stats    learn from one minibatch, in place
    logits(net, state, x)        -> Tensor   the rule's own way of inference

`step` and `logits` work in the accuracy of the state that they are given: tests and diagnoses ask for float64. A rule
whose clients answer with a few numbers instead of weights keeps more, which `scalar_rule` says.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

from torch import Tensor

from . import optimizer
from .optimizer import Gradient
from .seeds import Place

if TYPE_CHECKING:
    from .network import Network

Tensors = dict[str, Tensor]


class RuleError(ValueError):
    """A rule cannot be used as asked; the message says why and what to do."""


class Batch(NamedTuple):
    """One minibatch of B samples. A sample of weight 0 changes nothing, so ragged clients can be padded."""

    x: Tensor  # (B, *shape) float32
    y: Tensor  # (B,) int64
    weight: Tensor  # (B,) float32, 1 for a sample and 0 for padding
    draws: Any = None  # what `Rule.draw` made for this step; of a tensor, one row a sample
    total: Tensor | None = None  # 0-dim, of a part of a batch: the sum of weights of the whole

    def share(self, weight: Tensor | None = None) -> Tensor:
        """Return each sample's share of the batch mean: weight / sum of weights, shape (B,).

        Args:
            weight: the sum of this batch's weights, if it is known already.
        """
        total = self.total
        if total is None:
            total = self.weight.sum(-1) if weight is None else weight
        return self.weight / total.clamp_min(1e-12).unsqueeze(-1)


class State(NamedTuple):
    """All tensors of one replica."""

    params: Tensors  # exchanged with the server
    fixed: Tensors  # derived from the seed, never sent
    slots: Tensors  # optimizer memory, stays on the device and starts anew each round
    gradients: Tensors = {}  # noqa: RUF012  (never changed) sums over the parts of a split batch; else empty


class Stats(NamedTuple):
    """What a step observed, each a 0-dim tensor: sums over the samples of the batch, weighted."""

    loss: Tensor  # of the rule's own objective, before the update
    correct: Tensor  # samples classified rightly, before the update
    weight: Tensor  # number of samples


@dataclass(frozen=True)
class Rule(ABC):
    """Base of all rules. Subclasses are frozen dataclasses whose class attributes describe them."""

    name: ClassVar[str] = ""
    family: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    travels: ClassVar[str] = "weights"  # what a client sends up, in words
    autograd: ClassVar[str] = "none"  # where a graph is built: "none", "inside a block", "whole network"
    exchange: ClassVar[Literal["weights", "scalars"]] = "weights"
    vmappable: ClassVar[bool] = True  # `step` runs under torch.func.vmap over a leading client axis
    # Why the parts of a batch do not add up to its update, in words; "" claims that they do (gradient accumulation).
    unsplittable: ClassVar[str] = "nothing says that the parts of a batch add up to its update"
    wants_plain_mean: ClassVar[bool] = False  # of what clients send, the mean weighted by samples is right and no other

    lr: float = 0.1

    def stackable(self, net: Network) -> bool:
        """Return whether `step` also takes replicas side by side: all tensors but `fixed` with one more axis in front.

        It then returns stats of one number a replica, and costs less than under `torch.func.vmap`.
        """
        return False

    def check(self, net: Network) -> None:  # noqa: B027  (a rule without demands need not override it)
        """Raise `RuleError` if this rule cannot train `net`, saying why."""

    def draw(self, place: Place, batch_size: int, classes: int) -> Any:
        """Return what `step` needs from chance at `place`; it reaches the rule as `batch.draws`."""
        return None

    def goodness(self, net: Network, state: State, batch: Batch) -> Iterable[tuple[int, tuple[Tensor, Tensor]]]:
        """Return (hidden block, (goodness (B,) of samples, of their negatives)) of a rule that has such a thing."""
        return ()

    def activities(self, net: Network, state: State, x: Tensor) -> Iterable[tuple[int, Tensor]] | None:
        """Return (hidden block, its output (B, ...)) of inference; None: whatever `net.block` makes in `logits`."""
        return None

    @abstractmethod
    def init(self, net: Network, seed: int) -> State:
        """Return the initial state of a replica; equal seeds give equal bits."""

    @abstractmethod
    def step(self, net: Network, state: State, batch: Batch, lr: float) -> Stats:
        """Learn from one minibatch, in place on `state`, with this step's learning rate."""

    def logits(self, net: Network, state: State, x: Tensor) -> Tensor:
        """Return class scores (B, classes) of inputs (B, *shape), the largest of which is the prediction.

        They are the network's output, if a rule does not say otherwise.
        """
        return net.forward(state.params, x)


@dataclass(frozen=True)
class GradientRule(Rule):
    """A rule that ends in a gradient per parameter, which a per-tensor optimizer turns into an update.

    Attributes:
        lr: learning rate.
        optimizer: "sgd" or "adam".
        momentum: heavy-ball momentum of sgd; 0 needs no memory. Adam has its own and does not read it.
        weight_decay: L2 penalty, added to the gradient.
    """

    optimizer: Literal["sgd", "adam"] = "sgd"
    momentum: float = 0.0
    weight_decay: float = 0.0

    def closed_form(self, net: Network) -> bool:
        """Return whether a step that needs no graph where blocks are dense is `stackable`: with sgd, on dense ones.

        A subclass may do otherwise in any method, so it must say so anew.
        """
        return "stackable" in vars(type(self)) and self.optimizer == "sgd" and net.is_dense

    def __post_init__(self) -> None:
        if self.optimizer not in optimizer.NAMES:
            raise RuleError(f"unknown optimizer '{self.optimizer}': use one of {', '.join(optimizer.NAMES)}")
        if not 0 <= self.momentum < 1 or self.weight_decay < 0:
            raise RuleError(f"{self.name or type(self).__name__} needs 0 ≤ momentum < 1 and weight_decay ≥ 0")

    def learned(self, params: Tensors) -> Tensors:
        """Return those of a replica's parameters that gradients change."""
        return params

    def slots(self, params: Tensors) -> Tensors:
        """Return zeroed optimizer memory for what is learned of `params`."""
        return optimizer.slots(self.optimizer, self.momentum, self.learned(params))

    def update(self, state: State, grads: Mapping[str, Gradient], lr: float) -> None:
        """Apply one optimizer step to the parameters named in `grads`, in place; of a part of a batch, add them up."""
        for key, grad in grads.items():
            if state.gradients:
                optimizer.add(state.gradients[key], grad)
            else:
                optimizer.update(self.optimizer, self.momentum, self.weight_decay, state, key, grad, lr)
