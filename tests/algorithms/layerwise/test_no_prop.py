"""NoProp against its loss written out sample by sample, block by block; and what T costs."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from cases import CLASSES, assert_close, batch, copied, descent, double, leaves, network, nonuniform, step
from denoised import EMBEDDINGS, NETS, SMALL, at_the_ends, embeddings, gradients, guessed, onward, train, unlike
from fedforward.algorithms import Batch, Network
from fedforward.algorithms.layerwise.no_prop import NoProp
from fedforward.algorithms.models import mlp
from fedforward.algorithms.noise import normals
from fedforward.client.plan import Planner
from fedforward.client.step import accumulators, take_step

RULE = NoProp(steps=3, **SMALL)
LEVELS = [math.sin(math.pi / 2 * (t + 0.5) / 4) ** 2 for t in range(4)]


def own(params, t):
    """Return what block t computes with."""
    found = {key[len(f"{t}.") :]: p for key, p in params.items() if key.startswith(f"{t}.")}
    return found | {key: p for key, p in params.items() if "." not in key}


def losses(net, params, b, eta=0.1):
    """Return the loss of each sample, all T blocks."""
    found = []
    for i in range(len(b.y)):
        x, y, draws = b.x[i : i + 1], int(b.y[i]), b.draws[i : i + 1]
        u = embeddings(net, params)[y]
        noise = [normals(draws, t, len(u), torch.float64)[0] for t in range(4)]
        loss = at_the_ends(net, params, y, LEVELS[0], LEVELS[-1], noise[0])
        for t in (1, 2, 3):
            s = LEVELS[t - 1]
            z = s**0.5 * u + (1 - s) ** 0.5 * noise[t]
            gain = LEVELS[t] / (1 - LEVELS[t]) - s / (1 - s)
            errors = (guessed(net, own(params, t), x, z[None])[0] - u) ** 2
            loss = loss + 3 / 2 * eta * gain * errors.sum() / 3  # the paper's, of one of T blocks, in expectation
        found.append(loss)
    return torch.stack(found)


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("embedding", EMBEDDINGS)
def test_one_step_subtracts_the_gradient_of_the_whole_loss(name, embedding):
    rule, net = replace(RULE, embedding=embedding, eta=0.3), network(name)
    state, b = double(rule.init(net, seed=1)), nonuniform(batch(rule, 5))
    unlike(state, "label.weight")
    params = leaves(state.params)
    each = losses(net, params, b, 0.3)
    truth = gradients(each.dot(b.weight) / b.weight.sum(), params)
    right = (rule.logits(net, state, b.x).argmax(1) == b.y).double().dot(b.weight)
    stats = step(rule, net, copied(state), b)
    torch.testing.assert_close(stats.loss, each.dot(b.weight).detach(), rtol=0, atol=1e-9)
    assert stats.correct == right
    assert_close(descent(rule, net, state, b), truth, atol=1e-9)
    assert all(g.abs().max() > 1e-7 for g in truth.values())


@pytest.mark.parametrize("embedding", EMBEDDINGS)
def test_inference_goes_block_after_block_from_the_mean(embedding):
    rule, net = replace(RULE, embedding=embedding), network("lenet")
    state, b = double(rule.init(net, seed=1)), batch(rule)
    unlike(state, "label.weight")
    z = torch.zeros(6, rule.size(net), dtype=torch.float64)
    for t in (1, 2, 3):
        z = onward(z, guessed(net, own(state.params, t), b.x, z), LEVELS[t - 1], LEVELS[t])
    scores = z @ state.params["label.weight"].T + state.params["label.bias"]
    torch.testing.assert_close(rule.logits(net, state, b.x), scores, rtol=0, atol=1e-12)


@pytest.mark.parametrize("embedding", EMBEDDINGS)
def test_nothing_passes_from_block_to_block(embedding):
    rule, net = replace(RULE, embedding=embedding), network("mlp")
    state, b = double(rule.init(net, seed=1)), batch(rule)
    other = copied(state)
    for key, p in other.params.items():
        if key.startswith("2."):
            p.neg_()
    a, c = (descent(rule, net, s, b) for s in (state, other))
    blocks = ("1.", "3.", "label.")
    assert all(torch.equal(a[key], c[key]) for key in a if key.startswith(blocks))
    assert not any(torch.allclose(a[key], c[key]) for key in a if not key.startswith(blocks))


@pytest.mark.parametrize("embedding", EMBEDDINGS)
def test_parts_of_a_batch_add_up_embeddings_too(embedding):
    rule, net = NoProp(steps=2, embedding=embedding, width=12, weight_decay=0.01), network("mlp")
    whole, split = (double(rule.init(net, seed=1)) for _ in range(2))
    split = split._replace(gradients=accumulators(rule, split.params))
    b = batch(rule, 7)
    parts = [Batch(*(t[rows] for t in b[:4]), b.weight.sum()) for rows in (slice(0, 3), slice(3, 7))]
    a, _ = take_step(rule, net, whole, [b], 0.01)
    c, _ = take_step(rule, net, split, parts, 0.01)
    assert_close(split.params, whole.params, atol=1e-9)
    assert_close(c._asdict(), a._asdict(), atol=1e-12)


@pytest.mark.parametrize("embedding", EMBEDDINGS)
def test_more_blocks_store_nothing_more_and_a_block_what_its_own_backpropagation_stores(embedding):
    width, size, found = 24, 128, []
    for depth in (2, 4):
        net = Network(partial(mlp, (width,), CLASSES, hidden=(width,) * depth), (width,), CLASSES)
        rules = [NoProp(embedding=embedding, width=width, steps=steps) for steps in (2, 3, 4)]
        plans = [Planner(net).step(rule, size).parts for rule in rules]
        assert len({parts["activations"] for parts in plans}) == 1
        sizes = [parts["parameters"] for parts in plans]
        assert sizes[2] - sizes[1] == sizes[1] - sizes[0] > 0
        found.append(plans[0]["activations"])
    # Two layers more: their outputs, once more for prototypes, and their gradients.
    layers = 2 * (2 if embedding == "prototype" else 1)
    assert found[1] - found[0] == pytest.approx(4 * layers * (size * width + width * width), rel=0.3)


def test_blocks_begin_each_otherwise_and_travel_with_all_that_is_learned():
    net = network("lenet")
    state = NoProp(steps=3, embedding="learned").init(net, 1)
    assert not state.fixed
    hidden = [key for i in net.hidden for key in net.keys(i)]
    layers = [f"{name}.{part}" for name in ("z", "join", "out") for part in ("weight", "bias")]
    mine = {f"{t}.{key}" for t in (1, 2, 3) for key in (*hidden, *layers)}
    assert set(state.params) == mine | {"embedding", "label.weight", "label.bias"}
    for key in (*hidden, *layers):
        assert not torch.equal(state.params[f"1.{key}"], state.params[f"2.{key}"])
    assert not state.params["label.weight"].any()


def test_training_makes_the_loss_fall_and_inference_right():
    _, fall, (first, last), inferred = train(NoProp(steps=3, lr=0.01), 50)
    assert fall < 0.7 and first < 0.4 and min(last, inferred) > 0.85
