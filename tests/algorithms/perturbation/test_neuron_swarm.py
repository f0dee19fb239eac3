"""Swarms against their equations by loops, what their searches cost and store, and how well they learn."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from cases import CLASSES, SHAPE, assert_close, batch, copied, double, network, nonuniform, run_block, step
from cases import weighted_cross_entropy as cross_entropy
from fedforward.algorithms import Batch, Network, RuleError
from fedforward.algorithms.models import mlp
from fedforward.algorithms.noise import uniforms, words
from fedforward.algorithms.perturbation.neuron_swarm import NeuronSwarm
from fedforward.algorithms.seeds import Place
from fedforward.client.plan import Planner
from sklearn.datasets import load_digits

ALL = NeuronSwarm(lr=0.7, particles=3, neurons=0)
SOME = replace(ALL, neurons=4, inertia=0.6, cognitive=1.2, social=1.7)


def loss_of(net, params, b):
    x = b.x
    for i in range(len(net.blocks)):
        x = run_block(net, i, params, x)
    return float(cross_entropy(x, b))


def by_loops(rule, net, state, b, seed, lr):
    """Take one step: particle by particle, each a whole network, its weights and all else as they are, not offsets."""
    params, k = state.params, rule.particles
    for i in range(len(net.blocks)):
        weight, bias = (params[key] for key in net.keys(i))
        n = len(weight)
        parts = [state.slots[f"{i}.{part}"] for part in ("places", "velocities", "bests")]
        first = int(words(seed, i << 20, 1)) % n
        for visit in range(min(rule.neurons or n, n)):
            j = (first + visit) % n
            g = torch.cat([weight[j], bias[j : j + 1]])
            p, v, best = (g + lr * parts[0][j], lr * parts[1][j], g + lr * parts[2][j])

            def loss(own, weight=weight, bias=bias, j=j):
                weight[j], bias[j] = own[:-1], own[-1]
                return loss_of(net, params, b)

            tried = [g.clone(), *p.clone(), *best.clone()]
            losses = [loss(own) for own in tried]
            lowest = min(losses)
            new = tried[next(c for c, found in enumerate(losses) if found <= lowest * (1 + 1e-14))]
            loss(new)
            r = uniforms(seed, (i << 20) + 1 + visit, 2 * p.numel(), p.dtype).view(2, *p.shape)
            for particle in range(k):
                if losses[1 + particle] < losses[1 + k + particle] - 1e-14 * lowest:
                    best[particle] = p[particle]
                v[particle] = (
                    rule.inertia * v[particle]
                    + rule.cognitive * r[0, particle] * (best[particle] - p[particle])
                    + rule.social * r[1, particle] * (new - p[particle])
                )
                p[particle] += v[particle]
            for part, own in zip(parts, (p - new, v, best - new), strict=True):
                part[j] = own / lr


@pytest.mark.parametrize("rule", [ALL, SOME], ids=["all", "some"])
@pytest.mark.parametrize("name", ["mlp", "mlp-tanh", "flat", "one-layer"])
def test_a_step_is_the_swarms_of_every_neuron_by_loops(name, rule):
    net = Network(lambda: mlp(SHAPE, CLASSES, hidden=()), SHAPE, CLASSES) if name == "one-layer" else network(name)
    state = double(rule.init(net, seed=1))
    wanted, start = copied(state), copied(state)
    for s in range(2):
        b = nonuniform(batch(rule, 5, step=s))
        step(rule, net, state, b, 0.7)
        by_loops(rule, net, wanted, b, b.draws[:1], 0.7)
    assert_close(state.params, wanted.params, atol=1e-9)
    assert_close(state.slots, wanted.slots, atol=1e-9)
    assert all((p - start.params[key]).abs().max() > 1e-3 for key, p in state.params.items())


def test_the_loss_of_the_batch_never_rises_and_soon_is_lower():
    rule, net = replace(ALL, lr=0.5), network("mlp")
    state, losses, b = double(rule.init(net, seed=1)), [], nonuniform(batch(rule, 20))
    for s in range(4):
        losses.append(float(cross_entropy(net.forward(state.params, b.x), b)))
        draws = rule.draw(Place(0, 1, 0, s), 20, CLASSES)
        stats = step(rule, net, state, b._replace(draws=draws))
        assert float(stats.loss / stats.weight) == pytest.approx(losses[-1], abs=1e-12)
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.9 * losses[0]


def test_bests_are_judged_on_the_batch_at_hand():
    net, rule = Network(lambda: mlp((4,), 2, hidden=()), (4,), 2), replace(ALL, particles=1, lr=1.0)
    x = torch.rand(8, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for label in (0, 1):
        state = double(rule.init(net, seed=1))
        for key, shift in (("places", 1.0), ("bests", -1.0)):  # of neuron 0: its place says label 0, its best label 1
            state.slots[f"0.{key}"].zero_()[0, 0, -1] = shift
        b = Batch(x, torch.full((8,), label), torch.ones(8).double(), rule.draw(Place(0, 0, 0, 0), 8, 2))
        bias = state.params["0.linear.bias"].clone()
        step(rule, net, state, b)
        moved = 1.0 if label == 0 else -1.0
        assert state.params["0.linear.bias"][0] - bias[0] == moved
        assert not state.slots["0.bests"][0, 0].any()  # which is where the neuron is


@pytest.mark.parametrize("row", [0, 3])
def test_any_row_that_counts_tells_the_seed_and_others_do_not(row):
    net, b = network("mlp"), batch(SOME, 6)
    state = double(SOME.init(net, seed=1))
    other = copied(state)
    weight = b.weight.clone()
    weight[row] = 0
    kept = [r for r in range(6) if r != row]
    draws = b.draws.clone()
    draws[row] = 12345
    step(SOME, net, state, b._replace(weight=weight, draws=draws))
    step(SOME, net, other, Batch(b.x[kept], b.y[kept], b.weight[kept], b.draws[kept]))
    assert_close(state.params, other.params, atol=1e-12)
    assert_close(state.slots, other.slots, atol=1e-12)


def test_draws_differ_between_clients_rounds_and_steps_and_not_between_samples():
    places = [Place(0, 1, 2, 3), Place(0, 1, 2, 4), Place(0, 1, 3, 3), Place(0, 2, 2, 3), Place(1, 1, 2, 3)]
    drawn = [ALL.draw(place, 7, CLASSES) for place in places]
    assert all(draws.shape == (7,) and len(set(draws.tolist())) == 1 for draws in drawn)
    assert len({int(draws[0]) for draws in drawn}) == len(places)
    assert torch.equal(ALL.draw(places[0], 3, CLASSES), drawn[0][:3])


def test_a_step_visits_some_neurons_of_each_layer_and_steps_all():
    net, rule = network("mlp"), replace(SOME, neurons=5)
    state, seen = double(rule.init(net, seed=1)), [set(), set(), set()]
    for s in range(30):
        before = copied(state).slots
        step(rule, net, state, batch(rule, 4, step=s))
        for i, visited in enumerate(seen):
            moved = (state.slots[f"{i}.places"] - before[f"{i}.places"]).flatten(1).any(1).nonzero().flatten().tolist()
            assert len(moved) == 5
            visited.update(moved)
    assert [len(visited) for visited in seen] == [24, 16, 10]


@pytest.mark.parametrize("k, neurons", [(3, 4), (8, 0)])
def test_a_step_costs_a_pass_or_two_and_little_for_each_loss(k, neurons):
    net, size, candidates = Network(lambda: mlp((40,), 10, hidden=(20, 30, 24)), (40,), 10), 16, 2 * k + 1
    sizes, products = (40, 20, 30, 24, 10), 0
    layers = [2 * size * m * n for m, n in pairwise(sizes)]
    for i in range(4):
        above = sum(layers[i + 2 :])
        products += layers[i] + (layers[i + 1] if i < 3 else 0)  # sums of the layer and of that above
        products += min(neurons or 99, sizes[i + 1]) * candidates * (2 * size * sizes[i] + above)
    plan = Planner(net).step(NeuronSwarm(particles=k, neurons=neurons), size)
    assert plan.flops == products + plan.forward_flops


@pytest.mark.slow
def test_the_work_of_all_neurons_of_the_usual_network_is_43_passes():
    net = Network(lambda: mlp((784,), 10), (784,), 10)
    full = Planner(net).step(NeuronSwarm(neurons=0, particles=8), 1)
    assert full.flops / full.forward_flops == pytest.approx(43, abs=0.5)


def test_swarms_are_three_copies_a_particle_and_a_search_needs_no_more_with_depth():
    activations = []
    for depth in (4, 6, 12):
        net = Network(lambda d=depth: mlp((30,), 10, hidden=(30,) * d), (30,), 10)
        plan = Planner(net).step(NeuronSwarm(particles=5, neurons=2), 32)
        assert plan.parts["optimizer"] == 3 * 5 * plan.parts["parameters"]
        activations.append(plan.parts["activations"])
    assert activations[0] == activations[1] == activations[2]


@pytest.mark.slow
def test_on_the_digits_it_reads_nine_in_ten_with_large_batches():
    rule = NeuronSwarm(neurons=0)
    net = Network(lambda: mlp(SHAPE, CLASSES, hidden=(16,)), SHAPE, CLASSES)
    x, y = (torch.from_numpy(a) for a in load_digits(return_X_y=True))
    x, rng, place, epochs = x.float().view(-1, *SHAPE) / 16, np.random.default_rng(0), 0, 24
    train, test = torch.from_numpy(rng.permutation(len(y))).split([1437, 360])
    state = rule.init(net, seed=0)
    for epoch in range(epochs):
        lr = rule.lr * min(1, 2 * (1 - epoch / epochs))
        for rows in train[torch.from_numpy(rng.permutation(len(train)))].split(719):
            draws = rule.draw(Place(0, 0, 0, place), len(rows), CLASSES)
            step(rule, net, state, Batch(x[rows], y[rows], torch.ones(len(rows)), draws), lr)
            place += 1
    assert float((rule.logits(net, state, x[test]).argmax(1) == y[test]).float().mean()) >= 0.9


def test_refusals_name_the_remedy():
    for net in (network("lenet"), network("mlp-gelu")):
        with pytest.raises(RuleError, match="use --model mlp"):
            ALL.check(net)
    with pytest.raises(RuleError, match="with biases"):
        ALL.check(Network(torch.nn.Sequential(torch.nn.Linear(5, 3, bias=False)), (5,), 3))
    for setting in ({"particles": 0}, {"neurons": -1}, {"inertia": -0.1}, {"cognitive": -1.0}, {"social": -1.0}):
        with pytest.raises(RuleError, match="needs particles ≥ 1"):
            NeuronSwarm(**setting)
