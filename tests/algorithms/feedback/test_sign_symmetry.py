"""Sign symmetry: the signs of the way back are the forward weights', its sizes are a scheme's."""

from dataclasses import replace

import pytest
import torch
from cases import CLASSES, NETS, SHAPE, assert_close, batch, copied, descent, double, leaves, network, nonuniform, step
from cases import weighted_cross_entropy as cross_entropy
from fedforward.algorithms import FusedBackprop, Network, RuleError
from fedforward.algorithms.feedback.fixed import xavier
from fedforward.algorithms.feedback.sign_symmetry import SignSymmetry, magnitudes
from fedforward.algorithms.feedback.ways import ways
from fedforward.algorithms.models import mlp
from fedforward.algorithms.seeds import Place
from fedforward.client.plan import Planner
from test_transport import apply, assert_side_by_side_as_alone, pseudo_gradients

SCHEMES = ("usf", "frsf", "brsf")
RULES = {scheme: SignSymmetry(lr=0.1, momentum=0.0, scheme=scheme) for scheme in SCHEMES}


def feedback(rule, net, i, state, b):
    """Return B of block i, literally: a size and a sign for every weight."""
    weight = state.params[ways(net)[i].weight]
    fan_in, field = weight[0].numel(), weight[0, 0].numel()
    size = torch.full_like(weight, (2 / (fan_in + len(weight) * field)) ** 0.5)
    if rule.scheme == "frsf":
        size = state.fixed[f"{i}.magnitude"]
    if rule.scheme == "brsf":
        size = magnitudes(b.draws[0], i, weight.shape, weight.dtype)
    return torch.where(weight > 0, size, -size)


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_one_step_subtracts_the_gradient_of_the_way_back_through_signs(scheme, name):
    rule, net = RULES[scheme], network(name)
    state, b = double(rule.init(net, seed=1)), nonuniform(batch(rule))
    matrices = {i: feedback(rule, net, i, state, b) for i in range(1, len(net.blocks))}
    truth = pseudo_gradients(net, state.params, b, lambda i, layer, x, _: apply(layer, matrices[i], x))
    assert_close(descent(rule, net, state, b), truth, atol=1e-9)


@pytest.mark.parametrize("name", ["mlp", "lenet", "cnn-group"])
def test_where_weights_have_the_size_of_the_scheme_it_is_backpropagation(name):
    net = network(name)
    for rule in (RULES["usf"], RULES["frsf"]):
        state, b = double(rule.init(net, seed=1)), nonuniform(batch(rule))
        for i in range(1, len(net.blocks)):
            state.params[ways(net)[i].weight].copy_(feedback(rule, net, i, state, b))
        params = leaves(state.params)
        loss = cross_entropy(net.forward(params, b.x), b)
        truth = dict(zip(params, torch.autograd.grad(loss, list(params.values())), strict=True))
        assert_close(descent(rule, net, state, b), truth, atol=1e-9)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_signs_are_those_of_the_weights_as_they_change_and_sizes_glorots(scheme):
    rule = replace(RULES[scheme], lr=1.0)
    net = Network(lambda: mlp(SHAPE, CLASSES, hidden=(60, 60)), SHAPE, CLASSES)
    state, before = rule.init(net, seed=1), None
    for s in range(3):
        b = batch(rule, step=s, dtype=torch.float32)
        weight = state.params["1.linear.weight"]
        signs, found = weight.sign(), rule._feedback(net, 1, state, b)
        assert torch.equal(found.sign(), signs)
        size = found.abs() / xavier(weight.shape)
        if scheme == "usf":
            torch.testing.assert_close(size, torch.ones_like(size))
        else:  # uniform in (0, √3)
            assert abs(size.mean() - 3**0.5 / 2) < 4 * (1 / 4 / size.numel()) ** 0.5
            assert abs(size.square().mean() - 1) < 4 * (4 / 5 / size.numel()) ** 0.5
            assert size.min() > 0 and size.max() <= 3**0.5 * (1 + 1e-6)
        if before is not None:
            assert not torch.equal(signs, before[0]), "a sign changed, and B's with it"
            assert (scheme != "brsf") == torch.equal(size, before[1]), "brsf draws anew, the others never"
        before = signs, size
        step(rule, net, state, b)


