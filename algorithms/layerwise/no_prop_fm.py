"""NoProp by flow matching: one network learns in which direction, from noise, the embedding of the class lies.

Q. Li, Y. W. Teh, R. Pascanu, "NoProp: Training Neural Networks without Back-propagation or Forward-propagation",
arXiv 2503.24322, 2025. Each sample has a uniform time t of its own and a z_0 from N(0, 1); z_1 = u_y, its embedding:

    z_t = t z_1 + (1 − t) z_0 + σ ε      L = ‖v(z_t, x, t) − (z_1 − z_0)‖²/d
    learned embeddings: + CE(softmax(W (z_t + (1 − t) v) + b), y)

The second term reads the class where the flow would end: it keeps embeddings apart, which the first would have all one.
Inference follows v from z_0 = 0 in T equal steps, and takes the class whose embedding is nearest.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from torch import Tensor
from torch.nn.functional import cross_entropy

from ..graph import gradients
from ..network import Network
from ..noise import normals
from ..repeats import alike
from ..rule import Batch, RuleError, State, Stats, Tensors
from ..softmax import onehot, stats_of
from .denoising import Denoiser, Denoising, applied, chance, embedded, label_layer


@dataclass(frozen=True)
class NoPropFM(Denoising):
    """One network that learns the flow from noise to embeddings.

    The network's hidden blocks see the input, and its output block gives way to layers that see z and t too (see
    `Denoiser`); they end in v, as large as an embedding.

    Stores during a step: what backpropagation stores in that network, whose graph is whole; there is none through time.
    Inference reads the input once and takes T passes through the layers that see z (of prototypes hidden blocks too),
    which is most of its work. Stats read the class where the flow from z_0 = 0 would end at once.

    Federated averaging of all parameters is right, embeddings too: clients start from the same.

    Departs from the paper: inference starts from z_0 = 0, the mean, so that it is a function of the model and x (one
    draw for all samples reads worse), and takes 20 steps, not 1,000. No batch normalisation; weight decay is 0 (see
    `no-prop`). Prototypes begin as noise, at right angles: the paper's are images of the training set, which no server
    has. The squared error is a mean over the d numbers: as a sum, it draws learned embeddings together faster than the
    second term parts them.

    Attributes:
        steps: T, of inference.
        embedding: of a class: "one-hot"; "learned", of `dim` numbers; or "prototype", learned and as large as an input.
        dim: numbers in a learned embedding.
        width: of the layers in which the network meets z.
        sigma: σ.
    """

    name: ClassVar[str] = "no-prop-fm"
    family: ClassVar[str] = "layerwise"
    paper: ClassVar[str] = "Li, Teh & Pascanu, arXiv 2503.24322, 2025"
    travels: ClassVar[str] = "weights, and embeddings if learned"
    autograd: ClassVar[str] = "whole network"
    unsplittable: ClassVar[str] = ""

    steps: int = 20
    sigma: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sigma < 0:
            raise RuleError("no-prop-fm needs rule.sigma ≥ 0")

    def block(self, net: Network) -> Denoiser:
        """Return the structure of the network."""
        return Denoiser(net, self.size(net), self.width, self.size(net), self.embedding == "prototype", clock=True)

    def init(self, net: Network, seed: int) -> State:
        """Return the network's parameters and, if learned, "embedding" and the layer "label"."""
        params = self.block(net).init(seed)
        if self.embedding != "one-hot":
            params |= self.embeddings(net, seed) | label_layer(net.classes, self.size(net))
        return State(params, {}, self.slots(params))

    def step(self, net: Network, state: State, batch: Batch, lr: float) -> Stats:
        """Draw a time and a z for each sample, and descend the loss."""
        block = self.block(net)
        grads, (losses, features) = gradients(partial(self._loss, block, batch), state.params)
        z = features.new_zeros(len(features), block.size)
        stats = stats_of(losses, nearness(block.output(state.params, features, z, z[:, 0]), state.params), batch)
        del features
        self.update(state, grads, lr)
        return stats

    def _loss(self, block: Denoiser, batch: Batch, own: Tensors) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Return the loss, with each sample's and the features of its input."""
        u = embedded(onehot(batch.y, block.net.classes, batch.x.dtype), own)
        time = chance(batch.draws, 0, batch.x.dtype)
        start, noise = (normals(batch.draws, stream, block.size, u.dtype) for stream in (1, 2))
        t, features = time[:, None], block.features(own, batch.x)
        z = t * u + (1 - t) * start + self.sigma * noise
        v = block.output(own, features, z, time)
        losses = (v - (u - start)).square().mean(1)
        if "embedding" in own:
            losses = losses + cross_entropy(applied(own, "label", z + (1 - t) * v), batch.y, reduction="none")
        return losses.dot(batch.share()), (losses.detach(), features.detach())

    def logits(self, net: Network, state: State, x: Tensor) -> Tensor:
        """Return how near the end of the flow is to each class, (B, classes)."""
        block, params = self.block(net), state.params
        features, z = block.features(params, x), x.new_zeros(len(x), block.size)
        for k in alike(self.steps):
            z = z + block.output(params, features, z, x.new_full((len(x),), k / self.steps)) / self.steps
        return nearness(z, params)


def nearness(z: Tensor, params: Tensors) -> Tensor:
    """Return −½ ‖z − u_c‖² (B, C) of z (B, d) and each class, but for what is the same for all classes."""
    if "embedding" not in params:
        return z
    u = params["embedding"]
    return z @ u.T - 0.5 * u.square().sum(1)
