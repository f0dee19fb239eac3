"""ZO-Adam: Adam on the estimate that a few scalars make.

T. Feng et al., "ZeroFlow: Overcoming Catastrophic Forgetting is Easier than You Think", arXiv 2501.01045, ICML 2025,
with SPSA's estimate in Adam (Kingma & Ba, ICLR 2015):

    ĝ = Σ_ik c_ik z_ik        m ← β₁ m + (1 − β₁) ĝ        v ← β₂ v + (1 − β₂) ĝ²
    w ← w − η m̂ / (√v̂ + ε)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from .. import optimizer
from ..directions import Directions, groups_of, layout_of
from ..rule import State, Tensors
from .spsa import SPSA


@dataclass(frozen=True)
class ZOAdam(SPSA):
    """SPSA with Adam's two moments instead of a plain step.

    Adam is not linear in the estimate: it needs the sum over all directions before it steps. The sum is never made
    whole, but in slices of max(256, `chunk` / NK) parameters, along the NK directions of the N answers at once.

    Stores during a step: two more models for the moments, and what SPSA stores; or, if that is more, in a slice of q
    parameters 4 q NK bytes of signs and 24 q. A client has its own answer (N = 1), the server all of them.

    Departs from SPSA in the promise of equal bits: Adam multiplies, adds and takes roots, which compilers may fuse. A
    replay gives the same bits on the same machine and software, elsewhere the same to rounding. The moments are a
    replica's own and never sent.

    Attributes:
        lr: η, about the change of each parameter in a step.
        sigma, dropout, directions, own, chunk, abreast: see `SPSA`; with more directions than `chunk` / 256 a slice
            needs more.
    """

    name: ClassVar[str] = "zo-adam"
    paper: ClassVar[str] = "Feng et al., arXiv 2501.01045, 2025; Kingma & Ba, ICLR 2015"
    linear: ClassVar[bool] = False

    lr: float = 0.01
    directions: int = 8

    def slots(self, params: Tensors) -> Tensors:
        """Return zeroed moments."""
        return optimizer.slots("adam", 0.0, params)

    def descend(self, state: State, draws: Sequence[Directions], coefficients: Tensor, lr: float) -> None:
        """Take Adam's step along ĝ, in place on parameters and slots, slice by slice."""
        scalars = coefficients.flatten()
        chunk = self.chunk // len(scalars)
        streams = [own.slices(state.params, k, chunk) for own in draws for k in range(self.directions)]
        for group in draws[0].visited(groups_of(layout_of(state.params), chunk)):
            for key, start, size in group:
                estimate = 0.0
                for stream, c in zip(streams, scalars, strict=True):
                    estimate = next(stream)[1] * c + estimate
                self._update(state, key, slice(start, start + size), estimate, lr)
                del estimate
        for key in state.params:
            state.slots[f"{key}.steps"].add_(1)

    def _update(self, state: State, key: str, where: slice, estimate: Tensor, lr: float) -> None:
        """Take Adam's step of some values of one tensor, but for its count of steps."""
        names = (f"{key}.mean", f"{key}.square")
        memory = {name: state.slots[name].view(-1)[where] for name in names}
        memory[f"{key}.steps"] = state.slots[f"{key}.steps"].clone()
        part = State({key: state.params[key].view(-1)[where]}, {}, memory)
        optimizer.update("adam", 0.0, 0.0, part, key, estimate, lr)
