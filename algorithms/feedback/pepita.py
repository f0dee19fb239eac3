"""PEPITA: the output error is added to the input, and a second forward pass tells each block what it would change.

G. Dellaferrera, G. Kreiman, "Error-driven Input Modulation: Solving the Credit Assignment Problem without a Backward
Pass", ICML 2022; R. F. Srinivasan et al., "Forward Learning with Top-Down Feedback", ICLR 2024, arXiv 2302.05440.

    e = softmax(z_L) − y*       xᵐ = x − e F       a_l and aᵐ_l: the activities of block l on x and on xᵐ

    hidden        dW_l = (a_l − aᵐ_l)ᵀ aᵐ_{l−1} / B            dW_L = eᵀ aᵐ_{L−1} / B
    hebbian       dW_l = (a_lᵀ a_{l−1} − aᵐ_lᵀ aᵐ_{l−1}) / B    dW_L the same
    time-local    the two terms of hebbian, each applied as soon as its pass has run block l

F (C × n_in) is fixed and small: a_l − aᵐ_l ≈ f'(z_l) · J e F, of which block 1 makes f'(z_1) · e F W_1ᵀ, the delta of
feedback alignment whose feedback matrix is W_1 Fᵀ. MEMPEPITA (D. P. Pau, F. M. Aymone, COINS 2023,
doi 10.1109/COINS57856.2023.10189239), here "mem", is "hidden" with the first pass forgotten but for e, and run once
more beside the second.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..network import Gradients, Network
from ..noise import seeds
from ..rule import Batch, GradientRule, RuleError, State, Stats, Tensors
from ..seeds import Place
from ..softmax import cross_entropy_stats
from .correlation import Correlate, added, correlation, portions
from .dropout import thinned
from .fixed import feedback, kept_seed, remade
from .mirrors import mirrors, reflect, through

VARIANTS = ("hidden", "hebbian", "time-local", "mem")
Kept = deque[tuple[Tensor, Correlate | None]]  # output and correlation of the hidden blocks still to be compared


@dataclass(frozen=True)
class PEPITA(GradientRule):
    """Two forward passes, on the input and on the input with the error in it; no derivative of any activation.

    Stores during a step, of activities of the batch:

        hidden        the output of every block on x, until that block is compared: O(sum of layers)
        hebbian       input and output of every block on x, with the graph inside it if it has one: O(sum of layers)
        mem           of one block, input and output on x and on xᵐ: O(one block), for a third forward pass
        time-local    of one block, input and output on x or on xᵐ: O(one block)

    and the gradients of one block. No graph where a block is linear with an activation; elsewhere inside it alone. In
    the second pass a block changes when all its passes have run, and what is still to come reads the blocks above it:
    the sums of "mem" are those of "hidden".

    Beyond the papers, whose networks are dense with ReLU and without biases, and have one convolution at most: biases
    learn as weights from an input of 1. Where a block is more, what stands between its weights and its output takes the
    signal back as autograd does, but for activations, whose slope is 1 as in the rule: max-pooling gives it to the
    winner on that input, and a convolution correlates it there with the input's patch. What a map's positions add up
    to is divided by their number. Convolutions hardly learn from it, and what has two of them not at all.

    Departs from the papers: e is the first pass's for dW_L too (the first one's code takes the second's); weights begin
    as the network's own, not He-uniform, which learns faster with one hidden layer and diverges with three; mirrors
    learn in every step, not in epochs of their own.

    The terms of "time-local" nearly cancel, and the second is of changed weights, which pulls activity to 0 by lr²
    where the signal moves it by lr · scale: it wants --set rule.scale=0.5, an lr near 0.01 and one wide hidden
    layer. It is the weakest variant, and in a long run it may diverge.

    Attributes:
        variant: "hidden", "hebbian", "time-local" or "mem".
        scale: F is uniform in ±scale · √(6/n_in); inputs are taken to lie between 0 and 1.
        dropout: part of hidden units left out in a step, the same in all of its passes.
        mirror: κ, at which mirrors M_l of the layers' weights follow noise (see `mirrors`), and F is M_L … M_1, made as
            large as above; 0: F is fixed. Mirrors are as many numbers as the weights and travel with them: what they
            follow is linear in the weights, so the clients' mean mirrors the mean model.
        regenerate: F is made again in every step instead of kept: some twenty operations a number. Same kind and
            size, other numbers.
    """

    name: ClassVar[str] = "pepita"
    family: ClassVar[str] = "feedback"
    travels: ClassVar[str] = "weights, and mirrors if any"
    paper: ClassVar[str] = "Dellaferrera & Kreiman, ICML 2022; Srinivasan et al., ICLR 2024, arXiv 2302.05440"
    autograd: ClassVar[str] = "inside a block"

    lr: float = 0.1
    momentum: float = 0.9
    variant: Literal["hidden", "hebbian", "time-local", "mem"] = "hidden"
    scale: float = 0.05
    dropout: float = 0.1
    mirror: float = 0.0
    regenerate: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.variant not in VARIANTS:
            raise RuleError(f"unknown variant '{self.variant}': use one of {', '.join(VARIANTS)}")
        if not 0 <= self.dropout < 1:
            raise RuleError("pepita leaves out a part of the units: it needs 0 ≤ rule.dropout < 1")
        if not 0 <= self.mirror <= 1:
            raise RuleError("a mirror moves a part of the way: pepita needs 0 ≤ rule.mirror ≤ 1")
        if self.mirror and self.regenerate:
            raise RuleError("mirrors leave no fixed matrix to regenerate: use one of rule.mirror and rule.regenerate")

    @property
    def unsplittable(self) -> str:
        """Why parts of a batch do not add up."""
        if self.variant == "time-local":
            return "the weights change between its two passes"
        return "mirrors change before the second pass" if self.mirror else ""

    def check(self, net: Network) -> None:
        """Demand layers that have mirrors, if there are to be any, and no optimizer memory between halves of a step."""
        if self.mirror and not net.is_dense:
            raise RuleError("rule.mirror is of dense layers with relu or tanh: leave it out, or use --model mlp")
        if self.variant == "time-local" and (self.momentum or self.weight_decay or self.optimizer != "sgd"):
            raise RuleError(
                "time-local's terms cancel in plain sgd alone: use --set rule.momentum=0.0, and no weight_decay"
            )

    def draw(self, place: Place, batch_size: int, classes: int) -> Tensor | None:
        """Return a seed for the mask and the noise of each sample, (B,) int64, if there is any."""
        return seeds(place, batch_size) if self.dropout or self.mirror else None

    def init(self, net: Network, seed: int) -> State:
        """Return the network's weights and the fixed "feedback" F (C, n_in), or mirrors "{l}.mirror" of the weights."""
        params, fixed = net.init(seed), {}
        if self.mirror:
            params |= mirrors(net, params)
        elif self.regenerate:
            fixed = kept_seed(seed, self.scale)
        else:
            width = torch.Size(net.shape).numel()
            fixed["feedback"] = feedback(seed, 0, net.classes, width, self.scale * 6**0.5)
        return State(params, fixed, self.slots(params))

    def learned(self, params: Tensors) -> Tensors:
        """Return all but the mirrors, which follow noise instead of gradients."""
        return {key: p for key, p in params.items() if not key.endswith(".mirror")}

    def stackable(self, net: Network) -> bool:
        """Return whether there is no graph anywhere."""
        return self.closed_form(net)

    def step(self, net: Network, state: State, batch: Batch, lr: float) -> Stats:
        """Run on the input and on the modulated input, and update each block in the second pass."""
        share = batch.share()
        kept, scores = self._first_pass(net, state, batch, share, lr)
        error, stats = scores.softmax(-1), cross_entropy_stats(scores, batch)
        del scores
        error.scatter_add_(-1, batch.y.unsqueeze(-1), -torch.ones_like(share).unsqueeze(-1))
        x, modulated = batch.x, batch.x - (error @ self._feedback(net, state, batch)).view(batch.x.shape)
        for i in net.hidden:
            if self.variant == "mem":
                x = self._thinned(net.block(i, state.params, x), batch, i)
                kept.append((x, None))
            a, correlate = correlation(net, i, state.params, modulated)
            modulated = self._thinned(a, batch, i)
            del a
            grads = self._compared(kept, correlate, modulated, share)
            del correlate
            self.update(state, grads, lr)
            del grads
        _, correlate = correlation(net, net.output, state.params, modulated)
        self.update(state, correlate(error.mul_(share.unsqueeze(-1))), lr)
        return stats

    def _feedback(self, net: Network, state: State, batch: Batch) -> Tensor:
        """Return F (..., C, n_in); of mirrors, their product, as large as one that is drawn."""
        if not self.mirror:
            if not self.regenerate:
                return state.fixed["feedback"]
            shape = torch.Size((net.classes, torch.Size(net.shape).numel()))
            return remade(state.fixed["seed"], 0, shape, self.scale * (6 / shape[1]) ** 0.5, batch.weight.dtype)
        reflect(net, state.params, batch, self.mirror, len(net.blocks))  # hidden blocks' masks have the first streams
        product = through(net, state.params)
        size = product.square().mean((-2, -1), keepdim=True).sqrt_().clamp_min_(1e-12)
        return product.mul_(self.scale * (2 / product.shape[-1]) ** 0.5).div_(size)

    def _first_pass(self, net: Network, state: State, batch: Batch, share: Tensor, lr: float) -> tuple[Kept, Tensor]:
        """Run on the input; return what the second pass needs of each hidden block, and the scores (..., B, C)."""
        x, kept = batch.x, deque()
        for i in net.hidden:
            if self.variant in ("hidden", "mem"):
                a, correlate = net.block(i, state.params, x), None
            else:
                a, correlate = correlation(net, i, state.params, x)
            x = self._thinned(a, batch, i)
            del a
            if self.variant == "time-local":
                self.update(state, correlate(x * portions(share, x)), lr)
            elif self.variant != "mem":
                kept.append((x, correlate))
            del correlate
        return kept, net.block(net.output, state.params, x)

    def _compared(self, kept: Kept, correlate: Correlate, modulated: Tensor, share: Tensor) -> Gradients:
        """Return a block's gradients, given its output in the second pass; what is kept of its first goes."""
        part = portions(share, modulated)
        if self.variant == "time-local":
            return correlate(modulated * -part)
        a, before = kept.popleft()
        if self.variant == "hebbian":
            return added(before(a * part), correlate(modulated * -part))
        return correlate((a - modulated).mul_(part))

    def _thinned(self, a: Tensor, batch: Batch, i: int) -> Tensor:
        """Return block i's output without the units that this step leaves out."""
        return thinned(a, batch.draws, i, self.dropout) if self.dropout else a
