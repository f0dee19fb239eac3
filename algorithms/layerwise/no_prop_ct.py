"""NoProp in continuous time: one network sees through noise of every measure, and the way that noise falls is learned.

Q. Li, Y. W. Teh, R. Pascanu, "NoProp: Training Neural Networks without Back-propagation or Forward-propagation",
arXiv 2503.24322, 2025. γ falls with the time t from 0 to 1, as a monotone g has it (after D. P. Kingma, T. Salimans,
B. Poole, J. Ho, "Variational Diffusion Models", arXiv 2107.00630, 2021); ω, κ, s and the ends are learned:

    g(t) = Σ_j ω_j σ(κ_j t + s_j)      γ(t) = e_0 − (e_0 + e_1) (g(t) − g(0))/(g(1) − g(0))      e_0, e_1 > 0
    ᾱ_t = σ(−γ(t))      SNR(t) = ᾱ_t/(1 − ᾱ_t) = exp(−γ(t))      SNR'(t) = −γ'(t) exp(−γ(t))

Each sample has a uniform time of its own, and z_t drawn from q(z_t|y) = N(√ᾱ_t u_y, 1 − ᾱ_t). With p the network's
class probabilities and u_c embeddings:

    û = Σ_c p_c(z_t, x, t) u_c
    L = CE(softmax(W z_1 + b), y) + KL(q(z_0|y) ‖ N(0, 1)) + η/2 SNR'(t) ‖û − u_y‖²

Inference goes from z_0 = 0 to z_1 in T equal steps of time, by the equation of `denoising`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import softplus

from ..graph import gradients
from ..network import Network
from ..noise import normals
from ..repeats import alike
from ..rule import Batch, RuleError, State, Stats, Tensors
from ..seeds import Purpose, generator
from ..softmax import onehot, stats_of
from .denoising import (
    Denoiser,
    Denoising,
    applied,
    chance,
    embedded,
    ends,
    label_layer,
    noised,
    onward,
    squared_error,
)

SIGMOIDS = 16
END = 3.0  # e_0 and e_1 at first: ᾱ from 0.05 to 0.95
NARROWEST = 1e-3  # g(1) − g(0), of sigmoids that have saturated


@dataclass(frozen=True)
class NoPropCT(Denoising):
    """One denoising network, told the time, and a learned noise schedule.

    The network's hidden blocks see the input, and its output block gives way to layers that see z and t too (see
    `Denoiser`).

    Stores during a step: what backpropagation stores in that network, whose graph is whole; there is none through time.
    Inference reads the input once and takes T passes through the layers that see z (of prototypes hidden blocks too),
    which is most of its work. Stats read the class from the first of them, which sees the input alone.

    Federated averaging of all parameters is right, embeddings and schedule too: clients start from the same.

    Departs from the paper: as `no-prop` does, and inference takes 20 steps, not 1,000. The ends of γ, with which the
    weights of times span exp(±γ), begin at ±3 instead of the wider ±5 of variational diffusion, and keep their signs.

    Attributes:
        steps: T, of inference.
        eta: η.
        embedding: of a class: "one-hot"; "learned", of `dim` numbers; or "prototype", learned and as large as an input.
        dim: numbers in a learned embedding.
        width: of the layers in which the network meets z.
    """

    name: ClassVar[str] = "no-prop-ct"
    family: ClassVar[str] = "layerwise"
    paper: ClassVar[str] = "Li, Teh & Pascanu, arXiv 2503.24322, 2025"
    travels: ClassVar[str] = "weights and noise schedule, and embeddings if learned"
    autograd: ClassVar[str] = "whole network"
    unsplittable: ClassVar[str] = ""

    steps: int = 20
    eta: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.eta <= 0:
            raise RuleError("no-prop-ct needs rule.eta above 0")

    def block(self, net: Network) -> Denoiser:
        """Return the structure of the network."""
        return Denoiser(net, self.size(net), self.width, net.classes, self.embedding == "prototype", clock=True)

    def init(self, net: Network, seed: int) -> State:
        """Return the network's parameters, those of γ, the layer "label" and, if learned, "embedding"."""
        params = self.block(net).init(seed) | schedule(seed)
        params |= self.embeddings(net, seed) | label_layer(net.classes, self.size(net))
        return State(params, {}, self.slots(params))

    def step(self, net: Network, state: State, batch: Batch, lr: float) -> Stats:
        """Draw a time and a z for each sample, and descend the loss."""
        block = self.block(net)
        grads, (losses, features) = gradients(partial(self._loss, block, batch), state.params)
        z = features.new_zeros(len(features), block.size)
        stats = stats_of(losses, block.output(state.params, features, z, z[:, 0]), batch)
        del features
        self.update(state, grads, lr)
        return stats

    def _loss(self, block: Denoiser, batch: Batch, own: Tensors) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Return the loss, with each sample's and the features of its input."""
        u = embedded(onehot(batch.y, block.net.classes, batch.x.dtype), own)
        time = chance(batch.draws, 0, batch.x.dtype)
        gamma, slope = falling(own, time)
        first, last = falling(own, torch.tensor([0.0, 1.0], dtype=u.dtype, device=u.device))[0].neg().sigmoid()
        features = block.features(own, batch.x)
        z = noised(u, gamma.neg().sigmoid()[:, None], normals(batch.draws, 1, block.size, u.dtype))
        errors = squared_error(block.output(own, features, z, time), u, own)
        losses = sum(ends(own, u, batch.y, first, last, normals(batch.draws, 2, block.size, u.dtype)))
        losses = losses - self.eta / 2 * slope * gamma.neg().exp() * errors
        return losses.dot(batch.share()), (losses.detach(), features.detach())

    def logits(self, net: Network, state: State, x: Tensor) -> Tensor:
        """Return what is read of z_1, (B, classes)."""
        block, params = self.block(net), state.params
        features, z = block.features(params, x), x.new_zeros(len(x), block.size)
        times = torch.linspace(0, 1, self.steps + 1, dtype=x.dtype, device=x.device)
        levels = falling(params, times)[0].neg().sigmoid()
        for k in alike(self.steps):
            scores = block.output(params, features, z, times[k].expand(len(x)))
            z = onward(z, embedded(scores.softmax(1), params), levels[k], levels[k + 1])
        return applied(params, "label", z)


