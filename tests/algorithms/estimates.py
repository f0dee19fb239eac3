"""Three small networks on which gradient estimates meet the true gradient, and how the two are compared."""

from statistics import NormalDist

import pytest
import torch
from cases import CLASSES, SHAPE, batch, double, leaves, nonuniform, step
from cases import weighted_cross_entropy as cross_entropy
from fedforward.algorithms import MODELS, Batch, Network
from fedforward.algorithms.models import lenet, mlp
from fedforward.algorithms.seeds import Place
from fedforward.client.plan import Planner
from sklearn.datasets import load_digits

SMALL = {
    "mlp-tanh": Network(lambda: mlp((3,), 3, hidden=(4,), activation="tanh"), (3,), 3),  # 31 parameters
    "mlp-gelu": Network(lambda: mlp((5,), 4, hidden=(6, 5), activation="gelu"), (5,), 4),  # 95
    "lenet": Network(lambda: lenet((1, 4, 4), 3, channels=(2, 2), activation="tanh"), (1, 4, 4), 3),  # 163
}

# All three where a test is short; where it is long, those that are much like the first with the slow tests.
MOSTLY_SLOW = [pytest.param(name, marks=[] if name == "mlp-tanh" else pytest.mark.slow) for name in SMALL]


def problem(rule, net, seed=0):
    """Return a replica in float64 and a batch with masked and unequal samples."""
    return double(rule.init(net, seed=1)), nonuniform(batch(rule, 7, seed=seed, shape=net.shape, classes=net.classes))


def flat(tensors):
    return torch.cat([t.flatten() for t in tensors.values()])


def gradient(params, b, scores):
    """Return the gradient (d,) of the cross-entropy of `scores(params)`, by autograd."""
    params = leaves(params)
    return torch.cat(
        [g.flatten() for g in torch.autograd.grad(cross_entropy(scores(params), b), list(params.values()))]
    )


def signs(params, directions, count):
    """Return the directions as rows of a matrix (count, d)."""
    rows = []
    for k in range(count):
        zeros = {key: torch.zeros_like(p) for key, p in params.items()}
        directions.add(zeros, k, 1.0, chunk=4096)
        rows.append(flat(zeros))
    return torch.stack(rows)


def assert_mean_is(samples, truth):
    """Assert that the mean of samples (M, d) is `truth`, to 3 standard errors for all coordinates at once.

    Along the truth, where 15 % more or less must show, too.
    """
    error = samples.std(0) / len(samples) ** 0.5
    bound = NormalDist().inv_cdf(1 - 0.0027 / 2 / len(truth))
    assert ((samples.mean(0) - truth) / error).abs().max() < bound
    along = samples @ truth / truth.square().sum()
    spread = along.std() / len(along) ** 0.5
    assert abs(along.mean() - 1) < 3 * spread and 3 * spread < 0.15


def mean_cosine(estimates, truth):
    """Return the mean cosine of estimates (M, d) with the truth (d,)."""
    return float(torch.nn.functional.cosine_similarity(estimates, truth[None], dim=1).mean())


def digits_losses(rule, net, steps, place=lambda step: Place(0, 1, 0, step)):
    """Return the mean losses of steps on the first hundred digits, one after the other."""
    x, y = (torch.from_numpy(a[:100]) for a in load_digits(return_X_y=True))
    x, weight, losses = x.float().view(-1, *SHAPE) / 16, torch.ones(100), []
    state = rule.init(net, seed=0)
    for s in range(steps):
        b = Batch(x, y, weight, rule.draw(place(s), 100, CLASSES))
        losses.append(float(step(rule, net, state, b).loss) / 100)
    return losses


def planner(model):
    """Return the planner of a ready-made model in its usual size."""
    shape = (3, 32, 32) if model == "cnn" else (1, 28, 28)
    return Planner(Network(lambda: MODELS[model](shape, 10), shape, 10))
