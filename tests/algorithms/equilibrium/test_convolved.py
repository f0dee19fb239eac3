"""Equilibrium propagation of convolutions: the dense equations of the matrices that maps are, and what it needs."""

import cmath
from dataclasses import replace
from functools import cache, partial

import numpy as np
import pytest
import torch
from cases import CLASSES, SHAPE, assert_close, batch, descent, double, leaves, network, nonuniform, step
from cases import weighted_cross_entropy as cross_entropy
from fedforward.algorithms import Batch, EquilibriumPropagation, Network, RuleError
from fedforward.algorithms.models import cnn
from fedforward.client.memory import PeakMemory
from fedforward.client.plan import Planner
from fedforward.client.step import residents, take_step
from matrices import as_matrices
from sklearn.datasets import load_digits
from torch import nn

OWN = EquilibriumPropagation(momentum=0.0, relaxation=3, nudged=2, homeostasis=5.0)
TIED = replace(OWN, feedback="tied")
FREE = replace(OWN, homeostasis=0.0)
IMAGE = (2, 6, 5)
NETS = {
    "pooled": (lambda: cnn(IMAGE, 3, channels=(3, 2), activation="tanh"), IMAGE),
    "relu": (lambda: cnn(IMAGE, 3, channels=(3, 2)), IMAGE),
    "plain": (
        lambda: nn.Sequential(
            nn.Sequential(nn.Conv2d(2, 3, 3, stride=2), nn.Tanh()),
            nn.Sequential(nn.Conv2d(3, 4, 2, padding=1, bias=False), nn.Tanh()),
            nn.Sequential(nn.Flatten(), nn.Linear(36, 3)),
        ),
        IMAGE,
    ),
    "to vectors": (
        lambda: nn.Sequential(
            nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.MaxPool2d(2)),
            nn.Sequential(nn.Flatten(), nn.Linear(6, 5), nn.Tanh()),
            nn.Sequential(nn.Linear(5, 4), nn.Tanh()),
            nn.Sequential(nn.Linear(4, 3)),
        ),
        IMAGE,
    ),
    "averaged": (
        lambda: nn.Sequential(
            nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.AvgPool2d(2), nn.Tanh()),
            nn.Sequential(nn.AvgPool2d((1, 2)), nn.Conv2d(3, 2, 3, padding=1), nn.MaxPool2d((3, 1)), nn.Tanh()),
            nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 3)),
        ),
        IMAGE,
    ),
}


@cache
def net_of(name):
    build, shape = NETS[name]
    return Network(build, shape, 3)


# ---- The equations -------------------------------------------------------------------------------------------------


def swept(rule, maps, x, target, s, beta, order):
    """Move the layers of one sample, vectors s that may be complex, in this order."""
    up, bias, back, f = maps
    for i in order:
        u = up[i].to(s[i].dtype) @ (s[i - 1] if i else x.to(s[i].dtype)) + bias[i]
        if i + 1 < len(s):
            u = u + rule.gain * (back[i + 1].T.to(s[i].dtype) @ s[i + 1])
        elif beta:
            z = torch.exp(up[-1].to(s[i].dtype) @ s[i] + bias[-1])
            u = u - beta * (up[-1].T.to(s[i].dtype) @ (z / z.sum() - target))
        s[i] = f[i](u)


def rested(rule, maps, x, sweeps):
    s = [torch.zeros_like(bias) for bias in maps[1][:-1]]
    for _ in range(sweeps):
        swept(rule, maps, x, None, s, 0.0, range(len(s)))
    return s


def by_loops(rule, net, params, b):
    """Return the gradients of one step: those of the dense equations in M and c, and from there in the weights."""
    params, loss = leaves(params), 0.0
    for x, y, weight in zip(b.x, b.y, b.weight, strict=True):
        x, share, target = x.flatten(), weight / b.weight.sum(), torch.eye(net.classes, dtype=b.x.dtype)[y]
        maps = as_matrices(net, params, x)
        held = [[m.detach() if torch.is_tensor(m) else m for m in row] for row in maps]
        s = rested(rule, held, x, rule.relaxation)
        deltas = [torch.zeros_like(a) for a in s]
        for k in range(rule.phases):
            beta = rule.beta * cmath.exp(2j * cmath.pi * k / rule.phases)
            beta = beta if rule.phases > 2 else beta.real
            moved = [a + 0 * beta for a in s]
            for _ in range(rule.nudged):
                swept(rule, held, x, target, moved, beta, reversed(range(len(s))))
            for i in range(len(s)):
                answer = moved[i] - s[i] if rule.phases == 1 else moved[i]
                deltas[i] -= (answer / beta).real / rule.phases / rule.gain ** (len(s) - 1 - i)
        up, bias, back, _ = maps
        error = torch.softmax(held[0][-1] @ s[-1] + held[1][-1], 0) - target
        loss = loss + share * error @ (up[-1] @ s[-1] + bias[-1])
        for i in range(len(s)):
            loss = loss + share * deltas[i] @ (up[i] @ (s[i - 1] if i else x) + bias[i])
            if i:
                loss = loss + share * rule.gain * deltas[i - 1] @ (back[i].T @ s[i])
        if rule.feedback == "own" and rule.homeostasis:
            j = jacobian(rule, maps)
            loss = loss + share * rule.homeostasis * (j.square().sum() - (j @ j).trace()) / len(j)
    return dict(zip(params, torch.autograd.grad(loss, list(params.values())), strict=True))


