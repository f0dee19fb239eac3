"""InfoPro: a module tells the classes apart and keeps what later ones may need, enough to draw the input again.

Y. Wang, Z. Ni, S. Song, L. Yang, G. Huang, "Revisiting Locally Supervised Learning: an Alternative to End-to-end
Training", ICLR 2021, arXiv 2101.10832. Module m has a decoder D_m and a classifier A_m:

    L_m = λ_1 R(D_m(a_m), x) + λ_2 CE(A_m(a_m), y)      λ = (1 − ρ) λ^first + ρ λ^last      ρ = (m − 1)/(K − 2), or 0

for m = 1 … K − 1, x being the network's input and R the binary cross-entropy of its numbers: greedy modules throw away
what does not help at once, and R holds them back, above all the early ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from ..blocks import CONVOLUTIONS
from ..network import Network
from ..residual import GroupNorm
from ..rule import Batch, RuleError, Tensors
from ..softmax import cross_entropy
from .auxiliary import classifier
from .modules import Isolated, Module, module, stretches

UPSAMPLING = ("linear", "bilinear", "trilinear")  # by the dimensions of a map
DECODER, FEATURES = 12, 128  # the paper's: channels in a decoder, units in a classifier and in a dense decoder


@dataclass(frozen=True)
class InfoPro(Isolated):
    """Module-local cross-entropy and reconstruction of the input ("InfoPro (softmax)").

    Stores during a step: what the largest module needs, its input, its activations with those of its auxiliary nets,
    and their gradients. A decoder works at the resolution of the input, so it is most of a late module. Auxiliary nets
    travel and are averaged.

    Departs from the paper: the input is drawn with its least number as 0 and its largest as 1, of each sample. A binary
    cross-entropy is of numbers between them; the paper brings its images back to what they were, and here a rule cannot
    know whether the data came standardised. Channels of auxiliary nets are normalised together, of each sample by
    itself, not over batches. On dense blocks, which the paper has not, and where the input is no map, decoder and
    classifier are two dense layers each. The default λ are near those of its ResNet-32 in 16 modules, but that the
    first module learns from labels too, for shallow networks have no others. The contrastive variant is not here.

    Attributes:
        ixx_1: λ_1 of the first module.
        ixy_1: λ_2 of the first module.
        ixx_2: λ_1 of the last module but one, which is the last with auxiliary nets.
        ixy_2: λ_2 of that module.
        local_modules: K, into how many modules the network is cut; 0 makes one of every hidden block. The last one,
            which takes the output block, has the network's own loss.
    """

    name: ClassVar[str] = "infopro"
    paper: ClassVar[str] = "Wang et al., ICLR 2021, arXiv 2101.10832"

    lr: float = 0.05
    momentum: float = 0.9
    ixx_1: float = 5.0
    ixy_1: float = 1.0
    ixx_2: float = 0.2
    ixy_2: float = 1.0
    local_modules: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.ixx_1, self.ixy_1, self.ixx_2, self.ixy_2) < 0:
            raise RuleError("infopro needs rule.ixx_1, ixy_1, ixx_2 and ixy_2 ≥ 0")

    def cut(self, net: Network) -> Iterator[Module]:
        """Yield K modules, each but the last with a decoder and a classifier."""
        *isolated, (last, _) = stretches(net, self.local_modules, self.name)
        for blocks, along in isolated:
            shape = net.sizes[blocks[-1]]
            drawn = partial(decoder, shape, net.shape), math.prod(net.shape)
            yield module(net, blocks, along, decoder=drawn, classifier=(partial(head, shape, net.classes), net.classes))
        yield Module(last, {})

    def local_loss(self, module: Module, params: Tensors, a: Tensor, batch: Batch) -> Tensor:
        """Return the weighted sum of both losses."""
        ixx, ixy = (
            (1 - module.along) * first + module.along * last
            for first, last in ((self.ixx_1, self.ixx_2), (self.ixy_1, self.ixy_2))
        )
        told = cross_entropy(module.auxiliaries["classifier"](params, a), batch)[0]
        missed = binary_cross_entropy_with_logits(
            module.auxiliaries["decoder"](params, a), shades(batch.x), reduction="none"
        )
        return ixx * missed.mean(1).dot(batch.share()) + ixy * told


def shades(x: Tensor) -> Tensor:
    """Return inputs flattened (B, n), each sample's least number as 0 and its largest as 1."""
    x = x.flatten(1)
    least, largest = x.aminmax(dim=1, keepdim=True)
    return (x - least) / (largest - least).clamp_min(1e-12)


def decoder(shape: Sequence[int], inputs: Sequence[int]) -> nn.Sequential:
    """Return the net that draws inputs, flattened, from outputs of this shape."""
    if len(shape) != len(inputs) or len(shape) == 1:
        wide = math.prod(shape)
        return nn.Sequential(nn.Flatten(), nn.Linear(wide, FEATURES), nn.ReLU(), nn.Linear(FEATURES, math.prod(inputs)))
    convolution, mode = CONVOLUTIONS[len(shape) - 2], UPSAMPLING[len(shape) - 2]
    return nn.Sequential(
        nn.Upsample(tuple(inputs[1:]), mode=mode, align_corners=True),
        convolution(shape[0], DECODER, 3, padding=1),
        GroupNorm(1, DECODER),
        nn.ReLU(),
        convolution(DECODER, inputs[0], 3, padding=1),
        nn.Flatten(),
    )


def head(shape: Sequence[int], classes: int) -> nn.Sequential:
    """Return the paper's classifier, whose convolution halves a map of fewer than 64 channels and widens it."""
    width, *sides = shape
    layers: list[nn.Module] = []
    if sides:
        wider = min(2 * width, max(width, 64))
        stride = 2 if wider > width else 1
        layers += [CONVOLUTIONS[len(sides) - 1](width, wider, 3, stride, padding=1, bias=False), GroupNorm(1, wider)]
        layers += [nn.ReLU()]
        width = wider
    *pool, linear = classifier((width, *sides), FEATURES)
    return nn.Sequential(*layers, *pool, linear, nn.ReLU(), nn.Linear(FEATURES, classes))
