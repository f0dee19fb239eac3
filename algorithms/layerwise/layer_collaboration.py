"""Layer collaboration: Forward-Forward whose layers know how much goodness the others have found.

G. Lorberbom, I. Gat, Y. Adi, A. Schwing, T. Hazan, "Layer Collaboration in the Forward-Forward Algorithm", AAAI 2024,
arXiv 2305.12393. With the goodness G_t = Σ_j a_tj² of the same sample in other layers t, as a constant:

    p_l = σ(G_l + γ_l − θ)        γ_l = Σ_{t≠l} G_t  or  Σ_{t<l} G_t        θ = Σ n_t of the layers in the sum
    L_l = BCE(p_l, s)             da_l = 2 (p_l − s) a_l / N

so a layer learns of a sample what the network as a whole still gets wrong; all that else is as in `forward_forward`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from ..network import Network
from ..rule import RuleError, State
from .forward_forward import ForwardForward
from .goodness import normalise_


@dataclass(frozen=True)
class LayerCollaboration(ForwardForward):
    """Forward-Forward on the network's goodness instead of each layer's own.

    Stores during a step: what Forward-Forward does, and one number a row. "all" runs every layer twice: once to collect
    the goodness of all, as it is before the update, once to learn.

    Open in what was read of the paper: the threshold (here that of all layers in the sum) and the scale of goodness
    (here Forward-Forward's sum, with its peer term and optimizer). It reports 2.1 to 2.2 % error on MNIST where its own
    Forward-Forward has 3.3. That one is weaker than Hinton's, and beside Hinton's, as here, no gain was found. A layer
    alone need not tell labels apart: the goodness of all layers, the first too, is added up to predict.

    Attributes:
        gamma: "all" other layers, or those "below", which takes one sweep.
    """

    name: ClassVar[str] = "layer-collaboration"
    paper: ClassVar[str] = "Lorberbom et al., AAAI 2024, arXiv 2305.12393"
    first_counted: ClassVar[int] = 0

    gamma: Literal["all", "below"] = "all"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gamma not in ("all", "below"):
            raise RuleError(f"unknown gamma '{self.gamma}': use all or below")

    def _before(self, net: Network, state: State, x: Tensor) -> Tensor:
        """Return the logit of the whole network (2B,), or of none of it, 0."""
        logit = x.new_zeros(len(x))
        for i in net.hidden if self.gamma == "all" else ():
            a = net.block(i, state.params, x)
            flat = a.flatten(1)
            logit = logit + flat.square().sum(1) - flat.shape[1]
            del flat
            x = normalise_(a)
            del a
        return logit

    def _logit(self, own: Tensor, before: Tensor) -> Tensor:
        """Return the logit of all layers, to which `own` belongs already, or of those so far."""
        return before if self.gamma == "all" else before + own