def jacobian(rule, maps):
    """Return J of F in the activities s_l γ^{l/2}, but for its diagonal, which cancels."""
    up, _, back, _ = maps
    sizes = [len(bias) for bias in maps[1][:-1]]
    rows = [[torch.zeros(n, m, dtype=up[0].dtype) for m in sizes] for n in sizes]
    for i in range(1, len(sizes)):
        rows[i][i - 1], rows[i - 1][i] = rule.gain**0.5 * up[i], rule.gain**0.5 * back[i].T
    return torch.cat([torch.cat(row, 1) for row in rows])


@pytest.mark.parametrize(
    "name, rule",
    [
        *((name, rule) for name in ("pooled", "plain", "to vectors") for rule in (OWN, TIED, replace(OWN, phases=3))),
        *((name, rule) for name in ("relu", "averaged") for rule in (FREE, TIED)),
        ("relu", replace(OWN, phases=1)),
        ("averaged", replace(FREE, phases=4)),
    ],
)
def test_a_step_is_the_dense_one_of_the_matrices_that_maps_are(name, rule):
    net = net_of(name)
    rule.check(net)
    state = double(rule.init(net, seed=1))
    b = nonuniform(batch(rule, shape=net.shape, classes=3))
    truth = by_loops(rule, net, state.params, b)
    torch.testing.assert_close(
        rule.logits(net, state, b.x),
        torch.stack([read(rule, as_matrices(net, state.params, x), x.flatten()) for x in b.x]),
        rtol=0,
        atol=1e-12,
    )
    assert_close(descent(rule, net, state, b), truth, atol=1e-9)
    assert all(g.abs().max() > 1e-9 for g in truth.values())


def read(rule, maps, x):
    return maps[0][-1] @ rested(rule, maps, x, rule.relaxation)[-1] + maps[1][-1]


@pytest.mark.parametrize("name", NETS)
def test_a_single_sweep_reads_what_the_network_does(name):
    net, rule = net_of(name), replace(FREE, relaxation=1)
    state, b = double(rule.init(net, seed=1)), batch(rule, shape=IMAGE, classes=3)
    torch.testing.assert_close(rule.logits(net, state, b.x), net.forward(state.params, b.x), rtol=0, atol=1e-12)


# ---- The equilibrium -----------------------------------------------------------------------------------------------


def at_equilibrium(rule, net, params, b):
    """Return the gradient of the cross-entropy at equilibrium, by autograd through a long relaxation."""
    params = leaves(params)
    scores = torch.stack([read(rule, as_matrices(net, params, x), x.flatten()) for x in b.x])
    return dict(zip(params, torch.autograd.grad(cross_entropy(scores, b), list(params.values())), strict=True))


def cosines(rule, net, state, b):
    """Return the cosine of each step, of a rule without homeostasis and momentum, with the gradient at equilibrium."""
    truth = at_equilibrium(rule, net, state.params, b)
    found = descent(rule, net, state, b)
    return {key: float(torch.cosine_similarity(g.flatten(), truth[key].flatten(), 0)) for key, g in found.items()}


@pytest.mark.parametrize("phases", [2, 4])
@pytest.mark.parametrize("name", NETS)
def test_a_small_nudge_of_tied_feedback_gives_the_gradient_at_equilibrium(name, phases):
    net, phases = net_of(name), 2 if name == "relu" else phases
    rule = replace(TIED, relaxation=60, nudged=60, beta=0.01, phases=phases)
    state, b = double(rule.init(net, seed=1)), nonuniform(batch(rule, shape=IMAGE, classes=3))
    truth = at_equilibrium(rule, net, state.params, b)
    for key, g in descent(rule, net, state, b).items():
        assert (g - truth[key]).norm() < {2: 1e-3, 4: 1e-7}[phases] * truth[key].norm(), key


