"""Structured Knowledge Accumulation: layers sharpen their decisions, without labels; what they know, a read-out tells.

M. Bouarfa, "Structured Knowledge Accumulation: An Autonomous Framework for Layer-Wise Entropy Reduction in Neural
Learning", arXiv 2503.13942, and "... The Principle of Entropic Least Action in Forward-Only Neural Learning",
arXiv 2504.03214, 2025. A hidden layer l makes knowledge z_l of what the one below decides, and decides D_l by it, K
times over the same batch, k = 0 … K − 1, with an update each time but the first; of a sample whose share of it is r,

    z_l^k = D_{l−1}^k W_lᵀ + b_l      D_l^k = σ(z_l^k)      ΔD_l^k = D_l^k − D_l^{k−1}      D_0 = x
    g_l = −r (z_l^k D_l^k (1 − D_l^k) + ΔD_l^k) / ln 2      dW_l = g_lᵀ D_{l−1}^{k−1}      db_l = Σ g_l

as the author's code has it: g is the gradient in z^k of the entropy −Σ_k z^k ΔD^k / ln 2, and 1/ln 2 stands before both
of its terms; the decisions below are those of the pass before. W ← W − η dW, b likewise.

Labels reach nothing of this. The network's output block is a read-out: it learns from labels, by its own cross-entropy,
to read the last decisions, which do not learn from it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..network import Network
from ..optimizer import Product, add
from ..repeats import alike
from ..rule import Batch, GradientRule, RuleError, State, Stats, Tensors
from ..softmax import softmax_error_and_stats


@dataclass(frozen=True)
class KnowledgeAccumulation(GradientRule):
    """Hidden layers learn without labels, and a supervised read-out shows what can be read of them.

    Accuracy is the read-out's: compare it with `passes` = 1, the same read-out of layers that never learn. The rule
    makes no claim to gain on that, and the papers report entropies alone. With these defaults it reads digits as well,
    and the longer layers learn the worse: g drives every unit to where most samples have it, and in the long run all
    samples are decided alike. What counts is the time η (K − 1) of all steps together. The papers spend 0.5 once, on
    one batch of 1,000 images; here η is small because there are many batches.

    Stores during a step: one decision of every hidden unit, whatever K, since each layer is updated as soon as it has
    decided (the layers above take its decision, not its weights), and what one layer needs. No graph but inside the
    output block where that is more than linear. A step costs K forward passes and K − 1 updates.

    Departs from the papers: there is a read-out. The decisions are sigmoids whatever activations the network names, in
    inference too. The layers begin with the network's initial weights, scaled for sigmoids, instead of 0.01 N(0, 1), of
    which a second layer decides hardly anything. `optimizer`, momentum and weight decay are the read-out's.

    Attributes:
        lr: of the read-out.
        passes: K.
        eta: η; the round's schedule scales it as it does lr.
        scale: hidden layers' initial weights are the network's own times this. A sigmoid has a quarter of tanh's slope,
            and PyTorch's weights are √3 smaller than Glorot's.
    """

    name: ClassVar[str] = "knowledge-accumulation"
    family: ClassVar[str] = "layerwise"
    paper: ClassVar[str] = "Bouarfa, arXiv 2503.13942 and 2504.03214, 2025"
    autograd: ClassVar[str] = "inside the output block"
    unsplittable: ClassVar[str] = "each pass goes through weights that the whole batch has changed in the one before"

    lr: float = 0.1
    momentum: float = 0.9
    passes: int = 10
    eta: float = 1e-5
    scale: float = 8.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.passes < 1 or min(self.lr, self.eta, self.scale) <= 0:
            raise RuleError("knowledge-accumulation needs rule.passes ≥ 1, and lr, rule.eta and scale above 0")

    def check(self, net: Network) -> None:
        """Demand hidden layers, all dense."""
        if not net.hidden or not all(net.dense(i) for i in net.hidden):
            raise RuleError("knowledge-accumulation takes hidden layers that are dense, one at least: use mlp")

    def init(self, net: Network, seed: int) -> State:
        """Return the network's weights, scaled in hidden layers."""
        params = net.init(seed)
        for i in net.hidden:
            params[net.dense(i).weight].mul_(self.scale)
        return State(params, {}, self.slots(params))

    def learned(self, params: Tensors) -> Tensors:
        """Return the read-out: hidden layers change by themselves."""
        last = max(int(key.partition(".")[0]) for key in params)
        return {key: p for key, p in params.items() if key.startswith(f"{last}.")}

    def stackable(self, net: Network) -> bool:
        """Return whether there is no graph anywhere."""
        return self.closed_form(net)

    def step(self, net: Network, state: State, batch: Batch, lr: float) -> Stats:
        """Decide and read, then decide again and learn, pass by pass; stats are those of the first decisions."""
        rate, decided = -self.eta * lr / self.lr, []
        share = batch.share().unsqueeze(-1).mul_(-1 / math.log(2))
        x = net.dense(0).vectors(state.params, batch.x)
        for i in net.hidden:
            decided.append(net.dense(i).affine(state.params, decided[-1] if i else x).sigmoid_())
        scores, pull = net.block_vjp(net.output, state.params, decided[-1])
        error, stats = softmax_error_and_stats(scores, batch)
        self.update(state, pull(error), lr)
        del scores, pull, error
        for _ in alike(self.passes - 1):
            below = before = x
            for i in net.hidden:
                dense = net.dense(i)
                z = dense.affine(state.params, below)
                now = z.sigmoid()
                g = z.mul_(now).mul_(1 - now).add_(now).sub_(decided[i]).mul_(share)
                add(state.params[dense.weight], Product(g, before), rate)
                if dense.bias in state.params:
                    state.params[dense.bias].add_(g.sum(-2), alpha=rate)
                below, before, decided[i] = now, decided[i], now
                del z, g, now
        return stats

    def activities(self, net: Network, state: State, x: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Yield the decisions of each hidden layer."""
        for i in net.hidden:
            x = net.dense(i).affine(state.params, x).sigmoid_()
            yield i, x

    def logits(self, net: Network, state: State, x: Tensor) -> Tensor:
        """Return the read-out's scores (B, classes)."""
        for _, decided in self.activities(net, state, x):
            x = decided
        return net.block(net.output, state.params, x)
