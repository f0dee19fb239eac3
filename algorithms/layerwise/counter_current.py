"""Counter-Current Learning: a second network runs from the labels down, and the two meet at every level.

C.-H. Kao, B. Hariharan, "Counter-Current Learning: A Biologically Plausible Dual Network Approach for Deep Learning",
NeurIPS 2024, arXiv 2409.19841, with the loss of dense networks in its code (IandRover/CCL-NeurIPS24). a_0 is the input
and b_L the identity, one row a class; every arrow is cut, so that a gradient stays within one layer:

    a_l = f(U_l a_{l−1} + c_l)      b_{l−1} = f(V_l b_l), b_0 = V_1 b_1      m_ic = 1 if sample i has class c, else 0
    L_l = λ/n_l · mean_ic (⟨a_l,i, b_l,c⟩ − m_ic)²      l = 0 … L−1      L_L = CE(softmax(a_L), y)
    R = 2λ/(n_l C) · s (a_l b_lᵀ − m)      da_l = R b_l      db_l = Rᵀ a_l      (s: a sample's share of the batch)

U_l learns from L_l, V_l from L_{l−1}. Each gradient tensor is scaled down to a norm of at most `clip`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..blocks import describe
from ..graph import pullback
from ..network import Network
from ..optimizer import Gradient, made
from ..rule import Batch, GradientRule, RuleError, State, Stats, Tensors
from ..seeds import Purpose, generator
from ..softmax import onehot, softmax_error_and_stats


@dataclass(frozen=True)
class CounterCurrent(GradientRule):
    """Two networks in opposite directions, each layer of both learning where they meet.

    Stores during a step: one block's input and output, that block's gradients, and of every level the feedback
    network's C rows with the graph of its one layer. Elsewhere no graph where the block is linear with an activation,
    else one inside the block alone.

    Departs from the paper: the forward network has the model's biases (the paper's has none); the feedback network has
    none either way. Its code clips the gradients of all layers of a network together, for which they would have to be
    there together; here each is clipped by itself, which on MNIST learns faster and ends no lower. A batch in parts is
    clipped when its parts are together, so they add up. Dense networks only: the paper's convolutions have another
    loss, of normalised rows.

    Attributes:
        clip: the largest norm of a gradient tensor, which holds the paper's lr of 1; 0 does not clip.
        scale: λ; ½ · 256 in the paper's code, and its hidden layers are 256 wide.

    The paper's networks are of ELUs: `--set model.activation=elu`.
    """

    name: ClassVar[str] = "counter-current"
    family: ClassVar[str] = "layerwise"
    paper: ClassVar[str] = "Kao & Hariharan, NeurIPS 2024, arXiv 2409.19841"
    travels: ClassVar[str] = "weights and feedback weights"
    autograd: ClassVar[str] = "inside a block"
    unsplittable: ClassVar[str] = ""

    lr: float = 1.0
    clip: float = 1.0
    scale: float = 128.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.clip < 0 or self.scale <= 0:
            raise RuleError("counter-current needs clip ≥ 0 and scale > 0")

    def check(self, net: Network) -> None:
        """Demand hidden blocks, and of each block that it is linear with an activation."""
        if not net.hidden:
            raise RuleError(
                "counter-current pairs hidden blocks, and this model has none: add a layer before the output"
            )
        for i, block in enumerate(net.blocks):
            if activation(net, i) is None:
                raise RuleError(
                    f"counter-current mirrors dense layers, and block {i} is {describe(block)}: use --model mlp,"
                    " or mono-forward for this model"
                )

    def init(self, net: Network, seed: int) -> State:
        """Return the network's weights and feedback "{l}.feedback" V (inputs, outputs of block l), all learned."""
        params, above = net.init(seed), net.classes
        for i in reversed(range(len(net.blocks))):
            below = torch.Size(net.sizes[i - 1] if i else net.shape).numel()
            draws = generator(seed, Purpose.INIT, i).uniform(-1, 1, (below, above))
            params[f"{i}.feedback"] = torch.from_numpy(draws / above**0.5).to(torch.float32)
            above = below
        return State(params, {}, self.slots(params))

    def update(self, state: State, grads: Mapping[str, Gradient], lr: float) -> None:
        """Clip and apply; parts of a batch are added up as they are and clipped in the end."""
        if self.clip and not state.gradients:
            grads = {key: clip_(made(grad), self.clip) for key, grad in grads.items()}
        super().update(state, grads, lr)

    def step(self, net: Network, state: State, batch: Batch, lr: float) -> Stats:
        """Run the feedback network down, then the forward network up, updating both level by level."""
        match = onehot(batch.y, net.classes, batch.x.dtype)
        levels = self._descend(net, state.params, match)
        x, pull = batch.x, None
        for i in range(len(net.blocks)):
            b, pull_feedback = levels.pop()
            a = x.flatten(1)
            residual = (a @ b.T).sub_(match).mul_(batch.share()[:, None]).mul_(2 * self.scale / (b.shape[1] * len(b)))
            if pull is not None:
                grads = pull((residual @ b).view_as(x))
                self.update(state, grads, lr)
                del grads, pull
            grads = pull_feedback(residual.T @ a)
            del pull_feedback, residual, a, b
            self.update(state, grads, lr)
            del grads
            x, pull = net.block_vjp(i, state.params, x)
        error, stats = softmax_error_and_stats(x, batch)
        self.update(state, pull(error), lr)
        return stats

    def _descend(
        self, net: Network, params: Tensors, match: Tensor
    ) -> list[tuple[Tensor, Callable[[Tensor], Tensors]]]:
        """Return the feedback b (C, features) of every level with its pull, the output's first."""
        b = torch.eye(net.classes, dtype=match.dtype, device=match.device)
        levels = []
        for i in reversed(range(len(net.blocks))):
            act, key = activation(net, i - 1) if i else nn.Identity(), f"{i}.feedback"
            b, pull = pullback(lambda own, b, act=act, key=key: act(b @ own[key].T), {key: params[key]}, b, False)
            levels.append((b, pull))
        return levels


def activation(net: Network, i: int) -> nn.Module | None:
    """Return what follows the linear layer of block `i`, be it the identity; None if that is not how it is made."""
    layers = [layer for layer in net.blocks[i] if not isinstance(layer, nn.Flatten)]
    linear, act = [*layers, nn.Identity(), nn.Identity()][:2]
    dense = type(linear) is nn.Linear and net.sizes[i] == (linear.out_features,) and len(layers) <= 2
    return act if dense and not any(True for _ in act.parameters()) else None


def clip_(gradient: Tensor, limit: float) -> Tensor:
    """Scale a gradient down, in place, to a norm of at most `limit`."""
    return gradient.mul_(limit / torch.linalg.vector_norm(gradient).clamp_min(limit))
