"""Training by projections: the paper's point of all copies by loops, what is stored of it, and how well it learns."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from cases import CLASSES, SHAPE, assert_close, batch, copied, double, network, nonuniform, step, weighted_cross_entropy
from fedforward.algorithms import Batch, Network, RuleError
from fedforward.algorithms.equilibrium.projection import Projection
from fedforward.algorithms.models import mlp
from fedforward.client.plan import Planner
from scipy.optimize import brentq
from sklearn.datasets import load_digits

FEW = Projection(iterations=4)
RULES = {
    "alternating": replace(FEW, scheme="alternating"),
    "douglas-rachford": FEW,
    "relaxed": replace(FEW, relaxation=0.3),
    "difference-map": replace(FEW, scheme="difference-map", iterations=5),
    "difference-map-beta": replace(FEW, scheme="difference-map", beta=0.7, iterations=5),
    "difference-map-negative": replace(FEW, scheme="difference-map", beta=-0.8, iterations=5),
    "margin": replace(FEW, loss="margin", margin=0.8),
}


def sums(points, /, **factors):
    """Return the sum of points times factors, where a point is a dictionary of arrays."""
    return {
        key: sum(factor * points[name][key] for name, factor in factors.items()) for key in next(iter(points.values()))
    }


class Literal:
    """All copies of all operands as arrays, and both projections as loops over samples, layers and units."""

    def __init__(self, rule, net, params, b):
        self.rule, self.layers = rule, range(len(net.blocks))
        self.x, self.y = b.x.flatten(1).numpy(), b.y.numpy()
        self.share = (b.weight / b.weight.sum()).numpy()
        self.relu = [isinstance(list(block)[-1], torch.nn.ReLU) for block in net.blocks]
        self.start, a = {}, self.x
        for i in self.layers:
            weight, bias = (params[key].numpy() for key in net.keys(i))
            count = len(self.x), len(weight)
            self.start[f"u{i}"] = np.broadcast_to(weight, (*count, weight.shape[1])).copy()
            self.start[f"v{i}"] = np.broadcast_to(a[:, None], (*count, weight.shape[1])).copy()
            self.start[f"s{i}"] = a @ weight.T
            self.start[f"c{i}"] = np.broadcast_to(bias, count).copy()
            a = self.start[f"s{i}"] + bias
            a = np.maximum(a, 0) if self.relu[i] else a
        self.start["z"] = a

    def to_a(self, x):
        x = {key: part.copy() for key, part in x.items()}
        for b in range(len(self.x)):
            for i in self.layers:
                for j in range(x[f"s{i}"].shape[1]):
                    u, v, s = x[f"u{i}"][b, j].copy(), x[f"v{i}"][b, j].copy(), x[f"s{i}"][b, j]
                    p, q = u @ v, u @ u + v @ v
                    if i == 0:  # v is data
                        t = (s - p) / (1 + v @ v)
                        x["u0"][b, j] = u + t * v
                    else:
                        t = brentq(
                            lambda t, p=p, q=q, s=s: ((1 + t * t) * p + t * q) / (1 - t * t) ** 2 - s + t,
                            -1 + 1e-9, 1 - 1e-9, xtol=1e-15, rtol=1e-14,
                        )  # fmt: skip
                        x[f"u{i}"][b, j] = (u + t * v) / (1 - t * t)
                        x[f"v{i}"][b, j] = (v + t * u) / (1 - t * t)
                    x[f"s{i}"][b, j] = s - t
            z, k = x["z"][b].copy(), self.y[b]
            if self.rule.loss == "margin":
                x["z"][b] = np.minimum(z, -self.rule.margin)
                x["z"][b, k] = max(z[k], self.rule.margin)
            else:
                new = z
                for _ in range(200):  # descend λ CE + ½ ‖new − z‖², whose curvature is at most 1 + λ/2
                    soft = np.exp(new - new.max())
                    slope = new - z - self.rule.strength * ((np.arange(len(z)) == k) - soft / soft.sum())
                    new = new - slope / (1 + self.rule.strength / 2)
                x["z"][b] = new
        for i in self.layers:
            x[f"c{i}"][:] = self.share @ x[f"c{i}"]
        return x

    def to_b(self, x):
        x = {key: part.copy() for key, part in x.items()}
        for b in range(len(self.x)):
            for i in self.layers:
                for j in range(x[f"s{i}"].shape[1]):
                    copies = x["z"][b, j : j + 1] if i == self.layers[-1] else x[f"v{i + 1}"][b, :, j]
                    m, s, c = len(copies), x[f"s{i}"][b, j], x[f"c{i}"][b, j]
                    # Where s + c and the copies agree, both terms go by d and copies are s + c + 2 d.
                    d = (copies - s - c).sum() / (2 * m + 1)
                    ways = [(d, s + c + 2 * d)]
                    if self.relu[i]:
                        ways = [way for way in ways if way[1] >= 0] + [(min(0, -(s + c) / 2), 0.0)]
                    d, y = min(ways, key=lambda way: 2 * way[0] ** 2 + ((copies - way[1]) ** 2).sum())
                    x[f"s{i}"][b, j], x[f"c{i}"][b, j] = s + d, c + d
                    copies[:] = y
        for i in self.layers:
            x[f"u{i}"][:] = np.einsum("b,bjk->jk", self.share, x[f"u{i}"])
        return x

    def found(self, net):
        """Return the parameters after all iterations."""
        rule, x = self.rule, self.start
        for _ in range(rule.iterations):
            if rule.scheme == "alternating":
                near = x = self.to_b(self.to_a(x))
            elif rule.scheme == "douglas-rachford":
                reflected = sums({"x": x, "a": self.to_a(x)}, a=2, x=-1)
                near = self.to_b(reflected)
                back = sums({"b": near, "r": reflected}, b=2, r=-1)
                x = sums({"x": x, "back": back}, x=1 - rule.relaxation, back=rule.relaxation)
            else:
                beta, in_a, in_b = rule.beta, self.to_a(x), self.to_b(x)
                f_a = sums({"p": in_a, "x": x}, p=1 - 1 / beta, x=1 / beta)
                f_b = sums({"p": in_b, "x": x}, p=1 + 1 / beta, x=-1 / beta)
                f_b["v0"] = x["v0"]
                near = self.to_b(f_a)
                x = sums({"x": x, "a": self.to_a(f_b), "b": near}, x=1, a=beta, b=-beta)
            x["v0"] = self.start["v0"]
        params = {}
        for i in self.layers:
            weight, bias = net.keys(i)
            params[weight], params[bias] = near[f"u{i}"][0], self.share @ near[f"c{i}"]
        return {key: torch.from_numpy(p) for key, p in params.items()}


def small(*hidden):
    return Network(lambda: mlp((5,), 3, hidden=hidden), (5,), 3)


def problem(net, size=4, scale=3.0):
    """Return a state in which some units are off, and a batch of unequal weights."""
    state = double(FEW.init(net, seed=1))
    b = nonuniform(batch(FEW, size, shape=(5,), classes=3))
    return state, b._replace(x=scale * (b.x - 0.4))


@pytest.mark.parametrize("lr", [1.0, 0.3])
@pytest.mark.parametrize("name", RULES)
def test_a_step_is_the_papers_by_loops_over_all_copies(name, lr):
    rule, net = RULES[name], small(6, 4)
    state, b = problem(net)
    start = copied(state).params
    wanted = {key: start[key] + lr * (p - start[key]) for key, p in Literal(rule, net, start, b).found(net).items()}
    step(rule, net, state, b, lr)
    assert_close(state.params, wanted, atol=1e-9)
    assert all((p - start[key]).abs().max() > 1e-7 for key, p in state.params.items())


@pytest.mark.parametrize("hidden", [(), (4,), (4, 3, 3)])
@pytest.mark.parametrize("scheme", ["alternating", "douglas-rachford"])
def test_any_depth_is_as_by_loops(scheme, hidden):
    rule, net = replace(FEW, scheme=scheme, iterations=3), small(*hidden)
    state, b = problem(net)
    wanted = Literal(rule, net, copied(state).params, b).found(net)
    step(rule, net, state, b)
    assert_close(state.params, wanted, atol=1e-9)


@pytest.mark.parametrize("scheme", ["alternating", "douglas-rachford", "difference-map"])
def test_what_satisfies_every_constraint_stays(scheme):
    rule, net = replace(FEW, scheme=scheme, loss="margin", margin=0.0), small(6, 4)
    state, b = problem(net)
    with torch.no_grad():
        state.params["2.linear.weight"].zero_()
    state.params["2.linear.bias"].copy_(torch.tensor([1.0, -1, -1]))
    b = b._replace(y=torch.zeros_like(b.y))
    before = copied(state).params
    step(rule, net, state, b)
    assert_close(state.params, before, atol=1e-12)


@pytest.mark.parametrize("scheme", ["alternating", "douglas-rachford", "difference-map"])
def test_what_scores_are_told_goes_down_a_block_an_iteration(scheme):
    net, moved = small(6, 4), []
    for iterations in range(1, 6):
        rule = replace(FEW, scheme=scheme, iterations=iterations)
        state, b = problem(net)
        start = copied(state).params
        step(rule, net, state, b)
        far = [(state.params[f"{i}.linear.weight"] - start[f"{i}.linear.weight"]).abs().max() for i in range(3)]
        moved.append([i for i in range(3) if far[i] > 1e-9])
    late = scheme == "difference-map"
    assert moved[late : late + 4] == [[], [2], [1, 2], [0, 1, 2]]


@pytest.mark.parametrize("scheme", ["alternating", "douglas-rachford", "difference-map"])
def test_more_iterations_fit_the_batch_better(scheme):
    net, losses = network("mlp"), []
    for iterations in (2, 10, 40):
        rule = replace(FEW, scheme=scheme, iterations=iterations)
        state, b = double(rule.init(net, seed=1)), batch(rule, 12)
        step(rule, net, state, b)
        losses.append(float(weighted_cross_entropy(net.forward(state.params, b.x), b)))
    assert losses[0] > losses[1] > losses[2] and losses[2] < 0.85 * losses[0]


def test_stats_are_of_the_forward_pass_before():
    net, (state, b) = small(6, 4), problem(small(6, 4))
    scores = net.forward(state.params, b.x)
    stats = step(FEW, net, state, b)
    torch.testing.assert_close(stats.loss, weighted_cross_entropy(scores, b) * b.weight.sum(), rtol=0, atol=1e-12)
    assert stats.correct == ((scores.argmax(1) == b.y) * b.weight).sum() and stats.weight == b.weight.sum()


def test_a_batch_of_padding_alone_changes_nothing():
    net, (state, b) = small(6, 4), problem(small(6, 4))
    before = copied(state).params
    step(FEW, net, state, b._replace(weight=torch.zeros_like(b.weight)))
    assert_close(state.params, before, atol=0)


def grown(rule, *hidden, size=32):
    net = Network(lambda: mlp((40,), 10, hidden=hidden), (40,), 10)
    return Planner(net).step(rule, size).parts["activations"]


def test_alternating_projections_store_activities_and_no_copies():
    rule = Projection(scheme="alternating", iterations=3)
    peaks = [grown(rule, *[64] * depth) for depth in (2, 4, 8)]
    a_layer = (peaks[2] - peaks[1]) / 4
    assert (peaks[1] - peaks[0]) / 2 == pytest.approx(a_layer, rel=0.05)
    # A dozen or two of numbers for each unit and sample, the weights twice: far from a copy for each sample.
    assert a_layer < 4 * (20 * 32 * 64 + 3 * 64 * 64) < 4 * 32 * 64 * 64 / 2
    assert grown(rule, 64, 64, size=64) - grown(rule, 64, 64) < 4 * 32 * 40 * (64 + 64 + 10)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["douglas-rachford", "difference-map"])
def test_other_schemes_keep_two_copies_for_every_sample_and_unit_but_of_the_first_layer(scheme):
    rule = Projection(scheme=scheme, iterations=3)
    lean = replace(rule, scheme="alternating")
    for hidden in ((64, 64), (64,) * 4, (64, 20, 100)):
        copies = sum(n * m for n, m in zip((*hidden[1:], 10), hidden, strict=True))
        beside = grown(rule, *hidden) - 4 * 2 * 32 * copies
        assert 0 < beside < 1.6 * grown(lean, *hidden)
    wide = [Network(lambda m=m: mlp((m,), 10, hidden=(64, 64)), (m,), 10) for m in (40, 400)]
    less, more = (Planner(net).step(rule, 32).parts["activations"] for net in wide)
    assert more - less < 4 * 360 * (3 * 64 + 32)  # the weights and the squares of data, not 32 samples' copies


@pytest.mark.parametrize("scheme", ["alternating", "douglas-rachford", "difference-map"])
def test_more_iterations_take_no_more_memory_and_more_work(scheme):
    plans = [Planner(network("mlp")).step(Projection(scheme=scheme, iterations=k), 8) for k in (2, 3, 5)]
    assert plans[0].peak == plans[1].peak == plans[2].peak
    assert plans[2].flops - plans[1].flops == 2 * (plans[1].flops - plans[0].flops) > 0


DIGITS = [
    ("douglas-rachford", 20, 1),
    pytest.param("difference-map", 20, 1, marks=pytest.mark.slow),
    pytest.param("alternating", 50, 3, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("scheme, iterations, epochs", DIGITS)
def test_it_reads_nine_digits_in_ten(scheme, iterations, epochs):
    rule = Projection(scheme=scheme, iterations=iterations)
    net = Network(lambda: mlp(SHAPE, CLASSES, hidden=(32,)), SHAPE, CLASSES)
    x, y = (torch.from_numpy(a) for a in load_digits(return_X_y=True))
    x, rng = x.float().view(-1, *SHAPE) / 16, np.random.default_rng(0)
    train, test = torch.from_numpy(rng.permutation(len(y))).split([1437, 360])
    state = rule.init(net, seed=0)
    for _ in range(epochs):
        for rows in train[torch.from_numpy(rng.permutation(len(train)))].split(64):
            step(rule, net, state, Batch(x[rows], y[rows], torch.ones(len(rows))))
    assert float((rule.logits(net, state, x[test]).argmax(1) == y[test]).float().mean()) >= 0.9


def test_refusals_name_the_remedy():
    for net in (network("lenet"), network("mlp-tanh"), network("mlp-gelu")):
        with pytest.raises(RuleError, match="use --model mlp"):
            FEW.check(net)
    with pytest.raises(RuleError, match="with biases"):
        FEW.check(Network(torch.nn.Sequential(torch.nn.Linear(5, 3, bias=False)), (5,), 3))
    FEW.check(network("flat"))
    with pytest.raises(RuleError, match="use one of alternating"):
        Projection(scheme="cyclic")
    with pytest.raises(RuleError, match="unknown loss 'mse'"):
        Projection(loss="mse")
    for setting in ({"iterations": 0}, {"relaxation": 0.0}, {"relaxation": 1.5}, {"beta": 0.0}, {"margin": -1.0}):
        with pytest.raises(RuleError, match="needs iterations ≥ 1"):
            Projection(**setting)
    for strength in (0.0, 9.0):
        with pytest.raises(RuleError, match=r"rule.strength above 0 and at most 8"):
            Projection(strength=strength)
