"""Counter-Current Learning: a second network runs from the labels down, and the two meet at every level.

C.-H. Kao, B. Hariharan, "Counter-Current Learning: A Biologically Plausible Dual Network Approach for Deep Learning",
NeurIPS 2024, arXiv 2409.19841, with the losses of its code (IandRover/CCL-NeurIPS24). a_0 is the input and b_L the
identity, one row a class; every arrow is cut, so that a gradient stays within one layer. Of dense layers:

    a_l = f(U_l a_{l−1} + c_l)      b_{l−1} = f(V_l b_l), b_0 = V_1 b_1      m_ic = 1 if sample i has class c, else 0
    L_l = λ/n_l · mean_ic (⟨a_l,i, b_l,c⟩ − m_ic)²      l = 0 … L−1      L_L = CE(softmax(a_L), y)
    R = 2λ/(n_l C) · s (a_l b_lᵀ − m)      da_l = R b_l      db_l = Rᵀ a_l      (s: a sample's share of the batch)

U_l learns from L_l, V_l from L_{l−1}. Each gradient tensor is scaled down to a norm of at most `clip`. What mirrors a
convolution is in `mirrored`. Where there is one, maps meet as flat rows by their cosines, in L_l of `cosines`, which
also turns samples away from one another, and classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from ..graph import pullback
from ..network import Network
from ..optimizer import Gradient, made
from ..rule import Batch, GradientRule, RuleError, State, Stats, Tensors
from ..seeds import Purpose, generator
from ..softmax import onehot, softmax_error_and_stats
from .cosines import Rows
from .mirrored import Mirror, mirrors


@dataclass(frozen=True)
class CounterCurrent(GradientRule):
    """Two networks in opposite directions, each layer of both learning where they meet.

    Stores during a step: one block's input and output, that block's gradients, and of every level the feedback
    network's C rows with the graph of its one layer, which of a map keeps what it was repeated to. Elsewhere no graph
    where the block is linear with an activation, else one inside the block alone. Of cosines, also a number for each
    pair of samples a few times; a pair counts as the product of its samples' shares.

    Departs from the paper: the forward network has the model's biases (the paper's has none); the feedback network has
    none either way. Its code clips the gradients of all layers of a network together, for which they would have to be
    there together; here each is clipped by itself, which on MNIST learns faster and ends no lower. A batch in parts is
    clipped when its parts are together, so of products they add up. λ is the same for cosines, 1 in the paper's code,
    which is slower in short runs. The paper's last map has one cell; of a larger one that is averaged, the mirror says
    the same of all cells. Its networks have no norms; a mirror has none, whatever its block has.

    Attributes:
        clip: the largest norm of a gradient tensor, which holds the paper's lr of 1; 0 does not clip.
        scale: λ; ½ · 256 in the paper's code, and its hidden layers are 256 wide.
        loss: of a level: "product", which on convolutions learns far less and is refused there, or "cosine".
        centralise: subtract from a unit's gradient its mean over the unit's inputs, as the paper does of convolutions.

    The paper's networks are of ELUs: `--set model.activation=elu`. Of ReLUs, rows of zeros have no direction to learn.
    Its convolutions take rule.loss=cosine, rule.momentum=0.8, rule.clip=0.3 and rule.centralise=true.
    """

    name: ClassVar[str] = "counter-current"
    family: ClassVar[str] = "layerwise"
    paper: ClassVar[str] = "Kao & Hariharan, NeurIPS 2024, arXiv 2409.19841"
    travels: ClassVar[str] = "weights and feedback weights"
    autograd: ClassVar[str] = "inside a block"

    lr: float = 1.0
    clip: float = 1.0
    scale: float = 128.0
    loss: Literal["product", "cosine"] = "product"
    centralise: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.clip < 0 or self.scale <= 0:
            raise RuleError("counter-current needs clip ≥ 0 and scale > 0")
        if self.loss not in ("product", "cosine"):
            raise RuleError(f"unknown loss '{self.loss}': use product or cosine")

    @property
    def unsplittable(self) -> str:
        """Why parts of a batch do not add up, if they do not."""
        if self.loss == "cosine":
            return "cosines of pairs of samples count, and the parts of a batch do not hold all pairs"
        return ""

    def check(self, net: Network) -> None:
        """Demand hidden blocks, of each block that it has a mirror, and cosines of convolutions."""
        if not net.hidden:
            raise RuleError(
                "counter-current pairs hidden blocks, and this model has none: add a layer before the output"
            )
        convolves = any(len(mirror.weight) > 2 for mirror in mirrors(net))
        if convolves and self.loss == "product":
            raise RuleError(
                "counter-current trains convolutions by cosines: use --set rule.loss=cosine, or --model mlp"
            )

    def init(self, net: Network, seed: int) -> State:
        """Return the network's weights and feedback "{l}.feedback" V (inputs, outputs of block l), all learned."""
        params = net.init(seed)
        for i, mirror in reversed(list(enumerate(mirrors(net)))):
            draws = generator(seed, Purpose.INIT, i).uniform(-1, 1, mirror.weight)
            params[f"{i}.feedback"] = torch.from_numpy(draws / math.prod(mirror.weight[1:]) ** 0.5).to(torch.float32)
        return State(params, {}, self.slots(params))

    def update(self, state: State, grads: Mapping[str, Gradient], lr: float) -> None:
        """Centralise, clip and apply; parts of a batch are added up as they are, and that is done in the end."""
        if not state.gradients and (self.clip or self.centralise):
            grads = {key: made(grad) for key, grad in grads.items()}
            for grad in grads.values():
                if self.centralise and grad.dim() > 1:
                    grad.sub_(grad.mean(tuple(range(1, grad.dim())), keepdim=True))
                if self.clip:
                    clip_(grad, self.clip)
        super().update(state, grads, lr)

    def step(self, net: Network, state: State, batch: Batch, lr: float) -> Stats:
        """Run the feedback network down, then the forward network up, updating both level by level."""
        match = onehot(batch.y, net.classes, batch.x.dtype)
        levels = self._descend(net, state.params, match)
        x, pull = batch.x, None
        for i in range(len(net.blocks)):
            b, pull_feedback = levels.pop()
            error, error_feedback = self._meet(x.flatten(1), b, match, batch.share())
            del b
            if pull is not None:
                grads = pull(error().view_as(x))
                self.update(state, grads, lr)
                del grads, pull
            grads = pull_feedback(error_feedback())
            del pull_feedback, error, error_feedback
            self.update(state, grads, lr)
            del grads
            x, pull = net.block_vjp(i, state.params, x)
        error, stats = softmax_error_and_stats(x, batch)
        self.update(state, pull(error), lr)
        return stats

    def _meet(
        self, a: Tensor, b: Tensor, match: Tensor, share: Tensor
    ) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
        """Return what makes the gradients of a level's loss in its activities a (B, n), and b (C, n)."""
        if self.loss == "product":
            error = (a @ b.T).sub_(match).mul_(share[:, None]).mul_(2 * self.scale / (b.shape[1] * len(b)))
            return lambda: error @ b, lambda: error.T @ a
        up, down = Rows.of(a, share), Rows.of(b, torch.full_like(b[:, 0], 1 / len(b)))
        cosines = up.cosines(down)
        error = (cosines - match).mul_(share[:, None]).mul_(2 * self.scale / len(b))
        return lambda: up.gradient(down, cosines, error), lambda: down.gradient(up, cosines.T, error.T)

    def _descend(
        self, net: Network, params: Tensors, match: Tensor
    ) -> list[tuple[Tensor, Callable[[Tensor], Tensors]]]:
        """Return the feedback b (C, features) of every level with its pull, the output's first."""
        b = torch.eye(net.classes, dtype=match.dtype, device=match.device)
        every, levels = mirrors(net), []
        for i in reversed(range(len(every))):
            mirror, act, key = every[i], every[i - 1].activation if i else nn.Identity(), f"{i}.feedback"

            def down(own: Tensors, b: Tensor, mirror: Mirror = mirror, act: nn.Module = act, key: str = key) -> Tensor:
                return act(mirror.run(own[key], b))

            b, pull = pullback(down, {key: params[key]}, b, False)
            levels.append((b, pull))
        return levels


def clip_(gradient: Tensor, limit: float) -> Tensor:
    """Scale a gradient down, in place, to a norm of at most `limit`."""
    return gradient.mul_(limit / torch.linalg.vector_norm(gradient).clamp_min(limit))
