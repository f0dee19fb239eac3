"""Equilibrium propagation: weights learn from how an equilibrium answers to a nudge of the loss.

A. Laborieux, F. Zenke, "Improving equilibrium propagation without weight symmetry through Jacobian homeostasis",
ICLR 2024, arXiv 2309.02214. The hidden layers drive each other both ways (`dynamics`). They settle at s*, in T1 sweeps;
from there, with nudges β_k = β exp(2πi k/N) of the loss, k < N, each time at s(β_k), in T2:

    δ_l = −γ^{l−H} (1/N) Σ_k Re(s_l(β_k) / β_k)                N = 1: one-sided, (s* − s(β)) / β in place of the mean

The mean is ∂s_l/∂β at 0, but for O(β^N), for N = 1 O(β); of an N above 2 the nudges are complex. With a sample's share
of the batch in δ, all learn by ∂F/∂W at s*:

    dW_l = δ_lᵀ s*_{l−1}      db_l = Σ δ_l      dB_l = γ s*_lᵀ δ_{l−1}      the read-out: its own gradient

in dense layers; `convolved` says what is in place of that, and of W_l. If B_l = W_l this is the gradient of the loss at
the equilibrium: in units of γ^{−l/2} for s_l the Jacobian J of F is symmetric. If not, δ is biased, and homeostasis
descends, in those units, on

    λ/n E_ε[‖J ε‖² − εᵀ J J ε]  =  λ/n (‖J‖² − tr J²)  =  λγ/n Σ_l ‖W_l − B_l‖²          ε ~ N(0, 1), n hidden units
"""

from __future__ import annotations

import cmath
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from ..feedback.fixed import features, uniform
from ..network import Gradients, Network
from ..optimizer import add, total
from ..rule import Batch, GradientRule, RuleError, State, Stats
from ..seeds import Purpose, generator
from ..softmax import softmax_error_and_stats
from . import convolved
from .dynamics import Layer, back, layers_of, rest, settle
from .predictive_coding import of_rows

SMALLEST = 1e-4  # β


