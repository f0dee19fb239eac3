"""The contract every learning rule keeps.

A rule is a frozen dataclass of its hyper-parameters and holds no tensor. Tensors live in plain dictionaries keyed
"{block}.{parameter}", and three methods say how a network learns:

    init(net, seed)              -> State    parameters, fixed random matrices, optimizer memory
    step(net, state, batch, lr)  -> Stats    learn from one minibatch, in place
    logits(net, state, x)        -> Tensor   the rule's own way of inference

`step` and `logits` work in the accuracy of the state that they are given: tests and diagnoses ask for float64.

A rule whose answers are scalars (`exchange = "scalars"`) splits `step` into two halves: `probe` runs on the client and
returns a few numbers, `apply` turns numbers into an update and is all that the server needs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from . import optimizer
from .directions import SHARED, Directions
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

    @abstractmethod
    def logits(self, net: Network, state: State, x: Tensor) -> Tensor:
        """Return class scores (B, classes) of inputs (B, *shape); the largest is the prediction."""


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


@dataclass(frozen=True)
class ScalarRule(Rule):
    """A rule whose clients answer with a few scalars a step, along directions that every replica can make again.

    A step is four functions. A client probes and sends what it found; the server passes on what others need of it;
    whoever knows that turns it into coefficients c_ik of an estimate ĝ = Σ_ik c_ik z_ik, and descends along it:

        probe(net, state, batch, lr)       -> scalars (n,), stats
        pass_on(scalars, weights)          -> scalars (N, m), as they are unless a rule needs fewer
        coefficients(scalars, weights)     -> c (N, K)
        descend(state, draws, c, lr)       in place, with the same bits on every machine

    `draw` makes a step's directions of its place alone: the server makes them again.

    Attributes:
        directions: K, along which a client looks in a step.
        own: every client has directions of its own, so that N clients see N·K of them; else all share K. The answers
            of the others then travel one by one, where of shared ones the mean is enough.
        pool: the directions of a step are some of this many candidates, the same all along, so that a run is a sum of
            that many directions; 0 takes new ones in every step.
        rebase: rounds after which the pool is drawn anew; 0: never.
        momentum: heavy-ball momentum of what the server makes of a pool's answers; not of a client's own steps.
        weight_decay: L2 penalty, likewise.
        chunk: parameters perturbed at a time, about 10 bytes each (signs, their bits, a product);
            changes no bit of the result.
        abreast: directions looked along at once, as one batched program, as far as a device's budget allows; each
            takes a copy of the parameters and of a pass's activations: what a rule says that it stores is for 1. The
            same numbers within rounding.
    """

    exchange: ClassVar[Literal["weights", "scalars"]] = "scalars"
    travels: ClassVar[str] = "scalars"
    linear: ClassVar[bool] = True  # `descend` is w ← w − η ĝ: then coefficients alone can stand for a model

    directions: int = 32
    own: bool = False
    pool: int = 0
    rebase: int = 0
    momentum: float = 0.0
    weight_decay: float = 0.0
    chunk: int = 4096
    abreast: int = 1

    def __post_init__(self) -> None:
        if self.directions < 1 or self.chunk < 1 or self.abreast < 1:
            raise RuleError(f"{self.name or type(self).__name__} needs directions, chunk and abreast ≥ 1")
        if self.pool and not self.linear:
            raise RuleError(f"{self.name} does more with directions than add them up: it cannot have a pool of them")
        if self.pool and self.pool < self.directions:
            raise RuleError(f"a pool of {self.pool} has not {self.directions} directions: use rule.pool ≥ directions")
        if not self.pool and (self.rebase or self.momentum or self.weight_decay):
            raise RuleError("rebase, momentum and weight_decay work on the coefficients of a pool: set rule.pool too")
        if self.rebase < 0 or not 0 <= self.momentum < 1 or self.weight_decay < 0:
            raise RuleError("rule.rebase and weight_decay must be ≥ 0, and momentum at least 0 and below 1")

    @property
    def numbers(self) -> int:
        """The scalars that a client sends for one step."""
        return self.directions

    @property
    def passed(self) -> int:
        """The scalars of an answer that are passed on for one step."""
        return self.numbers

    def init(self, net: Network, seed: int) -> State:
        """Return the network's own initial weights."""
        params = net.init(seed)
        return State(params, {}, self.slots(params))

    def draw(self, place: Place, batch_size: int, classes: int) -> Directions:
        """Return the step's directions; of a rule whose clients share them, the same for every client."""
        client = place.client if self.own else SHARED
        return Directions.at(place._replace(client=client), self.directions, self.pool, self.base(place.round))

    def slots(self, params: Tensors) -> Tensors:
        """Return what `descend` keeps beside `params`, as it begins; every replica keeps it from round to round."""
        return {}

    def base(self, server_round: int) -> int:
        """Return which pool a round (from 1) draws from."""
        return max(server_round - 1, 0) // self.rebase if self.rebase else 0

    @abstractmethod
    def probe(self, net: Network, state: State, batch: Batch, lr: float) -> tuple[Tensor, Stats]:
        """Return (scalars (n,) float32, n = `numbers`, along the directions `batch.draws`, stats).

        Parameters end as they began, within rounding. If the rule is splittable, the scalars of the parts of a batch
        add up to the batch's.
        """

    def pass_on(self, scalars: Tensor, weights: Tensor) -> Tensor:
        """Return what is passed on (N, m), m = `passed`, of answers (N, n) that weigh (N,), in sum 1.

        An answer that all clients share in (their mean) is one row of weight 1.
        """
        return scalars

    def coefficients(self, scalars: Tensor, weights: Tensor) -> Tensor:
        """Return the coefficients (N, K) of the estimate, from what is passed on of answers that weigh (N,)."""
        return scalars * (weights / self.directions).unsqueeze(1)

    def descend(self, state: State, draws: Sequence[Directions], coefficients: Tensor, lr: float) -> None:
        """Step w ← w − η c_ik z_ik, in place on `state`, row after row and k after k, each rounding once."""
        steps = coefficients * -lr
        for i, own in enumerate(draws):
            for k in own.each(self.directions):
                own.add(state.params, k, steps[i, k], self.chunk)

    def apply(self, state: State, draws: Directions, scalars: Tensor, lr: float) -> None:
        """Descend along one answer."""
        alone = scalars.new_ones(1)
        self.descend(state, [draws], self.coefficients(self.pass_on(scalars.unsqueeze(0), alone), alone), lr)

    def step(self, net: Network, state: State, batch: Batch, lr: float) -> Stats:
        """Probe, then descend along one's own scalars."""
        scalars, stats = self.probe(net, state, batch, lr)
        self.apply(state, batch.draws, scalars, lr)
        return stats

    def logits(self, net: Network, state: State, x: Tensor) -> Tensor:
        """Return the network's output (B, classes)."""
        return net.forward(state.params, x)


