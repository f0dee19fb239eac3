"""Predictive coding, or inference learning: activities settle towards the label, and blocks learn to predict them.

N. Alonso, B. Millidge, J. Krichmar, E. Neftci, "A Theoretical Framework for Inference Learning", NeurIPS 2022,
arXiv 2206.00164. The activities h_1 … h_{L−1} begin as the forward pass leaves them. Input and label are held, and T
times all activities at once descend the energy F of their prediction errors:

    ε_l = h_l − a_l(h_{l−1})      ε_L = κ (y* − softmax(a_L(h_{L−1})))      F = ½ Σ_l ‖ε_l‖² + κ CE
    h_l ← h_l + γ_bot (∂a_{l+1}/∂h_l)ᵀ ε_{l+1} − γ_top ε_l

where a_l is block l. Then each block descends F by itself, weights and bias alike:

    il       dW_l = −Σ_b s_b (∂a_l/∂W_l)ᵀ ε_lb              W_l ← W_l − η dW_l         κ = 1
    prox     dW_l = −Σ_b s_b (∂a_l/∂W_l)ᵀ ε_lb / n_lb       W_l ← W_l − dW_l           κ_b = η n_Lb / (1 + η n_Lb)

with s_b a sample's share of the batch, and n_lb = ‖h_{l−1,b}‖² + 1 + ϵ (n_L is of the forward pass). Of one sample, the
prox step closes a residual at once; the output block's, η (y* − softmax) h / (1 + η n), is that of implicit SGD.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from ..graph import pullback
from ..network import Network
from ..optimizer import Gradient
from ..repeats import alike
from ..rule import Batch, GradientRule, RuleError, State, Stats, Tensors
from ..softmax import cross_entropy_stats, softmax_error


@dataclass(frozen=True)
class PredictiveCoding(GradientRule):
    """Local prediction errors after T steps of relaxation stand for the backward pass.

    Stores during a step: one activity of every hidden block, whatever T, and the first block's prediction; beside them
    what one block needs. No graph where the block is linear with an activation; elsewhere a graph inside the block
    alone. T costs time: each step is a forward and a backward pass through all blocks but the first, whose prediction
    stays.

    Departs from the paper: a block here ends in its activation, so h_l is what comes out of it and ε_l is measured
    there; the paper's h_l goes into it, a_l = W_l f(h_{l−1}). With predictions held fixed both give backpropagation's
    gradient, and both work with the same f'. Each sample relaxes and is normalised by itself, which for the paper's
    batch of 1 is the same and for more lets the parts of a batch add up (the reference sums norms over the batch). κ
    stays as the forward pass sets it, so that relaxation descends one energy. γ is 0.1 instead of about 0.02: what
    settles farther in 25 steps learns faster. A convolution's n_l counts an input as often as its kernel reads it; with
    a norm inside the block it bounds nothing.

    Attributes:
        lr: η; of "prox" it moves the output's target, and steps are never longer than to close a residual.
        scheme: "il" or "prox".
        relaxation: T.
        gamma_bot: γ_bot, how far an activity follows the error of the block above.
        gamma_top: γ_top, how far it returns to its own prediction. Where it is not γ_bot, relaxation descends F with
            block l's term weighted (γ_bot/γ_top)^l: errors fade or grow on their way down.
        epsilon: ϵ, in the norms of "prox".
    """

    name: ClassVar[str] = "predictive-coding"
    family: ClassVar[str] = "equilibrium"
    paper: ClassVar[str] = "Alonso et al., NeurIPS 2022, arXiv 2206.00164"
    autograd: ClassVar[str] = "inside a block"
    unsplittable: ClassVar[str] = ""

    lr: float = 0.3
    scheme: Literal["il", "prox"] = "il"
    relaxation: int = 25
    gamma_bot: float = 0.1
    gamma_top: float = 0.1
    epsilon: float = 0.25

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scheme not in ("il", "prox"):
            raise RuleError(f"unknown scheme '{self.scheme}': use il or prox")
        if self.relaxation < 1 or self.gamma_bot <= 0 or self.gamma_top < 0 or self.epsilon < 0:
            raise RuleError("predictive-coding needs relaxation ≥ 1, gamma_bot > 0, gamma_top and epsilon ≥ 0")
        if self.scheme == "prox" and (self.optimizer != "sgd" or self.momentum or self.weight_decay):
            raise RuleError("scheme prox finds its own steps: leave optimizer, momentum and weight_decay as they are")

    def check(self, net: Network) -> None:
        """Demand a hidden block."""
        if not net.hidden:
            raise RuleError(
                "predictive-coding relaxes hidden blocks, and this model has none: add a layer before the output"
            )

    def init(self, net: Network, seed: int) -> State:
        """Return the network's own initial weights."""
        params = net.init(seed)
        return State(params, {}, self.slots(params))

    def stackable(self, net: Network) -> bool:
        """Return whether there is no graph anywhere."""
        return self.closed_form(net)

    def update(self, state: State, grads: Mapping[str, Gradient], lr: float) -> None:
        """Apply a step of length η, or of "prox" whole."""
        super().update(state, grads, lr if self.scheme == "il" else 1.0)

    def step(self, net: Network, state: State, batch: Batch, lr: float) -> Stats:
        """Relax, then update one block after the other; stats are those of the forward pass."""
        h, x = [], batch.x
        for i in net.hidden:
            x = net.block(i, state.params, x)
            h.append(x)
        pulled = batch.weight.new_ones(batch.weight.shape)  # κ, (..., B)
        if self.scheme == "prox":
            n = lr * self._norms(net, net.output, x, batch)
            pulled = n / (1 + n)
        # The error at the scores with κ in place of a share of the batch.
        top = batch._replace(weight=pulled, total=batch.weight.new_ones(()))
        stats = self._relax(net, state.params, h, top, batch)
        x = batch.x
        for i in range(len(net.blocks)):
            a, pull = net.block_vjp(i, state.params, x)
            error = a - h[i] if i in net.hidden else softmax_error(a, top)
            del a
            share = batch.share()
            if self.scheme == "prox":
                share = share / self._norms(net, i, x, batch)
            grads = pull(error.mul_(of_rows(share, error)))
            del pull, error
            self.update(state, grads, lr)
            del grads
            x = h[i] if i in net.hidden else None
        return stats

    def _relax(self, net: Network, params: Tensors, h: list[Tensor], top: Batch, batch: Batch) -> Stats:
        """Let the activities h of the hidden blocks settle, in place, and return the stats of the forward pass."""
        stats, first = None, h[0].clone()
        for _ in alike(self.relaxation):
            below = h[0] - first  # ε of the block below; an activity moves once the block above has pulled
            for i in range(1, len(net.blocks)):
                a, pull = pull_input(net, i, params, h[i - 1])
                if i in net.hidden:
                    error = h[i] - a
                else:
                    error = softmax_error(a, top).neg_()
                    stats = stats or cross_entropy_stats(a, batch)
                del a
                h[i - 1].add_(pull(self.gamma_bot * error)).sub_(below, alpha=self.gamma_top)
                below = error
                del pull, error
        return stats

    def _norms(self, net: Network, i: int, x: Tensor, batch: Batch) -> Tensor:
        """Return n (..., B) of the inputs x of block i."""
        reads = max(p.shape[2:].numel() for p in net.blocks[i].parameters())
        return reads * x.square().sum(tuple(range(batch.weight.dim(), x.dim()))) + (1 + self.epsilon)


def pull_input(net: Network, i: int, params: Tensors, x: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Run block i and return its output with the function that pulls an output gradient back to x, once."""
    if net.dense(i):
        a, pull = net.block_vjp(i, params, x, wrt_input=True)
    else:  # as `block_vjp`, without a gradient of weights
        a, pull = pullback(lambda _, x: net.block(i, params, x), {}, x, True)
    return a, lambda gradient: pull(gradient)[1]


def of_rows(factor: Tensor, a: Tensor) -> Tensor:
    """Return factors (..., B) of the samples so shaped that they multiply a (..., B, features)."""
    return factor.reshape(*factor.shape, *[1] * (a.dim() - factor.dim()))
