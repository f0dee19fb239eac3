"""Sign symmetry: the way back knows the signs of the forward weights, and not their sizes.

Q. Liao, J. Z. Leibo, T. Poggio, "How Important Is Weight Symmetry in Backpropagation?", AAAI 2016, arXiv 1510.05067;
the names of the schemes are theirs, sizes are those of BioTorch (Sanfiz & Akrout, arXiv 2108.13446, 2021). As in
`feedback-alignment`, with another B_l, for l = L … 1:

    dW_l = δ_lᵀ a_{l−1}      da_{l−1} = δ_l B_l      δ_{l−1} = da_{l−1} · f'(z_{l−1})      B_l = M_l ∘ sign(W_l)

    usf     uniform              M_l = σ_l
    frsf    fixed random         M_l = |U_l|, drawn once
    brsf    batch-wise random    M_l = |U_l|, drawn anew for every batch
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..network import Network
from ..noise import seeds, uniforms
from ..rule import Batch, GradientRule, RuleError, State, Stats
from ..seeds import Place, Purpose, generator
from .fixed import kept_seed, remade, uniform, xavier
from .transport import learn
from .ways import check, ways


@dataclass(frozen=True)
class SignSymmetry(GradientRule):
    """The error goes back through the signs of the weights.

    Stores during a step: the input and output of every block, as `backprop-fused` does (a block that is more than
    linear with an activation: the graph inside it), and one block's B_l, 4 bytes a weight, while the error crosses it;
    with brsf 12 bytes a weight while M_l is made. The first block needs no B_l. With frsf also, all the time, M_l
    of every block but the first.

    M_l of frsf is drawn from the run seed, the same on every client, and never sent; of brsf from the place of the
    step, so that it is the client's own; the signs are those of the client's own weights, before the update.

    Departs from the paper: σ_l = √(2 / (fan in + fan out)), Glorot's, which follows from the block's shape: with the
    paper's ±1 the error grows by the root of the width in every block, which it mends by normalising batches and
    gradients. U_l is uniform with the same root mean square, so that the schemes take the same learning rate.

    Attributes:
        scheme: "usf", "frsf" or "brsf".
        regenerate: M_l of frsf is made again in every step, one block's at a time, instead of kept: some twenty
            operations a number. Same kind and size, other numbers.
    """

    name: ClassVar[str] = "sign-symmetry"
    family: ClassVar[str] = "feedback"
    paper: ClassVar[str] = "Liao, Leibo & Poggio, AAAI 2016, arXiv 1510.05067"
    autograd: ClassVar[str] = "inside a block"
    unsplittable: ClassVar[str] = ""

    lr: float = 0.05
    momentum: float = 0.9
    scheme: Literal["usf", "frsf", "brsf"] = "usf"
    regenerate: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scheme not in ("usf", "frsf", "brsf"):
            raise RuleError(f"unknown scheme '{self.scheme}': use usf, frsf or brsf")
        if self.regenerate and self.scheme != "frsf":
            raise RuleError(
                "only frsf has fixed matrices to regenerate: leave rule.regenerate out, or use rule.scheme=frsf"
            )

    def check(self, net: Network) -> None:
        """Demand blocks of one weighted layer each."""
        check(net, self.name)

    def draw(self, place: Place, batch_size: int, classes: int) -> Tensor | None:
        """Return a seed for the step's M_l, the same in every row (B,) int64, so that each part of a batch has it."""
        return seeds(place, 1).expand(batch_size) if self.scheme == "brsf" else None

    def init(self, net: Network, seed: int) -> State:
        """Return the network's weights and, with frsf, fixed "{l}.magnitude", shaped like those of block l ≥ 1."""
        params, fixed = net.init(seed), kept_seed(seed) if self.regenerate else {}
        for i, way in enumerate(ways(net)):
            if i > 0 and self.scheme == "frsf" and not self.regenerate:
                shape = params[way.weight].shape
                drawn = uniform(generator(seed, Purpose.FIXED, i), shape, xavier(shape))
                fixed[f"{i}.magnitude"] = drawn.abs_()
        return State(params, fixed, self.slots(params))

    def stackable(self, net: Network) -> bool:
        """Return whether there is no graph anywhere."""
        return self.closed_form(net)

    def step(self, net: Network, state: State, batch: Batch, lr: float) -> Stats:
        """Run forward, then take the error back through the signs."""
        return learn(
            net,
            state,
            batch,
            send=lambda i, crossing, grads: crossing.through(self._feedback(net, i, state, batch)),
            update=lambda grads: self.update(state, grads, lr),
        )

    def _feedback(self, net: Network, i: int, state: State, batch: Batch) -> Tensor:
        """Return B of block i, shaped like its weights."""
        weight = state.params[ways(net)[i].weight]
        signs = weight.sign()
        # Of replicas side by side the weights have an axis more than the layer's.
        shape = ways(net)[i].layer.weight.shape
        if self.regenerate:
            return signs.mul_(remade(state.fixed["seed"], i, shape, 3**0.5 * xavier(shape), signs.dtype).abs_())
        if self.scheme == "frsf":
            return signs.mul_(state.fixed[f"{i}.magnitude"])
        if self.scheme == "usf":
            return signs.mul_(xavier(shape))
        return signs.mul_(magnitudes(batch.draws[..., 0], i, shape, signs.dtype))


def magnitudes(seed: Tensor, i: int, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Return M of block i, uniform in (0, √3 σ), from one seed (), or from one a replica."""
    return uniforms(seed, i, shape.numel(), dtype).mul_(3**0.5 * xavier(shape)).unflatten(-1, shape)
