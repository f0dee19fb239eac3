"""Cascaded-Forward: blocks that are not trained by their predictions, and on each a linear predictor of its own.

G. Zhao, T. Wang, Y. Jin, C. Lang, Y. Li, H. Ling, "The Cascaded Forward Algorithm for Neural Network Training",
arXiv 2303.09728, 2023. Hidden block l is random and stays so, or is trained by direct feedback alignment (see `dfa`).
Its features x_l are its activities, of each sample brought to mean 0 and variance 1, and a 1. A predictor W_l
(C × n_l + 1) reads the classes from them:

    z_l = W_l x_l      p = mean_l softmax(z_l)

    ce           dW_l = Σ_i s_i (softmax(z_l) − y*)ᵀ x_l       s: a sample's share of the batch
    sparsemax    dW_l = Σ_i s_i (sparsemax(z_l) − y*)ᵀ x_l     Martins & Astudillo, arXiv 1602.02068, 2016
    closed       W_l = Yᵀ X (XᵀX + λ N I)⁻¹                    least squares, X all samples that were seen, N of them

A closed form needs all samples at once; its moments do not. What travels is M_l, and W_l is solved where it is used:

    M_l ← M_l + mean_i x_i [x_i, y_i]      once a round, the mean over the samples that a client visits in it

The mean that federated averaging takes of the clients' M_l, weighted by their samples, is that of the pooled samples:
it gives the W_l of centralised least squares, exactly, however unalike clients are, from one round; no other strategy
does. Rounds add up. The corner of M_l is the mean of 1, so it counts them, and is the N of the equation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..feedback.dfa import DFA
from ..network import Network
from ..optimizer import Gradient, Product, add
from ..rule import Batch, GradientRule, RuleError, State, Stats, Tensors
from ..softmax import cross_entropy_stats, onehot, softmax_error
from .features import features_of, grid, sparsemax

CHOICES = {"blocks": ("random", "dfa"), "predictor": ("ce", "sparsemax", "closed")}
FEWEST = 1e-6  # of a count, where nothing has been seen


@dataclass(frozen=True)
class CascadedForward(GradientRule):
    """A linear predictor on each hidden block, none of which learns from what it predicts.

    Stores during a step: one block's input and output and its features; with a closed form about three matrices of
    the features squared beside. Where dfa trains blocks its own step follows, which stores all of them, and where a
    block is more than linear with an activation the graph inside it. Random blocks have no graph and never travel; nor
    does the output block, but for dfa, which takes its error there.

    All variants run under vmap, mask samples and split batches exactly: an update is a sum over samples in each.

    Departs from the paper: instead of batch normalisation, which couples the samples of a batch, each sample's features
    are normalised, and what the next block sees is not; a map that has more than `features` numbers is averaged over a
    grid, for predictors would outgrow the block, and a closed form stores the square; predictors and blocks learn in
    the same steps, not one after the other, and predictors begin at 0 (all ones predict the same); least squares have a
    ridge, for random features are nearly dependent. A closed form is solved in every step, for the stats.

    Attributes:
        lr: of the predictors' gradient steps. A closed form has none, nor an optimizer.
        blocks: "random" or "dfa".
        predictor: "ce", "sparsemax", or "closed", which wants random blocks, plain federated averaging and, to be
            exact, clients that visit all their samples equally often.
        features: the most that a map hands to its predictor. Vectors are never shortened.
        ridge: λ of a closed form, beside a mean square of 1.
        block_lr: learning rate of blocks under dfa alone; the round's schedule scales it too.
    """

    name: ClassVar[str] = "cascaded-forward"
    family: ClassVar[str] = "layerwise"
    paper: ClassVar[str] = "Zhao et al., arXiv 2303.09728, 2023"
    travels: ClassVar[str] = "predictors or their moments, and blocks if trained"
    autograd: ClassVar[str] = "inside a block, with dfa"
    unsplittable: ClassVar[str] = ""

    lr: float = 0.1
    blocks: Literal["random", "dfa"] = "random"
    predictor: Literal["ce", "sparsemax", "closed"] = "ce"
    features: int = 512
    ridge: float = 1e-3
    block_lr: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        for option, known in CHOICES.items():
            if (value := getattr(self, option)) not in known:
                raise RuleError(f"unknown {option} '{value}': use one of {', '.join(known)}")
        if self.features < 1 or self.ridge <= 0 or self.block_lr <= 0:
            raise RuleError("cascaded-forward needs rule.features ≥ 1, and rule.ridge and block_lr above 0")
        if self.predictor == "closed" and self.blocks == "dfa":
            raise RuleError("a closed form wants blocks that stay as they are: use rule.predictor=ce with dfa")
        if self.predictor == "closed" and (self.optimizer != "sgd" or self.momentum or self.weight_decay):
            raise RuleError("a closed form has no optimizer: leave rule.optimizer, momentum and weight_decay alone")

    @property
    def wants_plain_mean(self) -> bool:
        """Whether only federated averaging itself is right: moments are sums, not weights that may be pulled about."""
        return self.predictor == "closed"

    def check(self, net: Network) -> None:
        """Demand a hidden block."""
        if not net.hidden:
            raise RuleError(
                "cascaded-forward reads hidden blocks, and this model has none: add a layer before the output"
            )

    def init(self, net: Network, seed: int) -> State:
        """Return predictors at 0 or empty moments, and blocks: random ones are fixed, and those of dfa learned."""
        if self.blocks == "dfa":
            params, fixed, _ = self._dfa().init(net, seed)[:3]
        else:
            weights = net.init(seed)
            params, fixed = {}, {key: weights[key] for i in net.hidden for key in net.keys(i)}
        for i in net.hidden:
            rows = 1 + net.sizes[i][0] * math.prod(grid(net.sizes[i], self.features))
            if self.predictor == "closed":
                params[f"{i}.moments"] = torch.zeros(rows, rows + net.classes)
            else:
                params[f"{i}.predictor"] = torch.zeros(net.classes, rows)
        return State(params, fixed, self.slots(params))

    def slots(self, params: Tensors) -> Tensors:
        """Return zeroed optimizer memory, or sums of what a client has seen of the round."""
        if self.predictor == "closed":
            return {f"{key}.seen": torch.zeros_like(p) for key, p in params.items()}
        return super().slots(params)

    def update(self, state: State, grads: Mapping[str, Gradient], lr: float) -> None:
        """Step along gradients, of blocks at their own rate; or take in moments, as sums over samples."""
        if self.predictor == "closed" and not state.gradients:
            for key, moments in grads.items():
                mean, seen = state.params[key], state.slots[f"{key}.seen"]
                mean.sub_(seen / _count(seen).clamp_min(FEWEST))
                add(seen, moments)
                mean.add_(seen / _count(seen).clamp_min(FEWEST))
            return
        for key, grad in grads.items():
            own = 1.0 if key.endswith(".predictor") else self.block_lr / self.lr
            super().update(state, {key: grad}, lr * own)

    def step(self, net: Network, state: State, batch: Batch, lr: float) -> Stats:
        """Run one block after the other and update what reads it; then the blocks, if they learn."""
        weights, x, scores = state.fixed | state.params, batch.x, None
        for i in net.hidden:
            x = net.block(i, weights, x)
            features = features_of(x, self.features)
            z = self._read(net, state, i, features)
            self.update(state, self._gradient(net, i, features, z, batch), lr)
            del features
            scores = together(scores, z)
            del z
        del x
        if self.blocks == "dfa":
            self._dfa().step(net, state, batch, lr * self.block_lr / self.lr)
        return cross_entropy_stats(scores - math.log(len(net.hidden)), batch)

    def logits(self, net: Network, state: State, x: Tensor) -> Tensor:
        """Return log p (B, classes), p the mean of what the blocks' predictors say."""
        weights, scores = state.fixed | state.params, None
        for i in net.hidden:
            x = net.block(i, weights, x)
            scores = together(scores, self._read(net, state, i, features_of(x, self.features)))
        return scores - math.log(len(net.hidden))

    def _dfa(self) -> DFA:
        """Return the rule that trains the blocks, with the paper's feedback."""
        learning = {name: getattr(self, name) for name in ("optimizer", "momentum", "weight_decay")}
        return DFA(lr=self.block_lr, feedback="normal", **learning)

    def _read(self, net: Network, state: State, i: int, features: Tensor) -> Tensor:
        """Return the scores (B, C) of block i's predictor."""
        if self.predictor == "closed":
            return features @ solved(state.params[f"{i}.moments"], net.classes, self.ridge)
        return features @ state.params[f"{i}.predictor"].T

    def _gradient(self, net: Network, i: int, features: Tensor, z: Tensor, batch: Batch) -> dict[str, Gradient]:
        """Return the gradient of block i's predictor; of a closed form the moments of the batch, as sums."""
        if self.predictor == "closed":
            labels = onehot(batch.y, net.classes, features.dtype)
            weighted = features * batch.weight[:, None]
            return {f"{i}.moments": Product(weighted, torch.cat([features, labels], 1))}
        if self.predictor == "ce":
            delta = softmax_error(z, batch)
        else:
            delta = (sparsemax(z) - onehot(batch.y, net.classes, z.dtype)) * batch.share()[:, None]
        return {f"{i}.predictor": Product(delta, features)}


def together(scores: Tensor | None, z: Tensor) -> Tensor:
    """Return log(exp(scores) + softmax(z)): the log of the sum of what predictors say, one more of them with z."""
    log_p = z.log_softmax(1)
    return log_p if scores is None else torch.logaddexp(scores, log_p)


def solved(moments: Tensor, classes: int, ridge: float) -> Tensor:
    """Return the least squares predictor (n + 1, C) of moments (n + 1, n + 1 + C)."""
    gram, cross = moments.split([len(moments), classes], 1)
    gram = gram.clone()
    gram.diagonal().add_(ridge * _count(moments).clamp_min(FEWEST))
    return torch.linalg.solve_ex(gram, cross)[0]


def _count(moments: Tensor) -> Tensor:
    """Return how often the samples of these moments count: the corner, where 1 meets 1."""
    return moments[-1, len(moments) - 1]