def cross_entropy(logits: Tensor, batch: Batch) -> tuple[Tensor, Stats]:
    """Return the weighted mean cross-entropy of `logits` (B, C), and the stats of it."""
    losses = torch.nn.functional.cross_entropy(logits, batch.y, reduction="none")
    stats = stats_of(losses.detach(), logits, batch)
    return losses.dot(batch.share(stats.weight)), stats


def cross_entropy_stats(logits: Tensor, batch: Batch) -> Stats:
    """Return the stats of the cross-entropy of `logits` (..., B, C)."""
    if logits.dim() == 2:
        losses = torch.nn.functional.cross_entropy(logits, batch.y, reduction="none")
    else:
        losses = _negated_at(logits.log_softmax(-1), batch.y)
    return stats_of(losses, logits, batch)


def softmax_error(logits: Tensor, batch: Batch) -> Tensor:
    """Return the gradient of the weighted mean cross-entropy in the logits: (softmax − onehot) · share, (..., B, C)."""
    return _error_(logits.softmax(-1), batch.y, batch.share())


def softmax_error_and_stats(logits: Tensor, batch: Batch) -> tuple[Tensor, Stats]:
    """Return the gradient of the cross-entropy in the logits, and the stats of it, from one softmax."""
    log_p = logits.log_softmax(-1)
    stats = stats_of(_negated_at(log_p, batch.y), logits, batch)
    return _error_(log_p.exp_(), batch.y, batch.share(stats.weight)), stats


def _negated_at(log_p: Tensor, y: Tensor) -> Tensor:
    """Return −log p of each sample's class, (..., B)."""
    return log_p.gather(-1, y.unsqueeze(-1)).squeeze(-1).neg()


def _error_(softmax: Tensor, y: Tensor, share: Tensor) -> Tensor:
    share = share.unsqueeze(-1)
    return softmax.mul_(share).scatter_add_(-1, y.unsqueeze(-1), -share)


def onehot(y: Tensor, classes: int, dtype: torch.dtype) -> Tensor:
    """Return labels (B,) as rows (B, C) of zeros and a one, without asking the device for a value."""
    return (y[:, None] == torch.arange(classes, device=y.device)).to(dtype)


def stats_of(losses: Tensor, logits: Tensor, batch: Batch) -> Stats:
    """Return the stats of per-sample `losses` (..., B) and class scores `logits` (..., B, C)."""
    correct = (logits.argmax(-1) == batch.y).to(batch.weight.dtype)
    return Stats(_dot(losses, batch.weight), _dot(correct, batch.weight), batch.weight.sum(-1))


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return a.dot(b) if a.dim() == 1 else (a * b).sum(-1)