@pytest.mark.parametrize("rule", [FREE, replace(TIED, gain=0.5)], ids=repr)
def test_winners_that_are_held_let_tanh_maps_settle(rule):
    net = Network(partial(cnn, SHAPE, CLASSES, channels=[8, 16], activation="tanh"), SHAPE, CLASSES)
    state, x = double(rule.init(net, seed=0)), torch.from_numpy(load_digits().images[:64]).unsqueeze(1) / 16
    one, other = (dict(replace(rule, relaxation=sweeps).activities(net, state, x)) for sweeps in (80, 81))
    assert_close(one, other, atol=1e-12)


# ---- The contract, beyond what the contract's tests run ------------------------------------------------------------

MAPS = partial(cnn, SHAPE, CLASSES, channels=(4, 6), activation="tanh")


@cache
def maps():
    return Network(MAPS, SHAPE, CLASSES)


@pytest.mark.parametrize("rule", [replace(OWN, phases=4), replace(TIED, phases=3)], ids=repr)
def test_complex_phases_of_maps_run_under_vmap_and_pass_padding_by(rule):
    net, batches = maps(), [nonuniform(batch(OWN, 5, client=c)) for c in range(3)]
    alone = [double(rule.init(net, seed)) for seed in range(3)]
    stacked = {key: torch.stack([state.params[key] for state in alone]) for key in alone[0].params}
    x, y, weight = (torch.stack([b[i] for b in batches]) for i in range(3))

    def run(params, x, y, weight):
        return step(rule, net, alone[0]._replace(params=params), Batch(x, y, weight), 0.3)

    stats = torch.func.vmap(run)(stacked, x, y, weight)
    for c, (state, b) in enumerate(zip(alone, batches, strict=True)):
        kept = b.weight > 0
        own = step(rule, net, state, Batch(b.x[kept], b.y[kept], b.weight[kept]), 0.3)
        assert_close({key: p[c] for key, p in stacked.items()}, state.params, atol=1e-12)
        assert_close({key: v[c] for key, v in stats._asdict().items()}, own._asdict(), atol=1e-12)


@pytest.mark.parametrize("rule", [OWN, replace(OWN, phases=4), replace(TIED, phases=3)], ids=repr)
@pytest.mark.parametrize("name", ["pooled", "to vectors"])
def test_steps_of_maps_are_planned_as_they_run(rule, name):
    net = net_of(name)
    plan, state = Planner(net).step(rule, 6), rule.init(net, seed=1)
    meter = PeakMemory(residents(state, {}))
    b = batch(rule, dtype=torch.float32, shape=net.shape, classes=3)
    take_step(rule, net, state, [b], 0.01, meter)
    assert (plan.peak, plan.op, plan.parts, plan.flops) == (meter.peak, meter.op, meter.parts, meter.flops)


@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("phases, numbers", [(1, 2), (2, 3), (4, 4)])
def test_a_map_more_stores_its_states_and_winners_and_no_time(phases, numbers, pooled):
    peaks = []
    for depth in (3, 6):

        def build(depth=depth):
            layers = [nn.Conv2d(4, 4, 3, padding=1), *[nn.MaxPool2d(3, stride=1, padding=1)] * pooled, nn.Tanh()]
            blocks = [nn.Sequential(*layers) for _ in range(depth)]
            return nn.Sequential(*blocks, nn.Sequential(nn.Flatten(), nn.Linear(4 * 64, 10)))

        net = Network(build, (4, 8, 8), 10)
        rule = EquilibriumPropagation(phases=phases, relaxation=2, nudged=2)
        plans = [Planner(net).step(replace(rule, **more), 8) for more in ({}, {"relaxation": 3}, {"nudged": 3})]
        assert len({plan.peak for plan in plans}) == 1
        peaks.append(plans[0].parts["activations"])
    assert peaks[1] - peaks[0] == 3 * (numbers + 2 * pooled) * 4 * 8 * 4 * 64


def test_a_row_is_a_map_of_height_one():
    def built(kind, pool, shape, size, no):
        return Network(
            lambda: nn.Sequential(
                nn.Sequential(kind(2, 3, size(3), padding=no(1)), pool(size(2)), nn.Tanh()),
                nn.Sequential(kind(3, 4, size(3)), nn.Tanh()),
                nn.Sequential(nn.Flatten(), nn.Linear(12, 3)),
            ),
            shape,
            3,
        )

    row = built(nn.Conv1d, nn.MaxPool1d, (2, 10), int, int)
    flat = built(nn.Conv2d, nn.MaxPool2d, (2, 1, 10), lambda n: (1, n), lambda n: (0, n))
    for rule in (OWN, replace(TIED, phases=3)):
        rule.check(row)
        state, b = double(rule.init(row, seed=1)), batch(rule, shape=(2, 10), classes=3)
        wide = {
            key.replace("1d", "2d"): (p.unsqueeze(2) if p.dim() == 3 else p).clone() for key, p in state.params.items()
        }
        found = descent(rule, flat, state._replace(params=wide), b._replace(x=b.x.unsqueeze(2)))
        found = {key.replace("2d", "1d"): g.squeeze(2) if g.dim() == 4 else g for key, g in found.items()}
        assert_close(found, descent(rule, row, state, b), atol=1e-12)


