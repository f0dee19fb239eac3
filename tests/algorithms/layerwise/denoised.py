"""The NoProp rules' network, written out, and small variants of the rules that the tests share."""

import math

import torch
from cases import CLASSES, SHAPE, network, run_block, step
from fedforward.algorithms import Batch
from fedforward.algorithms.seeds import Place
from sklearn.datasets import load_digits

EMBEDDINGS = ("one-hot", "learned", "prototype")
SMALL = {"optimizer": "sgd", "width": 12, "dim": 6}  # at right angles need dim ≥ 10: these are not
NETS = ("mlp", "lenet", "cnn-group")


def unlike(state, key):
    """Add numbers to parameters that begin at 0."""
    p = state.params[key]
    p.add_(torch.rand(p.shape, generator=torch.Generator().manual_seed(0), dtype=p.dtype) - 0.3)


def features(net, params, x):
    for i in net.hidden:
        x = run_block(net, i, params, x)
    return x.mean((2, 3)) if x.dim() == 4 else x.flatten(1)


def output(net, params, x, z, time=None):
    """Return a block's output (B, outputs) of inputs x, embeddings z and one time for all."""
    if any(key.startswith("z.0") for key in params):
        seen = features(net, {key[2:]: p for key, p in params.items() if key.startswith("z.")}, z.view(-1, *net.shape))
    else:
        seen = (z @ params["z.weight"].T + params["z.bias"]).clamp_min(0)
    joined = [features(net, params, x), seen]
    if time is not None:
        joined.append(torch.stack([torch.cos(math.pi * k * time) for k in range(1, 17)]).expand(len(x), 16))
    met = (torch.cat(joined, 1) @ params["join.weight"].T + params["join.bias"]).clamp_min(0)
    return met @ params["out.weight"].T + params["out.bias"]


def embeddings(net, params):
    return params.get("embedding", torch.eye(net.classes, dtype=torch.float64))


def guessed(net, params, x, z, time=None):
    """Return û, class by class."""
    p, u = output(net, params, x, z, time).softmax(1), embeddings(net, params)
    return sum(p[:, c : c + 1] * u[c] for c in range(net.classes))


def at_the_ends(net, params, y, first, last, noise):
    """Return CE(p_out(y|z_T)) + KL(q(z_0|y) ‖ N(0, 1)) of one sample."""
    u, normal = embeddings(net, params)[y], torch.distributions.Normal
    z = last**0.5 * u + (1 - last) ** 0.5 * noise
    start = normal(first**0.5 * u, torch.as_tensor(1 - first, dtype=u.dtype) ** 0.5)
    apart = torch.distributions.kl_divergence(start, normal(torch.zeros_like(u), torch.ones_like(u)))
    return apart.sum() - (params["label.weight"] @ z + params["label.bias"]).log_softmax(0)[y]


def onward(z, guess, s, t):
    """Return the mean of z at ᾱ = t of z at ᾱ = s."""
    alpha = s / t
    return t**0.5 * (1 - alpha) / (1 - s) * guess + alpha**0.5 * (1 - t) / (1 - s) * z


def gradients(loss, params):
    return dict(zip(params, torch.autograd.grad(loss, list(params.values())), strict=True))


def train(rule, steps, size=64):
    """Train on a few digits; return (state, the last loss beside the first, stats at first and last, inference)."""
    net = network("mlp")
    x, y = (torch.from_numpy(a[:size]) for a in load_digits(return_X_y=True))
    x, state, seen = x.float().view(-1, *SHAPE) / 16, rule.init(net, seed=1), []
    for s in range(steps):
        seen.append(step(rule, net, state, Batch(x, y, torch.ones(size), rule.draw(Place(0, 0, 0, s), size, CLASSES))))
    losses = torch.stack([stats.loss for stats in seen])
    fall = float(losses[-10:].mean() / losses[0])
    inferred = (rule.logits(net, state, x).argmax(1) == y).sum() / size
    return state, fall, (seen[0].correct / size, seen[-1].correct / size), inferred
