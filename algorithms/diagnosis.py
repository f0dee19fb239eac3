"""What a rule does to each block of a network: its angle with the gradient, and what the block's units do.

Of block l, with Δw_l what one step adds to its weights, L the cross-entropy of the rule's own class scores, and a_l the
n_l numbers that it makes of a sample:

    angle        arccos ⟨−Δw_l, ∂L/∂w_l⟩ / (‖Δw_l‖ ‖∂L/∂w_l‖)     0° follows the gradient, 90° knows nothing of it
    hoyer        (√n_l − ‖a_l‖₁/‖a_l‖₂) / (√n_l − 1)                1: one unit is active; 0: all alike
    separation   (mean G⁺_l − mean G⁻_l) / √(½ var G⁺_l + ½ var G⁻_l)

where G⁺ and G⁻ are the goodness of samples and of their negatives, of rules that have one. Hoyer's sparsity is that of
P. O. Hoyer, "Non-negative Matrix Factorization with Sparseness Constraints", JMLR 5, 2004, which N. Tosato et al.,
arXiv 2305.18353, 2023, find high in networks that learned by Forward-Forward.
"""

from __future__ import annotations

import copy
import math
from typing import NamedTuple

import torch
from torch import Tensor

from .graph import gradients
from .network import Network
from .rule import Batch, Rule, State, Tensors
from .softmax import cross_entropy


class Diagnosis(NamedTuple):
    """What was found of one block; None where the rule has no such thing."""

    block: int
    angle: float | None  # degrees, 0 … 180, of weights and biases together
    hoyer: float | None  # 0 … 1, mean over all samples that the rule's inference runs through the block
    separation: float | None  # in standard deviations


def diagnose(rule: Rule, net: Network, state: State, batch: Batch) -> list[Diagnosis]:
    """Return what is found of every block on one batch, in float64; nothing of `state` changes.

    The step is the replica's first, without memory of others: with momentum its length would be another, not its
    direction; Adam's direction is the gradient's signs. A weight that the rule keeps elsewhere or does not learn has no
    angle. The output block has no sparsity: its numbers are scores.
    """
    state, batch = _double(state), batch._replace(x=batch.x.double(), weight=batch.weight.double())
    truth, (sparsity, goodness) = _gradients(rule, net, state, batch), _activity(rule, net, state, batch)
    before = {key: p.clone() for key, p in state.params.items()}
    with torch.no_grad():
        rule.step(net, state, batch, rule.lr)
    descent = {key: before[key] - p for key, p in state.params.items()}
    return [
        Diagnosis(i, _angle(descent, truth, net.keys(i)), sparsity.get(i), goodness.get(i))
        for i in range(len(net.blocks))
    ]


def hoyer(a: Tensor) -> Tensor:
    """Return the sparsity (B,) of each sample's numbers a (B, ...); of no activity at all it is 0."""
    a = a.flatten(1)
    root = a.shape[1] ** 0.5
    ratio = a.abs().sum(1) / a.norm(dim=1).clamp_min(1e-30)
    return torch.where(ratio > 0, (root - ratio) / max(root - 1, 1e-30), 0.0)


def separation(true: Tensor, negative: Tensor) -> float | None:
    """Return how many standard deviations the mean of `true` (B,) is above that of `negative` (B,): None if 0."""
    spread = ((true.var(correction=0) + negative.var(correction=0)) / 2).sqrt()
    return float((true.mean() - negative.mean()) / spread) if spread else None


def _double(state: State) -> State:
    def copied(t: Tensor) -> Tensor:
        return t.to(torch.float64, copy=True) if t.is_floating_point() else t.clone()

    return State(*({key: copied(t) for key, t in part.items()} for part in state))


def _gradients(rule: Rule, net: Network, state: State, batch: Batch) -> Tensors:
    """Return the true gradient of the cross-entropy of the rule's scores, through all of its inference."""
    scores = lambda params: cross_entropy(rule.logits(net, state._replace(params=params), batch.x), batch)  # noqa: E731
    return gradients(scores, state.params)[0]


def _activity(rule: Rule, net: Network, state: State, batch: Batch) -> tuple[dict[int, float], dict[int, float]]:
    """Return, by hidden block, the mean sparsity of what the rule's inference makes, and how goodness separates."""
    seen: dict[int, list[Tensor]] = {}
    with torch.no_grad():
        activities = rule.activities(net, state, batch.x)
        for i, a in _watched(rule, net, state, batch.x) if activities is None else activities:
            seen.setdefault(i, []).append(hoyer(a))
        told = {i: separation(*pair) for i, pair in rule.goodness(net, state, batch)}
    return {i: float(torch.cat(of_calls).mean()) for i, of_calls in seen.items()}, told


def _watched(rule: Rule, net: Network, state: State, x: Tensor) -> list[tuple[int, Tensor]]:
    """Return (hidden block, its output) of every call of a block in the rule's inference."""
    seen, watched = [], copy.copy(net)

    def block(i: int, params: Tensors, x: Tensor) -> Tensor:
        a = net.block(i, params, x)
        if i in net.hidden:
            seen.append((i, a.clone()))
        return a

    watched.block = block
    rule.logits(watched, state, x)
    return seen


def _angle(descent: Tensors, truth: Tensors, keys: list[str]) -> float | None:
    """Return the angle between two directions over some parameters, in degrees; None if one of them has no length."""
    keys = [key for key in keys if key in descent]
    if not keys:
        return None
    a, b = (torch.cat([part[key].flatten() for key in keys]) for part in (descent, truth))
    lengths = float(a.norm() * b.norm())
    if not lengths or not math.isfinite(lengths):
        return None
    return math.degrees(math.acos(min(1.0, max(-1.0, float(a.dot(b)) / lengths))))