def schedule(seed: int) -> Tensors:
    """Return the initial parameters of γ: sigmoids of like size, their centres strewn over all times."""
    rates, centres = generator(seed, Purpose.INIT, 6).uniform(0, 1, (2, SIGMOIDS))
    rates = 2 + 4 * rates
    return {
        "gamma.ends": torch.full((2,), math.log(math.expm1(END))),
        "gamma.sizes": torch.zeros(SIGMOIDS),
        "gamma.rates": torch.from_numpy(rates).to(torch.float32),
        "gamma.shifts": torch.from_numpy(-rates * centres).to(torch.float32),
    }


def falling(params: Tensors, times: Tensor) -> tuple[Tensor, Tensor]:
    """Return γ and γ' at times (n,), each (n,)."""
    sizes, rates = softplus(params["gamma.sizes"]), softplus(params["gamma.rates"])

    def rising(times: Tensor) -> tuple[Tensor, Tensor]:
        bends = (rates * times[:, None] + params["gamma.shifts"]).sigmoid()
        return bends @ sizes, (bends * (1 - bends)) @ (rates * sizes)

    low, high = rising(torch.tensor([0.0, 1.0], dtype=times.dtype, device=times.device))[0]
    first, last = softplus(params["gamma.ends"])
    (g, slope), fall = rising(times), (first + last) / (high - low).clamp_min(NARROWEST)
    return first - fall * (g - low), -fall * slope
