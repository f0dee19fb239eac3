"""Direct Feedback Alignment: the output error reaches every block through a fixed random matrix.

A. Nøkland, "Direct Feedback Alignment Provides Learning in Deep Neural Networks", NeurIPS 2016, arXiv 1609.01596.

    e = (softmax(z_L) − y*) / B       dW_L = eᵀ a_{L−1}                       (the true gradient, output block)
    da_l = e B_l                      dW_l = (da_l · f'(z_l))ᵀ a_{l−1}        (hidden block l)

B_l (C × n_l) is drawn from the run seed, the same on every client, and never sent: clients that aligned to different
matrices could not be averaged. Its size does not depend on the layer's beyond 1/√n_l, so that ‖da_l‖ ~ ‖e‖ everywhere:

    uniform    U(−1, 1) β/√n_l             Launay et al., "DFA Scales to Modern Deep Learning", arXiv 2006.12878, 2020
    normal     N(0, 1) β/√(C n_l)          Launay, Poli & Krzakala, "Principled Training ... with DFA", arXiv 1906.04554
    sign       ±1 β/√n_l                   ternary: −1, 0 or 1 with equal chances, times β/√n_l

A photonic co-processor (Launay et al., arXiv 2012.06373, 2020) takes an error of −1, 0 and 1 and answers with noise:

    q = sign(e) · 1[|e| > τ max|e|] · ‖e‖/‖·‖       da_l = q B_l + ν ‖q B_l‖/√n_l · N(0, 1)       for each sample
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from ..network import Network
from ..noise import normals, seeds
from ..rule import Batch, GradientRule, RuleError, State, Stats
from ..seeds import Place
from ..softmax import softmax_error_and_stats
from .fixed import KINDS, feedback_of, feedbacks


@dataclass(frozen=True)
class DFA(GradientRule):
    """Random projections of the output error replace the backward pass; all blocks can update at once.

    Stores during a step: the input and output of every block (they wait for the error) and, where a block is more than
    linear with an activation, the graph inside it. The feedback is injected after a block's activation and pooling.

    Attributes:
        scale: β, the size of the feedback; hidden blocks learn in proportion to it. With 1 wide networks learn slowly;
            β = √n_l is plain uniform ±1 feedback and wants a lower lr.
        feedback: how B is drawn: "uniform", "normal", "sign" or "ternary".
        ternarise: τ, the part of a sample's largest error below which it counts as 0; 0 takes the error as it is.
        noise: ν, noise of the projection beside its root mean square, drawn from the step's place.
        regenerate: the fixed matrices are made again in every step, one block's at a time, instead of kept: some
            twenty operations a number. Same kind and size, other numbers.

    Departs from the paper: the feedback is divided by √n_l, as in the later ones. Of the co-processor there are noise
    and a ternary error, whose length is kept so that lr means the same, but not the intensities that it measures.
    Tanh networks align better than ReLU: `--set model.activation=tanh`.
    """

    name: ClassVar[str] = "dfa"
    family: ClassVar[str] = "feedback"
    paper: ClassVar[str] = "Nøkland, NeurIPS 2016, arXiv 1609.01596"
    autograd: ClassVar[str] = "inside a block"
    unsplittable: ClassVar[str] = ""

    lr: float = 0.05
    momentum: float = 0.9
    scale: float = 1.0
    feedback: Literal["uniform", "normal", "sign", "ternary"] = "uniform"
    ternarise: float = 0.0
    noise: float = 0.0
    regenerate: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.feedback not in KINDS:
            raise RuleError(f"unknown feedback '{self.feedback}': use one of {', '.join(KINDS)}")
        if not 0 <= self.ternarise < 1 or self.noise < 0:
            raise RuleError("dfa needs 0 ≤ rule.ternarise < 1 and rule.noise ≥ 0")

    def draw(self, place: Place, batch_size: int, classes: int) -> Tensor | None:
        """Return a seed for the noise of each sample, (B,) int64, if there is any."""
        return seeds(place, batch_size) if self.noise else None

    def init(self, net: Network, seed: int) -> State:
        """Return the network's weights and fixed feedback "{l}.feedback" (C, features of block l), or its "seed"."""
        params = net.init(seed)
        return State(params, feedbacks(net, seed, self.scale, self.feedback, self.regenerate), self.slots(params))

    def stackable(self, net: Network) -> bool:
        """Return whether there is no graph anywhere."""
        return self.closed_form(net)

    def step(self, net: Network, state: State, batch: Batch, lr: float) -> Stats:
        """Run forward once, then give every block its projection of the error."""
        x, pulls = batch.x, []
        for i in net.hidden:
            x, pull = net.block_vjp(i, state.params, x)
            pulls.append((x.shape, pull))
        x, pull = net.block_vjp(net.output, state.params, x)
        error, stats = softmax_error_and_stats(x, batch)
        self.update(state, pull(error), lr)
        del x, pull
        error = _ternary(error, self.ternarise) if self.ternarise else error
        for i in reversed(net.hidden):
            shape, pull = pulls.pop()
            self.update(state, pull(self._project(error, net, state, batch, i).view(shape)), lr)
            del pull
        return stats

    def _project(self, error: Tensor, net: Network, state: State, batch: Batch, i: int) -> Tensor:
        """Return the error (..., B, C) as block i sees it, (..., B, n)."""
        projected = error @ feedback_of(state.fixed, net, i, self.scale, error.dtype, self.feedback)
        if self.noise:
            noise = normals(batch.draws, i, projected.shape[-1], projected.dtype)
            noise *= self.noise * projected.square().mean(-1, keepdim=True).sqrt_()
            projected += noise
        return projected


def _ternary(error: Tensor, threshold: float) -> Tensor:
    """Return each sample's error (..., C) as −1, 0 and 1, of the length it had."""
    size = error.abs()
    ternary = error.sign().mul_(size > threshold * size.amax(-1, keepdim=True))
    length = ternary.norm(dim=-1, keepdim=True).clamp_min_(1)  # 0 only where the error is 0
    return ternary.mul_(error.norm(dim=-1, keepdim=True) / length)
