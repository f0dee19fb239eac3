"""Target projection: a block is drawn towards a random target that stands for the label.

M. Lomnitz, Z. Daniels, D. Zhang, M. Piacentino, "Learning with Local Gradients at the Edge", arXiv 2208.08503, 2022
(tpSGD). A hidden block l has a fixed random matrix P_l (C × n_l) and its own loss:

    t_l = y* P_l        J_l = ½ ‖t_l − a_l‖² or |t_l − a_l|₁, of the batch mean
    dW_l = −((t_l − a_l) · f'(z_l))ᵀ a_{l−1} / B        with sign(t_l − a_l) for the second

and is updated before the next block runs. Where `drtp` pushes on along y* B_l for ever, this signal ends at the target.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..network import Network
from ..rule import Batch, GradientRule, RuleError, State, Stats
from ..softmax import softmax_error_and_stats
from .correlation import portions
from .fixed import feedback, kept_seed, remade


@dataclass(frozen=True)
class TargetProjection(GradientRule):
    """Each hidden block approaches a random point per class, and nothing passes between blocks but activity.

    Stores during a step: one block's input and output, its signal, and that block's gradients. No graph where the
    block is linear with an activation; elsewhere a graph inside the block alone.

    Two things that the paper leaves open: the output block's target is y* itself and its loss the cross-entropy, its
    true gradient; a convolution's map has a target per channel, the same at all positions, and its signal is averaged
    over them.

    Attributes:
        loss: "l2" or "l1", how a block's activity is held against its target.
        scale: targets are uniform in ±scale; a unit is drawn only to what its activation reaches.
        regenerate: the targets are made again in every step, one block's at a time, instead of kept: some
            twenty operations a number. Same kind and size, other numbers.
    """

    name: ClassVar[str] = "target-projection"
    family: ClassVar[str] = "feedback"
    paper: ClassVar[str] = "Lomnitz et al., arXiv 2208.08503, 2022"
    autograd: ClassVar[str] = "inside a block"
    unsplittable: ClassVar[str] = ""

    lr: float = 0.01
    momentum: float = 0.9
    loss: Literal["l2", "l1"] = "l2"
    scale: float = 1.0
    regenerate: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loss not in ("l2", "l1"):
            raise RuleError(f"unknown loss '{self.loss}': use l2 or l1")

    def init(self, net: Network, seed: int) -> State:
        """Return the network's weights and fixed targets "{l}.target" (C, channels or width), or their "seed"."""
        params = net.init(seed)
        if self.regenerate:
            return State(params, kept_seed(seed, self.scale), self.slots(params))
        widths = {i: net.sizes[i][0] for i in net.hidden}
        targets = {
            f"{i}.target": feedback(seed, i, net.classes, width, self.scale * width**0.5) for i, width in widths.items()
        }
        return State(params, targets, self.slots(params))

    def stackable(self, net: Network) -> bool:
        """Return whether there is no graph anywhere."""
        return self.closed_form(net)

    def step(self, net: Network, state: State, batch: Batch, lr: float) -> Stats:
        """Run one block after the other, and draw it towards its targets."""
        x, share = batch.x, batch.share()
        for i in net.hidden:
            x, pull = net.block_vjp(i, state.params, x)
            grads = pull(self._signal(x, self._targets(net, state, i, x.dtype)[batch.y], share))
            del pull
            self.update(state, grads, lr)
            del grads
        x, pull = net.block_vjp(net.output, state.params, x)
        error, stats = softmax_error_and_stats(x, batch)
        self.update(state, pull(error), lr)
        return stats

    def _targets(self, net: Network, state: State, i: int, dtype: torch.dtype) -> Tensor:
        """Return the targets of block i, (C, channels or width), kept or made again."""
        if not self.regenerate:
            return state.fixed[f"{i}.target"]
        return remade(state.fixed["seed"], i, torch.Size((net.classes, net.sizes[i][0])), self.scale, dtype)

    def _signal(self, a: Tensor, target: Tensor, share: Tensor) -> Tensor:
        """Return the gradient of the batch's J in a (..., B, n) or (B, channels, ...)."""
        signal = a - target.view(*target.shape, *[1] * (a.dim() - target.dim()))
        if self.loss == "l1":
            signal.sign_()
        return signal.mul_(portions(share, a))
