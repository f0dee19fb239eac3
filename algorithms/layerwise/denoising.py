"""What the NoProp rules share: class embeddings, how noise leaves them, and a block that sees through it.

Q. Li, Y. W. Teh, R. Pascanu, arXiv 2503.24322, 2025. Of a sample of class y, z is noise at first and in the end nearly
the embedding u of it: q(z_t|y) = N(√ᾱ_t u, 1 − ᾱ_t), ᾱ rising. A guess û of u leads from a level s to the next, t:

    z_t = a û + b z_s + √c ε        α = ᾱ_s/ᾱ_t
    a = √ᾱ_t (1 − α)/(1 − ᾱ_s)      b = √α (1 − ᾱ_t)/(1 − ᾱ_s)      c = (1 − ᾱ_t)(1 − α)/(1 − ᾱ_s)

which keeps q if û = u. Inference here takes the mean path: z_0 = 0 and ε = 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ..batched import linear
from ..network import Network
from ..noise import seeds, uniforms
from ..rule import GradientRule, RuleError, Tensors
from ..seeds import Place, Purpose, generator, integer_seed

EMBEDDINGS = ("one-hot", "learned", "prototype")
LENGTH = 2.0  # of learned embeddings at first
WAVES = 16  # numbers that tell a block the time


@dataclass(frozen=True)
class Denoising(GradientRule):
    """The options of all NoProp rules, and what follows from them alone.

    Attributes:
        steps: T, from noise to the embedding.
        embedding: of a class: "one-hot"; "learned", of `dim` numbers; or "prototype", learned and as large as an input.
        dim: numbers in a learned embedding.
        width: of the layers in which a block meets the noisy embedding.
    """

    lr: float = 1e-3
    optimizer: Literal["sgd", "adam"] = "adam"
    steps: int = 10
    embedding: Literal["one-hot", "learned", "prototype"] = "one-hot"
    dim: int = 20
    width: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.embedding not in EMBEDDINGS:
            raise RuleError(f"unknown embedding '{self.embedding}': use one of {', '.join(EMBEDDINGS)}")
        if self.steps < 1 or self.dim < 1 or self.width < 1:
            raise RuleError(f"{self.name} needs rule.steps, dim and width ≥ 1")

    def draw(self, place: Place, batch_size: int, classes: int) -> Tensor:
        """Return a seed for the noise of each sample, (B,) int64."""
        return seeds(place, batch_size)

    def size(self, net: Network) -> int:
        """Return d, the numbers in an embedding."""
        return {"one-hot": net.classes, "learned": self.dim, "prototype": math.prod(net.shape)}[self.embedding]

    def embeddings(self, net: Network, seed: int) -> Tensors:
        """Return "embedding" (C, d) if it is learned: at first rows of one length, at right angles where d ≥ C."""
        if self.embedding == "one-hot":
            return {}
        rows = generator(seed, Purpose.INIT, 0).standard_normal((net.classes, self.size(net)))
        if net.classes <= self.size(net):
            rows = np.linalg.qr(rows.T)[0].T
        rows *= LENGTH / np.linalg.norm(rows, axis=1, keepdims=True)
        return {"embedding": torch.from_numpy(rows).to(torch.float32).contiguous()}


class Denoiser(NamedTuple):
    """A block that sees an input x and a noisy embedding z.

    A network's hidden blocks, and what reshapes their output for its output block, make features of x. z goes through a
    dense layer, or if it is like x through hidden blocks of its own. One layer reads both, and an output reads that.
    """

    net: Network
    size: int  # of z
    width: int
    outputs: int
    like_x: bool  # z is as large as x, and is treated alike
    clock: bool = False  # the layer that reads both is also told the time

    def init(self, seed: int) -> Tensors:
        """Return initial parameters: hidden blocks' by their keys, and those of "z", "join" and "out"."""
        hidden = [key for i in self.net.hidden for key in self.net.keys(i)]
        weights = self.net.init(integer_seed(seed, Purpose.INIT, 1))
        params = {key: weights[key] for key in hidden}
        blank = torch.empty(1, *self.net.shape, device="meta")
        features = seen = self.features({key: p.to("meta") for key, p in params.items()}, blank).shape[1]
        if self.like_x:
            weights = self.net.init(integer_seed(seed, Purpose.INIT, 2))
            params |= {f"z.{key}": weights[key] for key in hidden}
        else:
            params |= _layer("z", self.size, self.width, seed, 3)
            seen = self.width
        params |= _layer("join", features + seen + WAVES * self.clock, self.width, seed, 4)
        return params | _layer("out", self.width, self.outputs, seed, 5)

    def features(self, params: Tensors, x: Tensor) -> Tensor:
        """Return features (B, n) of inputs x (B, *shape)."""
        for i in self.net.hidden:
            x = self.net.block(i, params, x)
        for layer in self.net.blocks[self.net.output]:
            if any(True for _ in layer.parameters()):
                break
            x = layer(x)
        return x.flatten(1)

    def output(self, params: Tensors, features: Tensor, z: Tensor, time: Tensor | None = None) -> Tensor:
        """Return the output (B, outputs) for features (B, n), z (B, d) and times (B,)."""
        if self.like_x:
            own = {key.removeprefix("z."): p for key, p in params.items() if key.startswith("z.")}
            seen = [features, self.features(own, z.reshape(-1, *self.net.shape))]
        else:
            seen = [features, torch.relu_(applied(params, "z", z))]
        if self.clock:
            waves = torch.arange(1, WAVES + 1, dtype=z.dtype, device=z.device) * math.pi
            seen.append((time[:, None] * waves).cos_())
        return applied(params, "out", torch.relu_(applied(params, "join", torch.cat(seen, 1))))


