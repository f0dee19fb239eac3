"""BAFFLE: clients only evaluate perturbed copies of the model, and only the loss differences travel.

H. Feng, T. Pang, C. Du, W. Chen, S. Yan, M. Lin, "Does Federated Learning Really Need Backpropagation?",
arXiv 2301.12195, 2023. With shared directions z_1 … z_K and a small σ a client answers

    forward:  s_k = (L(w + σ z_k) − L(w)) / σ                  K + 1 forward passes
    central:  s_k = (L(w + σ z_k) − L(w − σ z_k)) / (2 σ)      2 K forward passes

and the gradient is estimated as ĝ = (1/K) Σ_k s_k z_k, unbiased up to O(σ) and O(σ²). The server averages the scalars
of its clients and steps w ← w − η ĝ, which any replica repeats from the scalars alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from ..network import Network
from ..rule import Batch, RuleError, State, Stats
from ..scalar_rule import ScalarRule
from .losses import loss_at, losses_along


@dataclass(frozen=True)
class Baffle(ScalarRule):
    """Finite differences of the loss along shared sign directions.

    Stores during a step: what inference stores, or what a slice of signs needs if that is more. Parameters are
    perturbed in place, slice by slice, and put back the same way before the next loss, which leaves them within two
    units in the last place of |w| + σ; a client that goes on from its own copy should take the server's next model or
    replay the scalars.

    Departs from the paper: directions are signs, not Gaussian (lower variance, and the same bits on every machine);
    clients share them, as the protocol says, unless `own`, as the released code has it; plain SGD where the code has
    Adam and gradients clipped element by element, which averaged scalars cannot repeat: scalars are clipped instead, on
    the server (`strategy.clip`), and momentum, decay and the average of weights are the ledger's (`rule.momentum`,
    `rule.weight_decay`, `strategy.ema`, with a `pool`); a client that takes several local steps applies its own scalars
    between them, as in DeComFL. The paper's networks are smooth (Hardswish): `--set model.activation=hardswish`.

    Attributes:
        lr: η; stable while η √(d/K) stays near or below 1 for d parameters.
        sigma: σ, the length of a perturbation per parameter; 1e-4 … 1e-3 suits float32.
        directions, own, pool, chunk, abreast: see `ScalarRule`.
        scheme: "forward" or "central" difference.
    """

    name: ClassVar[str] = "baffle"
    family: ClassVar[str] = "perturbation"
    paper: ClassVar[str] = "Feng et al., arXiv 2301.12195, 2023"
    unsplittable: ClassVar[str] = ""

    lr: float = 0.1
    sigma: float = 1e-3
    scheme: Literal["forward", "central"] = "forward"

    def __post_init__(self) -> None:
        if self.scheme not in ("forward", "central"):
            raise RuleError(f"unknown scheme '{self.scheme}': use forward or central")
        if self.sigma <= 0:
            raise RuleError("baffle needs sigma > 0")
        super().__post_init__()

    def probe(self, net: Network, state: State, batch: Batch, lr: float) -> tuple[Tensor, Stats]:
        """Return the K loss differences over σ; stats are of the network at w (central: w − σ z_K, the last seen)."""
        scalars, central = batch.weight.new_zeros(self.directions), self.scheme == "central"
        if not central:
            origin, stats = loss_at(net, state.params, batch)
        shifts = (self.sigma, -self.sigma) if central else (self.sigma,)
        for some, losses, last in losses_along(self, net, state.params, batch, shifts, home=True):
            if central:
                origin, stats = losses.pop(), last
            scalars[some] = losses.pop() - origin
            del losses, last
        return scalars.div_(2 * self.sigma if central else self.sigma), stats
