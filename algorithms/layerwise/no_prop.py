"""NoProp, in discrete time: T blocks each learn, by themselves, to see a class through its own measure of noise.

Q. Li, Y. W. Teh, R. Pascanu, "NoProp: Training Neural Networks without Back-propagation or Forward-propagation",
arXiv 2503.24322, 2025. Block t sees the input x and z_{t−1}, a sample of q(z_{t−1}|y) = N(√ᾱ_{t−1} u_y, 1 − ᾱ_{t−1})
that is drawn from the label, not made by the blocks before it. With p its class probabilities and u_c embeddings:

    û_t = Σ_c p_c(z_{t−1}, x) u_c      ᾱ_t = cos²(π/2 · (T + ½ − t)/(T + 1))      SNR(t) = ᾱ_t/(1 − ᾱ_t)
    L = CE(softmax(W z_T + b), y) + KL(q(z_0|y) ‖ N(0, 1)) + η/2 Σ_t (SNR(t) − SNR(t−1)) ‖û_t − u_y‖²

The last term is the expectation of T η/2 (…) over one t, the paper's, as the sum that it is: a step visits all blocks.
Inference goes from z_0 = 0 to z_T, block after block, by the equation of `denoising`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from torch import Tensor

from ..graph import gradients
from ..network import Network
from ..noise import normals
from ..repeats import alike
from ..rule import Batch, RuleError, State, Stats, Tensors
from ..seeds import Purpose, integer_seed
from ..softmax import onehot, stats_of
from .denoising import Denoiser, Denoising, applied, embedded, ends, label_layer, noised, onward, squared_error


@dataclass(frozen=True)
class NoProp(Denoising):
    """Blocks that never meet in training: each denoises what is drawn from the label.

    The network is the template of a block: its hidden blocks see the input, and its output block gives way to layers
    that see z too (see `Denoiser`). There are T copies, each with parameters of its own, and they are trained one after
    the other on the same minibatch.

    Stores during a step: what one copy stores in backpropagation through itself, whatever T, and its gradients; beside
    them some embeddings (B, d). T costs time, T times the parameters and T times the bytes sent: every copy reads the
    input anew, which is T times the work of backpropagation in the network. Stats are those of inference before the
    update, for which the copies' layers that see z run once more.

    Federated averaging of all parameters is right, embeddings too: clients start from the same.

    Departs from the paper: inference follows the mean path (z_0 = 0, no new noise), so that it is a function of the
    model and x; noise of each sample's own reads worse, and one draw for all samples worse still. Levels are the
    middles of T + 1 intervals of the cosine, so that no ᾱ is 0 or 1. There is no batch normalisation; the layer that
    reads z_T begins at 0. Weight decay, which Adam here has as L2 and not decoupled, is 0: of blocks with little to
    gain it would be most of the gradient. Prototypes begin as noise, at right angles: the paper's are images of the
    training set, which no server has. What blocks share learns once a minibatch, from the sum over t.

    Attributes:
        steps: T, the blocks.
        eta: η.
        embedding: of a class: "one-hot"; "learned", of `dim` numbers; or "prototype", learned and as large as an input,
            so that blocks see z through hidden blocks like those of x.
        dim: numbers in a learned embedding.
        width: of the layers in which a block meets z.
    """

    name: ClassVar[str] = "no-prop"
    family: ClassVar[str] = "layerwise"
    paper: ClassVar[str] = "Li, Teh & Pascanu, arXiv 2503.24322, 2025"
    travels: ClassVar[str] = "weights of T blocks, and embeddings if learned"
    autograd: ClassVar[str] = "inside a block"
    unsplittable: ClassVar[str] = ""

    eta: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.eta <= 0:
            raise RuleError("no-prop needs rule.eta above 0")

    def block(self, net: Network) -> Denoiser:
        """Return the structure of a block."""
        return Denoiser(net, self.size(net), self.width, net.classes, self.embedding == "prototype")

    def init(self, net: Network, seed: int) -> State:
        """Return the blocks' parameters "{t}.{key}", t from 1, the layer "label" and, if learned, "embedding"."""
        block, params = self.block(net), self.embeddings(net, seed) | label_layer(net.classes, self.size(net))
        for t in range(1, self.steps + 1):
            params |= {f"{t}.{key}": p for key, p in block.init(integer_seed(seed, Purpose.INIT, t)).items()}
        return State(params, {}, self.slots(params))

    def step(self, net: Network, state: State, batch: Batch, lr: float) -> Stats:
        """Train the blocks one by one, following inference beside them, then what they share."""
        block, match = self.block(net), onehot(batch.y, net.classes, batch.x.dtype)
        common = {key: p for key, p in state.params.items() if key.startswith(("label.", "embedding"))}
        sums, losses = gradients(partial(self._ends, batch, match), common)
        z = batch.x.new_zeros(len(batch.x), block.size)
        for i in alike(self.steps):
            t = i + 1
            own = self._own(state.params, t)
            grads, (more, features) = gradients(partial(self._denoise, block, batch, match, t), own)
            losses = losses + more
            z = self._onward(block, own, features, z, t)
            del features
            if "embedding" in grads:
                sums["embedding"] += grads.pop("embedding")
            self.update(state, {f"{t}.{key}": gradient for key, gradient in grads.items()}, lr)
            del grads
        stats = stats_of(losses, applied(common, "label", z), batch)
        self.update(state, sums, lr)
        return stats

    def _ends(self, batch: Batch, match: Tensor, own: Tensors) -> tuple[Tensor, Tensor]:
        """Return the part of the loss that no block has a part in, and each sample's."""
        u, levels = embedded(match, own), cosine(self.steps)
        losses = sum(ends(own, u, batch.y, levels[0], levels[-1], normals(batch.draws, 0, u.shape[1], u.dtype)))
        return losses.dot(batch.share()), losses.detach()

    def _denoise(
        self, block: Denoiser, batch: Batch, match: Tensor, t: int, own: Tensors
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Return the loss of block t, with each sample's and the features of its input."""
        before, after = cosine(self.steps)[t - 1 : t + 1]
        u, features = embedded(match, own), block.features(own, batch.x)
        z = noised(u, before, normals(batch.draws, t, block.size, u.dtype))
        gain = after / (1 - after) - before / (1 - before)
        losses = self.eta / 2 * gain * squared_error(block.output(own, features, z), u, own)
        return losses.dot(batch.share()), (losses.detach(), features.detach())

    def _own(self, params: Tensors, t: int) -> Tensors:
        """Return what block t computes with: its parameters by its own keys, and any learned embedding."""
        own = {key.removeprefix(f"{t}."): p for key, p in params.items() if key.startswith(f"{t}.")}
        return own | {key: p for key, p in params.items() if key == "embedding"}

    def _onward(self, block: Denoiser, own: Tensors, features: Tensor, z: Tensor, t: int) -> Tensor:
        """Return z_t (B, d) of z_{t−1}, as block t guesses."""
        guess = embedded(block.output(own, features, z).softmax(1), own)
        return onward(z, guess, *cosine(self.steps)[t - 1 : t + 1])

    def logits(self, net: Network, state: State, x: Tensor) -> Tensor:
        """Return what is read of z_T, (B, classes)."""
        block = self.block(net)
        z = x.new_zeros(len(x), block.size)
        for i in alike(self.steps):
            t = i + 1
            own = self._own(state.params, t)
            z = self._onward(block, own, block.features(own, x), z, t)
        return applied(state.params, "label", z)


def cosine(steps: int) -> list[float]:
    """Return ᾱ_0 … ᾱ_T."""
    return [math.cos(math.pi / 2 * (steps + 0.5 - t) / (steps + 1)) ** 2 for t in range(steps + 1)]
