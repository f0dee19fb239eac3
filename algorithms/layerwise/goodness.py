"""What a layer that learns by goodness begins from and sees, and what keeps its units from falling silent."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..network import Network
from ..optimizer import Product, add
from ..rule import RuleError, Tensors
from ..seeds import Purpose, generator
from ..softmax import onehot

PEER_MOMENTUM, PEER_START = 0.9, 0.5
BOUNDED = (torch.nn.Tanh, torch.nn.Sigmoid, torch.nn.Softsign)


def demand_goodness(net: Network, rule: str) -> None:
    """Refuse a network of one hidden block, or of activities that are too small, in the name of a rule."""
    if len(net.hidden) < 2:
        raise RuleError(
            f"{rule} needs two hidden blocks or more, and this model has {len(net.hidden)}: add a layer before the"
            " output"
        )
    if any(isinstance(m, BOUNDED) for i in net.hidden for m in net.blocks[i].modules()):
        raise RuleError(
            f"{rule} wants a mean square activity of 1 for right labels, which tanh and sigmoid cannot reach: use"
            " --set model.activation=relu"
        )


def initial(net: Network, seed: int) -> Tensors:
    """Return the hidden blocks' weights N(0, 1/n_out), zero biases, unit norms, and running means "{l}.mean"."""
    template, params = net.init(seed), {}
    for i in net.hidden:
        for j, key in enumerate(net.keys(i)):
            params[key] = template[key].zero_() if key.endswith("bias") else template[key]
            if template[key].dim() > 1:
                draws = generator(seed, Purpose.INIT, i, j).standard_normal(template[key].shape)
                params[key] = torch.from_numpy(draws / template[key].shape[0] ** 0.5).to(template[key].dtype)
        params[f"{i}.mean"] = torch.full(net.sizes[i], PEER_START).flatten()
    return params


def add_peer_term(gradient: Tensor, activity: Tensor, mean: Tensor, share: Tensor, weight: float) -> None:
    """Move the units' running mean (n,), and add the peer term to the rows of true labels, the first B; both in place.

    Args:
        gradient: of the rest of the loss in the activity, (2B, n).
        activity: of the layer, (2B, n).
        mean: m of the units.
        share: of each sample in the batch mean, (B,).
        weight: λ of the term.
    """
    size = len(share)
    mean.mul_(PEER_MOMENTUM).add_((share @ activity[:size]) * (1 - PEER_MOMENTUM))
    slope = weight * 2 / mean.numel() * (1 - PEER_MOMENTUM) * (mean - mean.mean())
    add(gradient[:size], Product(share[None], slope[None]))


def neutral_activity(net: Network, params: Tensors, x: Tensor, labelled: bool) -> Tensor:
    """Return the normalised activities (B, Σ n_l) of all hidden layers but the first.

    Args:
        net: the network.
        params: its parameters.
        x: samples (B, *shape).
        labelled: where labels are written, all of them are, each 1/C.
    """
    neutral = x.flatten(1).clone()
    if labelled:
        neutral[:, : net.classes] = 1 / net.classes
    x, kept = normalise_(neutral.view_as(x)), []
    for i in net.hidden:
        x = normalise_(net.block(i, params, x))
        if i > 0:
            kept.append(x.flatten(1))
    return torch.cat(kept, 1)


def embed(x: Tensor, labels: Sequence[Tensor], classes: int) -> Tensor:
    """Return a copy of x (B, *shape) for each of the labels (B,), one after the other, their one-hot in its first C."""
    copies = x.flatten(1).repeat(len(labels), 1)
    for rows, y in zip(copies.chunk(len(labels)), labels, strict=True):
        rows[:, :classes] = onehot(y, classes, x.dtype)
    return copies.view(-1, *x.shape[1:])


def normalise_(a: Tensor) -> Tensor:
    """Divide each sample of a (B, ...) by its root mean square, in place: its length then carries nothing."""
    features = tuple(range(1, a.dim()))
    if a.requires_grad:  # who wants the gradient of all the inference pays for it
        return a / (a.square().mean(features, keepdim=True).sqrt() + 1e-8)
    for rows in a.chunk(2):  # in halves: the squares take half the memory
        rows.div_(rows.square().mean(features, keepdim=True).sqrt_().add_(1e-8))
    return a