@dataclass(frozen=True)
class EquilibriumPropagation(GradientRule):
    """The difference between two or more equilibria stands for the backward pass.

    Stores during a step: of every hidden unit s*, δ and its activity in the phase that runs, which is one number (for N
    = 1 it becomes δ), with N > 2 two, and two more where max-pooling makes it, which are its winner; longer T1 and T2
    and more phases take no more. Beside them what the input does to the first layer, and what one layer needs: with
    homeostasis two matrices like its weights. No graph, but of average pooling and of a read-out that is not dense. T1
    and T2 cost time, T1 in inference too, which settles: a sweep is a pass forward and one back through all hidden
    blocks but the first, and with a nudge through the output block. A complex phase has twice as many products, and is
    for two.

    Departs from the paper: the layers are the user's, with their ReLU or tanh (its sigmoid, 1/(1 + exp(2 − 4u)), is a
    tanh shifted and scaled), and the output block reads them without a softmax layer of its own before it. The feedback
    has a gain γ. With the paper's, 1, tanh layers of the usual initial weights are near where equilibria split, ReLU
    layers near where they run away, and gradients are large there; with less (X. Xie, H. S. Seung, "Equivalence of
    Backpropagation and Contrastive Hebbian Learning in a Layered Network", Neural Computation 15, 2003) they settle in
    few sweeps. Layers are swept in turn, not all at once. Max-pooling, for which the paper has a softmax, keeps the
    winners of the forward pass. ε averages out exactly: homeostasis is the form on the right, which draws none, and
    says that a synapse and the one back tend to each other; in convolutions as often as it is used. The nudge is
    towards the label for β > 0, in one-sided estimates too.

    Use tanh: `--set model.activation=tanh`. ReLU layers have no bound to what they settle to. Two of them swing at a
    constant learning rate, and more than two hardly learn. Convolutions want an lr near 0.05.

    Attributes:
        phases: N. Two, β and −β, have an error of O(β²); more than two need tanh.
        relaxation: T1, sweeps without a nudge.
        nudged: T2, sweeps with one.
        beta: β.
        gain: γ.
        feedback: "own" learns a B_l, drawn apart from W_l and sent with it; "tied" is W_l, which then learns both ways.
        homeostasis: λ; 0 leaves the bias, and tied feedback has none.
    """

    name: ClassVar[str] = "equilibrium-propagation"
    family: ClassVar[str] = "equilibrium"
    paper: ClassVar[str] = "Laborieux & Zenke, ICLR 2024, arXiv 2309.02214"
    travels: ClassVar[str] = "weights and learned feedback"
    autograd: ClassVar[str] = "inside a block"
    unsplittable: ClassVar[str] = ""

    lr: float = 0.01
    momentum: float = 0.9
    phases: int = 2
    relaxation: int = 8
    nudged: int = 4
    beta: float = 0.1
    gain: float = 0.25
    feedback: Literal["own", "tied"] = "own"
    homeostasis: float = 10.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.feedback not in ("own", "tied"):
            raise RuleError(f"unknown feedback '{self.feedback}': use own or tied")
        if min(self.phases, self.relaxation, self.nudged) < 1:
            raise RuleError("equilibrium-propagation needs rule.phases, relaxation and nudged ≥ 1")
        if self.beta < SMALLEST or self.gain <= 0 or self.homeostasis < 0:
            raise RuleError(
                f"equilibrium-propagation needs rule.beta ≥ {SMALLEST:g} (of less, differences are rounding), gain > 0"
                " and homeostasis ≥ 0"
            )

    def check(self, net: Network) -> None:
        """Demand hidden layers that settle, and what is holomorphic for complex phases."""
        if not net.hidden or (net.is_dense and net.dense(net.output).activation is not nn.Identity):
            raise RuleError(
                "equilibrium-propagation settles hidden layers, with ReLU or tanh, below a linear output: use mlp"
            )
        if not net.is_dense:
            convolved.check(net, self.name, counts=self.feedback == "own" and self.homeostasis > 0)
        if self.phases > 2 and any(type(layer) is nn.ReLU for block in net.blocks for layer in block):
            raise RuleError("phases beyond 2 are complex, and ReLU is not: use model.activation=tanh or rule.phases=2")

    def init(self, net: Network, seed: int) -> State:
        """Return the network's weights and, of each layer l ≥ 1 with own feedback, "{l}.back" (B), as large as W."""
        params = net.init(seed)
        layers = layers_of(net, params)
        for i in net.hidden[1:] if self.feedback == "own" else ():
            shape = params[layers[i].weight].shape
            rms = (3 * shape[1:].numel()) ** -0.5
            params[f"{i}.back"] = uniform(generator(seed, Purpose.INIT, i), shape, rms)
        return State(params, {}, self.slots(params))

    def stackable(self, net: Network) -> bool:
        """Return whether there is no graph anywhere."""
        return self.closed_form(net)

    def step(self, net: Network, state: State, batch: Batch, lr: float) -> Stats:
        """Settle, nudge, and update one block after the other; stats are those of the equilibrium without a nudge."""
        layers = layers_of(net, state.params)
        s, drive = rest(layers, batch.x, self.relaxation, self.gain)
        deltas = self._answers(layers, drive, s, batch)
        del drive
        logits, pull = net.block_vjp(net.output, state.params, s[-1])
        error, stats = softmax_error_and_stats(logits, batch)
        self.update(state, pull(error), lr)
        del logits, error, pull
        for i in net.hidden:
            deltas[i].mul_(of_rows(batch.share(), deltas[i]))
            grads = layers[i].gradients(s[i - 1] if i else batch.x, deltas[i])
            if i:
                self._lead_back(net, layers[i], i, s, deltas[i - 1], grads, batch)
            self.update(state, grads, lr)
            del grads
        return stats

    def _answers(self, layers: list[Layer], drive: Tensor, s: list[Tensor], batch: Batch) -> list[Tensor]:
        """Return δ (B, ...) of each hidden layer, without a sample's share."""
        # Every sample settles by itself: it counts 1, not its share of the batch.
        top = batch._replace(weight=torch.ones_like(batch.weight), total=batch.weight.new_ones(()))
        deltas: list[Tensor] = []
        for k in range(self.phases // 2 + 1):  # the others' activities are conjugates of these
            own = 2 * k in (0, self.phases)
            beta = self.beta * cmath.exp(2j * cmath.pi * k / self.phases)
            beta = beta.real if own else beta
            moved = list(s) if own else [torch.complex(a, torch.zeros_like(a)) for a in s]
            settle(layers, drive, moved, self.nudged, self.gain, beta, top)
            for i in range(len(s)):
                scale = -(1 if own else 2) * self.gain ** (i + 1 - len(s)) / (self.phases * beta)
                a, moved[i] = moved[i], None
                if k == 0:
                    deltas.append(a.mul_(scale))
                elif own:
                    deltas[i].add_(a, alpha=scale)
                else:
                    deltas[i].add_(a.real, alpha=scale.real).sub_(a.imag, alpha=scale.imag)
                if self.phases == 1:
                    deltas[i].sub_(s[i], alpha=scale)
                del a
        return deltas

    def _lead_back(
        self, net: Network, layer: Layer, i: int, s: list[Tensor], delta: Tensor, grads: Gradients, batch: Batch
    ) -> None:
        """Add to the gradients of layer i ≥ 1 that of its way back, with δ of the layer below, and homeostasis."""
        w, key, params = layer.weight, back(layer, i), layer.params
        returned = layer.returned(delta, self.gain * s[i])
        if key == w:
            grads[w] = total(grads[w], returned)
        elif self.homeostasis:
            pull = 2 * self.homeostasis * self.gain / sum(features(net, j) for j in net.hidden)
            apart = (params[w] - params[key]).mul_(pull * layer.uses(s[i - 1], batch.share()))
            towards = apart.neg()
            add(apart, grads[w])
            add(towards, returned)
            grads |= {w: apart, key: towards}
        else:
            grads[key] = returned

    def activities(self, net: Network, state: State, x: Tensor) -> Iterable[tuple[int, Tensor]]:
        """Return the hidden layers' activities at the equilibrium."""
        return enumerate(rest(layers_of(net, state.params), x, self.relaxation, self.gain)[0])

    def logits(self, net: Network, state: State, x: Tensor) -> Tensor:
        """Return the output block's scores (B, classes) at the equilibrium."""
        s, _ = rest(layers_of(net, state.params), x, self.relaxation, self.gain)
        return net.block(net.output, state.params, s[-1])