def test_what_is_fixed_is_a_magnitude_and_only_of_frsf():
    net = network("lenet")
    for scheme, rule in RULES.items():
        state = rule.init(net, seed=1)
        assert set(state.fixed) == ({"1.magnitude", "2.magnitude"} if scheme == "frsf" else set())
        assert all((m > 0).all() for m in state.fixed.values())
        assert set(state.params) == set(net.init(1)), "nothing travels but weights"


def test_magnitudes_are_the_steps_own_the_same_for_every_part_of_its_batch():
    rule, net, place = RULES["brsf"], network("lenet"), Place(1, 2, 3, 4)
    drawn = rule.draw(place, 5, CLASSES)
    assert drawn.shape == (5,) and len(set(drawn.tolist())) == 1
    for other in (place._replace(step=5), place._replace(client=4), place._replace(round=3), place._replace(seed=2)):
        assert rule.draw(other, 5, CLASSES)[0] != drawn[0]
    shape, first = torch.Size((6, 7)), magnitudes(drawn[0], 1, torch.Size((6, 7)), torch.float32)
    assert first.shape == shape and not torch.equal(first, magnitudes(drawn[0], 2, shape, torch.float32))
    assert RULES["usf"].draw(place, 5, CLASSES) is None and RULES["frsf"].draw(place, 5, CLASSES) is None

    state, b = double(rule.init(net, seed=1)), batch(rule)
    whole = descent(rule, net, copied(state), b)
    halves = [
        descent(
            rule,
            net,
            copied(state),
            b._replace(x=b.x[r], y=b.y[r], weight=b.weight[r], draws=b.draws[r], total=b.weight.sum()),
        )
        for r in (slice(0, 2), slice(2, 6))
    ]
    assert_close({key: halves[0][key] + halves[1][key] for key in whole}, whole, atol=1e-9)


def test_replicas_side_by_side_have_magnitudes_of_their_own():
    seeds, shape = torch.tensor([3, -5]), torch.Size((4, 7))
    both = magnitudes(seeds, 1, shape, torch.float64)
    assert both.shape == (2, 4, 7)
    for c in range(2):
        assert torch.equal(both[c], magnitudes(seeds[c], 1, shape, torch.float64))


@pytest.mark.parametrize("rule", [replace(rule, momentum=0.5) for rule in RULES.values()])
@pytest.mark.parametrize("net", ["mlp", "mlp-tanh", "flat"])
def test_replicas_side_by_side_learn_what_each_learns_alone(rule, net):
    assert rule.stackable(network(net)) and not rule.stackable(network("lenet"))
    assert_side_by_side_as_alone(rule, network(net))


def plan(rule, depth, size=64, width=32):
    net = Network(lambda: mlp(SHAPE, CLASSES, hidden=(width,) * depth), SHAPE, CLASSES)
    return Planner(net).step(rule, size).parts["activations"]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_layer_more_stores_its_activity(scheme):
    more = [plan(RULES[scheme], depth) for depth in (4, 8, 16)]
    assert more[1] - more[0] == 4 * 4 * 64 * 32 and more[2] - more[1] == 8 * 4 * 64 * 32
    assert more[2] > 1.8 * more[1]


def test_a_matrix_of_one_block_is_what_it_needs_more_than_fused_backpropagation():
    size, width = 4, 128
    fused = plan(FusedBackprop(), 3, size, width)
    weights = 4 * width * width
    over = {scheme: plan(rule, 3, size, width) - fused for scheme, rule in RULES.items()}
    assert 0.95 * weights < over["usf"] == over["frsf"] <= weights
    assert 2.9 * weights < over["brsf"] < 3.1 * weights


def test_an_unknown_scheme_is_refused():
    with pytest.raises(RuleError, match="unknown scheme 'sign': use usf, frsf or brsf"):
        SignSymmetry(scheme="sign")
