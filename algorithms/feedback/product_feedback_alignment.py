"""Product Feedback Alignment: two matrices in a row carry the error, and their product aligns with the forward weights.

Li Ji-An, M. K. Benna, "Deep Learning without Weight Symmetry", arXiv 2405.20594, 2024. With g = dL/dz_l, fixed random
B_l (n_l × r n_l) and learned R_l (r n_l × n_{l−1}), for l = L … 1:

    m = g B_l      dW_l = gᵀ a_{l−1}      dR_l = mᵀ a_{l−1}      da_{l−1} = m R_l

So dR_l = B_lᵀ dW_l. Where W_l and R_l are decayed by one rate λ_t and learn at one rate η_t, whatever the momentum,

    R_l − B_lᵀ W_l  ←  (1 − η_t λ_t) (R_l − B_lᵀ W_l)      so      B_l R_l → B_l B_lᵀ W_l

and B_l B_lᵀ = 1, or nearly: no synapse of B_l or R_l is like one of W_l, and the way back is backpropagation's. A
strong decay λ_t makes R_l and W_l forget how they began; then it is all but taken away, for it hinders learning.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from ..network import Gradients, Network
from ..rule import Batch, GradientRule, RuleError, State, Stats
from ..seeds import Place, Purpose, generator
from .fixed import uniform, xavier
from .transport import Crossing, learn
from .ways import check, ways


@dataclass(frozen=True)
class ProductFeedbackAlignment(GradientRule):
    """The error goes back through a fixed matrix, then through a learned one.

    Stores during a step: the input and output of every block, as `backprop-fused` does (a block that is more than
    linear with an activation: the graph inside it), and one block's m, r times its dz, while the error crosses it; of a
    convolution also the gradient in R_l. Beside it, all the time, R_l of r times the weights of every block but the
    first, its momentum, and B_l of r n_l² numbers.

    R_l is a parameter: it is sent and averaged with W_l, and the law above holds for the averages, which are linear in
    both. A server whose own steps are not linear (fedadam) breaks it. B_l is drawn from the run seed, the same on every
    client, and never sent.

    Departs from the paper: its first epoch of strong decay, after which the decay is multiplied by a small factor, is
    `strong_decay` in the first `strong_rounds` rounds, and `weight_decay` always. The strong decay shrinks the
    parameters directly, by η λ / (1 − μ) a step, which is what the paper's comes to through momentum μ; so the law is
    exact from the first step. The first block has no R and B, for nothing learns below it. B is orthogonal by default
    (the paper's variant "-o"), so that r = 1 does where the paper takes 10.

    Attributes:
        strong_decay: λ in the first rounds, of all parameters.
        strong_rounds: rounds of it, from the first. An epoch of the paper is 938 steps of 64 samples with lr 0.01 and
            momentum 0.9, which leaves e^(−2.8) of the gap; n local steps leave e^(−η λ n / (1 − μ)).
        ratio: r.
        orthogonal: B Bᵀ = 1. Otherwise entries of B are independent, uniform with variance 1 / (r n), so that B Bᵀ = 1
            in the mean, and B Bᵀ W has a cosine of √(r / (r + 1)) with W.
        weight_decay: L2 penalty, added to the gradient, in all rounds.
    """

    name: ClassVar[str] = "product-feedback-alignment"
    family: ClassVar[str] = "feedback"
    paper: ClassVar[str] = "Li & Benna, arXiv 2405.20594, 2024"
    travels: ClassVar[str] = "weights and learned feedback"
    autograd: ClassVar[str] = "inside a block"
    unsplittable: ClassVar[str] = "its strong decay would shrink the parameters once a part"

    lr: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 1e-4
    strong_decay: float = 0.03
    strong_rounds: int = 1
    ratio: int = 1
    orthogonal: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.optimizer != "sgd":
            raise RuleError("product-feedback-alignment needs steps that are linear in the gradient: use optimizer=sgd")
        if self.ratio < 1 or self.strong_decay < 0 or self.strong_rounds < 0:
            raise RuleError("product-feedback-alignment needs ratio ≥ 1, strong_decay ≥ 0 and strong_rounds ≥ 0")
        if self.lr * self.strong_decay >= 1 - self.momentum:
            raise RuleError("a step's strong decay, lr · strong_decay / (1 − momentum), must leave something: lower it")

    def check(self, net: Network) -> None:
        """Demand blocks of one weighted layer each, which joins all channels with all."""
        check(net, self.name)
        if any(getattr(way.layer, "groups", 1) > 1 for way in ways(net)[1:]):
            raise RuleError("product-feedback-alignment mixes channels on the way back: use convolutions of one group")

    def draw(self, place: Place, batch_size: int, classes: int) -> Tensor:
        """Return the round, on which the strong decay depends, the same for all samples, (B,) int64."""
        return torch.tensor([place.round]).expand(batch_size)

    def init(self, net: Network, seed: int) -> State:
        """Return the network's weights, of each block l ≥ 1 "{l}.return" (R), and fixed "{l}.feedback" (B)."""
        params, fixed = net.init(seed), {}
        for i, way in enumerate(ways(net)):
            if i > 0:
                units, *inputs = params[way.weight].shape
                shape = torch.Size((self.ratio * units, *inputs))
                params[f"{i}.return"] = uniform(generator(seed, Purpose.INIT, i), shape, xavier(shape))
                fixed[f"{i}.feedback"] = self._fixed(generator(seed, Purpose.FIXED, i), units)
        return State(params, fixed, self.slots(params))

    def _fixed(self, rng: np.random.Generator, units: int) -> Tensor:
        shape = torch.Size((units, self.ratio * units))
        if not self.orthogonal:
            return uniform(rng, shape, shape[1] ** -0.5)
        q, r = np.linalg.qr(rng.standard_normal(shape).T)  # columns of q are orthonormal
        return torch.from_numpy((q * np.sign(np.diag(r))).T.copy()).to(torch.float32)

    def stackable(self, net: Network) -> bool:
        """Return whether there is no graph anywhere."""
        return self.closed_form(net)

    def step(self, net: Network, state: State, batch: Batch, lr: float) -> Stats:
        """Run forward, then take the error back through both matrices."""
        rate = lr * self.strong_decay / (1 - self.momentum)
        left = 1 - rate * (batch.draws[..., 0] <= self.strong_rounds).to(batch.x.dtype)

        def send(i: int, crossing: Crossing, grads: Gradients) -> Tensor:
            m = mixed(crossing, state.fixed[f"{i}.feedback"])
            learned = state.params[f"{i}.return"]
            grads[f"{i}.return"] = crossing.gradient(learned, m)
            return crossing.through(learned, m)

        def update(grads: Gradients) -> None:
            for key in grads:
                p = state.params[key]
                p.mul_(left.view(left.shape + (1,) * (p.dim() - left.dim())))
            self.update(state, grads, lr)

        return learn(net, state, batch, send, update)


def mixed(crossing: Crossing, feedback: Tensor) -> Tensor:
    """Return m = g B, (B, r n, ...); of a map that is a convolution of 1×1."""
    if isinstance(crossing.layer, nn.Linear):
        return crossing.error @ feedback
    axes = crossing.error.dim() - 2
    kernel = feedback.mT.reshape(*feedback.mT.shape, *[1] * axes)
    return torch.convolution(crossing.error, kernel, None, [1] * axes, [0] * axes, [1] * axes, False, [0] * axes, 1)
