"""Local forward gradient: activities are perturbed, and every block has a loss of its own close above it.

M. Ren, S. Kornblith, R. Liao, G. Hinton, "Scaling Forward Gradient With Local Losses", ICLR 2023, arXiv 2210.03310.
A hidden block l owns a linear head M_l (C × n_l). With signs u_r of each sample's own, r = 1 … q,

    a = f(W_l x + b_l)      L_l = CE(softmax(M_l a), y)      δ = (softmax(M_l a) − y*) / B
    s_r = ⟨δ, M_l u_r⟩      ĝ = (1/q) Σ_r s_r u_r            (the slope of L_l along u_r, and the guess at dL_l/da)
    dW_l = (ĝ · f'(z))ᵀ x   dM_l = δᵀ a

ĝ is unbiased and E‖ĝ − dL_l/da‖² = (m − 1)/q ‖dL_l/da‖² for each sample, where m counts the units perturbed, which is
smaller than the error of perturbed weights by the units' number of inputs; the errors of a batch's samples are
independent and average out. A unit of a ReLU block that is off is not perturbed: nothing would learn from it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..layerwise.mono_forward import pool, spread
from ..network import Network
from ..noise import seeds, signs
from ..optimizer import Product
from ..rule import Batch, GradientRule, RuleError, State, Stats
from ..seeds import Place, Purpose, generator
from ..softmax import softmax_error, softmax_error_and_stats


@dataclass(frozen=True)
class LocalForwardGradient(GradientRule):
    """Forward gradients of block-local losses in the block's own activity.

    Stores during a step: no graph where a block is linear with an activation; elsewhere one inside the block alone. In
    bytes, of B samples, of a dense block, with n' = 64 ⌈n_l/64⌉,

        B (4 (n_{l−1} + 2 n_l + C) + max(q n'/8 + 4 n_l + n', q n'/4))

    the most of any block: its input (the first is the batch), output, guess and δ, and a perturbation beside the packed
    bits of all, or these in the making.

    Sends weights, not scalars: dW_l = Σ_n ĝ_n x_nᵀ holds the samples' own activities, which a server does not have and
    must not.

    Departs from the paper: its networks are mixers with a loss at every patch and group of channels; here a block has
    one loss, and a convolution's map is averaged over its positions before the head, so that a channel's units are
    perturbed together: the loss sees no more of them. Heads and output block learn from δ, which is known in closed
    form right where they stand. With linear heads so is dL_l/da = δ M_l: `mono-forward` is this rule without the noise.

    Attributes:
        directions: q, perturbations of each sample; each costs a product with the head, no pass.
    """

    name: ClassVar[str] = "local-forward-gradient"
    family: ClassVar[str] = "perturbation"
    paper: ClassVar[str] = "Ren et al., ICLR 2023, arXiv 2210.03310"
    travels: ClassVar[str] = "weights and heads"
    autograd: ClassVar[str] = "inside a block"
    unsplittable: ClassVar[str] = ""

    lr: float = 0.05
    momentum: float = 0.9
    directions: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.directions < 1:
            raise RuleError("local-forward-gradient needs directions ≥ 1")

    def check(self, net: Network) -> None:
        """Demand a hidden block."""
        if not net.hidden:
            raise RuleError(
                "local-forward-gradient perturbs hidden blocks, and this model has none: add a layer before the output"
            )

    def draw(self, place: Place, batch_size: int, classes: int) -> Tensor:
        """Return a seed for the perturbations of each sample, (B,) int64."""
        return seeds(place, batch_size)

    def init(self, net: Network, seed: int) -> State:
        """Return the network's weights and a head "{l}.head" (C, channels or width) for each hidden block."""
        params = net.init(seed)
        for i in net.hidden:
            width = net.sizes[i][0]
            draws = generator(seed, Purpose.INIT, i).uniform(-1, 1, (net.classes, width))
            params[f"{i}.head"] = torch.from_numpy(draws / width**0.5).to(torch.float32)
        return State(params, {}, self.slots(params))

    def step(self, net: Network, state: State, batch: Batch, lr: float) -> Stats:
        """Run, perturb and update one block after the other; stats are those of the network's output."""
        x = batch.x
        for i in net.hidden:
            a, pull = net.block_vjp(i, state.params, x)
            head = state.params[f"{i}.head"]
            pooled = pool(a, head)
            delta = softmax_error(pooled @ head.mT, batch)
            guess = self._guess(batch.draws, i, pooled, delta, head, relu=_ends_in_relu(net, i))
            grads = pull(spread(guess, a))
            del pull, guess
            self.update(state, grads | {f"{i}.head": Product(delta, pooled)}, lr)
            del grads, pooled
            x = a
        x, pull = net.block_vjp(net.output, state.params, x)
        error, stats = softmax_error_and_stats(x, batch)
        self.update(state, pull(error), lr)
        return stats

    def _guess(self, seeds: Tensor, i: int, a: Tensor, delta: Tensor, head: Tensor, *, relu: bool) -> Tensor:
        """Return the estimate (B, n) of the gradient of block i's loss in its activity a (B, n)."""
        guess = torch.zeros_like(a)
        for u in signs(seeds, i, self.directions, a.shape[1], a.dtype):
            if relu:
                u.masked_fill_(a <= 0, 0)
            slope = (delta * (u @ head.mT)).sum(1, keepdim=True)
            guess += u.mul_(slope / self.directions)
            del u, slope
        return guess


def _ends_in_relu(net: Network, i: int) -> bool:
    """Return whether an activity of 0 means that a unit of block i is off."""
    return isinstance(list(net.blocks[i])[-1], nn.ReLU)