# ---- Learning ------------------------------------------------------------------------------------------------------


def digits():
    x, y = (torch.from_numpy(a) for a in load_digits(return_X_y=True))
    return x.float().view(-1, *SHAPE) / 16, y


def trained(rule, net, epochs):
    """Return the replica after some epochs over 1,437 digits, and the other 360."""
    (x, y), rng, state = digits(), np.random.default_rng(0), rule.init(net, seed=0)
    train, test = torch.from_numpy(rng.permutation(len(y))).split([1437, 360])
    for epoch in range(epochs):
        lr = rule.lr * min(1, 2 * (1 - epoch / epochs))
        for rows in train[torch.from_numpy(rng.permutation(len(train)))].split(16):
            step(rule, net, state, Batch(x[rows], y[rows], torch.ones(len(rows))), lr)
    return state, x[test], y[test]


DIGITS = partial(cnn, SHAPE, CLASSES, channels=[8, 16], activation="tanh")


@pytest.mark.slow
@pytest.mark.parametrize("rule", [EquilibriumPropagation(lr=0.05), EquilibriumPropagation(lr=0.05, feedback="tied")])
def test_tanh_maps_read_nine_digits_in_ten(rule):
    net = Network(DIGITS, SHAPE, CLASSES)
    state, x, y = trained(rule, net, epochs=10)
    assert float((rule.logits(net, state, x).argmax(1) == y).float().mean()) > 0.9


@pytest.mark.slow
def test_homeostasis_aligns_maps_with_the_gradient_at_equilibrium():
    net, found = Network(DIGITS, SHAPE, CLASSES), []
    for homeostasis in (0.0, 10.0):
        rule = EquilibriumPropagation(lr=0.05, homeostasis=homeostasis)
        state, x, y = trained(rule, net, epochs=4)
        b = Batch(x[:12].double(), y[:12], torch.ones(12, dtype=torch.float64))
        rule = replace(rule, momentum=0.0, homeostasis=0.0, phases=4, relaxation=60, nudged=60)
        found.append(cosines(rule, net, double(state)._replace(slots={}), b))
    without, aligned = found
    for key in ("0.conv2d.weight", "0.conv2d.bias", "1.conv2d.weight", "1.back"):
        assert aligned[key] > 0.95 and 1 - aligned[key] < (1 - without[key]) / 2, key
    assert without["1.back"] < 0.7


def test_refusals_name_the_remedy():
    def below_a_readout(*blocks):
        readout = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
        return Network(lambda: nn.Sequential(*(nn.Sequential(*layers) for layers in blocks), readout), IMAGE, 3)

    convolution = nn.Conv2d(2, 4, 3, padding=1)
    for net in (
        network("cnn-group"),
        below_a_readout([convolution, nn.GELU()]),
        below_a_readout([convolution]),
        below_a_readout([convolution, nn.Tanh(), nn.AvgPool2d(2)]),
        below_a_readout([nn.Tanh(), convolution]),
        Network(
            nn.Sequential(
                nn.Sequential(nn.Flatten(), nn.Linear(60, 8), nn.MaxPool1d(2), nn.Tanh()),
                nn.Sequential(nn.Linear(4, 3)),
            ),
            IMAGE,
            3,
        ),
    ):
        with pytest.raises(RuleError, match="no norm, average pooling before the activation, and max-pooling of maps"):
            TIED.check(net)
    second = [nn.Conv2d(4, 4, 1), nn.Tanh()]
    for pooling in (nn.AdaptiveMaxPool2d(2), nn.AvgPool2d(2)):
        net = below_a_readout([convolution, nn.Tanh()], [pooling, *second])
        with pytest.raises(RuleError, match=r"use rule\.homeostasis=0 or rule\.feedback=tied"):
            OWN.check(net)
        FREE.check(net)
        TIED.check(net)
        OWN.check(below_a_readout([pooling, convolution, nn.Tanh()], second))  # nothing leads back below the first
    with pytest.raises(RuleError, match=r"use model\.activation=tanh or rule\.phases=2"):
        replace(OWN, phases=4).check(net_of("relu"))
