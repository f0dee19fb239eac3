"""Weight mirrors: what dense layers multiply by, learned from noise that is passed through each of them alone.

M. Akrout, C. Wilson, P. Humphreys, T. Lillicrap, D. Tweed, "Deep Learning without Weight Transport", NeurIPS 2019,
arXiv 1904.05391. A layer that answers noise ξ ~ N(0, 1) with W ξ tells W by correlation, E W ξ ξᵀ = W:

    M_l ← (1 − κ) M_l + κ mean_B (W_l ξ) ξᵀ
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..network import Network
from ..noise import normals
from ..optimizer import Product, add
from ..rule import Batch, Tensors


def mirrors(net: Network, params: Tensors) -> Tensors:
    """Return a mirror "{l}.mirror" of every layer of a dense network, which has seen nothing yet."""
    return {f"{i}.mirror": torch.zeros_like(params[net.dense(i).weight]) for i in range(len(net.blocks))}


def reflect(net: Network, params: Tensors, batch: Batch, rate: float, stream: int) -> None:
    """Bring every mirror nearer to its layer by rate κ, in place, with noise of each sample's own.

    Args:
        net: a dense network.
        params: weights and mirrors.
        batch: draws are the samples' seeds; a sample of weight 0 counts for nothing.
        rate: κ.
        stream: of the noise; the layers take one after the other.
    """
    share = batch.share().unsqueeze(-1)
    for i in range(len(net.blocks)):
        w, mirror = params[net.dense(i).weight], params[f"{i}.mirror"]
        noise = normals(batch.draws, stream + i, w.shape[-1], w.dtype)
        add(mirror.mul_(1 - rate), Product((noise @ w.mT).mul_(share), noise), rate)
        del noise


def through(net: Network, params: Tensors) -> Tensor:
    """Return M_L … M_1, (..., C, n_in): how the scores would follow the input if no activation stood between."""
    product = params[f"{net.output}.mirror"]
    for i in reversed(net.hidden):
        product = product @ params[f"{i}.mirror"]
    return product