def _layer(name: str, inputs: int, outputs: int, seed: int, place: int) -> Tensors:
    """Return a linear layer's initial weights and bias, U(−1, 1)/√inputs."""
    drawn = generator(seed, Purpose.INIT, place).uniform(-1, 1, (outputs, inputs + 1)) / inputs**0.5
    weight, bias = torch.from_numpy(drawn).to(torch.float32).split([inputs, 1], 1)
    return {f"{name}.weight": weight.contiguous(), f"{name}.bias": bias.flatten().contiguous()}  # each its own memory


def applied(params: Tensors, name: str, x: Tensor) -> Tensor:
    """Return what a linear layer makes of x (B, inputs)."""
    return linear(x, params[f"{name}.weight"], params[f"{name}.bias"])


def label_layer(classes: int, size: int) -> Tensors:
    """Return the layer "label" that reads the class where z ends; of 0 at first: so it soon tells like from unlike."""
    return {"label.weight": torch.zeros(classes, size), "label.bias": torch.zeros(classes)}


def embedded(p: Tensor, params: Tensors) -> Tensor:
    """Return the mean embedding (B, d) under class probabilities p (B, C): of one-hot ones, p."""
    return p @ params["embedding"] if "embedding" in params else p


def squared_error(scores: Tensor, u: Tensor, params: Tensors) -> Tensor:
    """Return ‖û − u‖² (B,), û the mean embedding under class scores (B, C)."""
    return (embedded(scores.softmax(1), params) - u).square().sum(1)


def noised(u: Tensor, level: float | Tensor, noise: Tensor) -> Tensor:
    """Return samples of q (B, d) at ᾱ = `level`, of embeddings u (B, d)."""
    return level**0.5 * u + (1 - level) ** 0.5 * noise


def onward(z: Tensor, guess: Tensor, before: float | Tensor, after: float | Tensor) -> Tensor:
    """Return the mean of z at level ᾱ = `after`, of z at level `before` and a guess of the embedding, each (B, d)."""
    alpha, left = before / after, 1 - before
    return after**0.5 * (1 - alpha) / left * guess + alpha**0.5 * (1 - after) / left * z


def ends(
    params: Tensors, u: Tensor, y: Tensor, first: float | Tensor, last: float | Tensor, noise: Tensor
) -> tuple[Tensor, Tensor]:
    """Return CE(p_out(y|z_T)) and KL(q(z_0|y) ‖ N(0, 1)), each (B,), of embeddings u (B, d).

    Args:
        params: has the layer "label".
        u: embeddings.
        y: labels (B,).
        first: ᾱ_0.
        last: ᾱ_T.
        noise: of z_T, (B, d).
    """
    read = cross_entropy(applied(params, "label", noised(u, last, noise)), y, reduction="none")
    left = torch.as_tensor(1 - first, dtype=u.dtype, device=u.device).log()
    return read, 0.5 * (first * u.square().sum(1) - u.shape[1] * (first + left))


def chance(seeds: Tensor, stream: int, dtype: torch.dtype) -> Tensor:
    """Return a number of each sample's own between 0 and 1, (B,)."""
    return uniforms(seeds, stream, 1, dtype).squeeze(-1)
