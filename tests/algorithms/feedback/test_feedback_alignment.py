"""Feedback alignment is the gradient of a pseudo-loss, is backprop where B = W, and turns towards the true gradient."""

import pytest
import torch
from cases import CLASSES, NETS, SHAPE, assert_close, batch, descent, double, leaves, network, nonuniform, step
from cases import weighted_cross_entropy as cross_entropy
from fedforward.algorithms import FusedBackprop, Network, RuleError
from fedforward.algorithms.feedback.feedback_alignment import FeedbackAlignment
from fedforward.algorithms.feedback.fixed import xavier
from fedforward.algorithms.feedback.ways import ways
from fedforward.algorithms.models import mlp
from fedforward.client.plan import Planner
from test_transport import apply, assert_side_by_side_as_alone, pseudo_gradients

RULE = FeedbackAlignment(lr=0.1, momentum=0.0)


@pytest.mark.parametrize("name", NETS)
def test_one_step_subtracts_the_gradient_of_the_random_way_back(name):
    net = network(name)
    state, b = double(RULE.init(net, seed=1)), nonuniform(batch(RULE))
    feedback = lambda i, layer, x, _: apply(layer, state.fixed[f"{i}.feedback"], x)  # noqa: E731
    truth = pseudo_gradients(net, state.params, b, feedback)
    assert_close(descent(RULE, net, state, b), truth, atol=1e-9)
    assert all(g.abs().max() > 1e-8 for g in truth.values())


def test_one_step_is_the_papers_equations_sample_by_sample():
    net = network("mlp-tanh")
    state, b = double(RULE.init(net, seed=1)), nonuniform(batch(RULE))
    w = [state.params[f"{i}.linear.weight"].clone() for i in range(3)]
    c = [state.params[f"{i}.linear.bias"].clone() for i in range(3)]
    feedback = [None] + [state.fixed[f"{i}.feedback"] for i in (1, 2)]
    truth = {key: torch.zeros_like(p) for key, p in state.params.items()}
    for x, y, weight in zip(b.x, b.y, b.weight, strict=True):
        activities = [x.flatten()]
        for i in range(3):
            z = w[i] @ activities[-1] + c[i]
            activities.append(z.tanh() if i < 2 else z.softmax(0))
        delta = activities[3].clone()
        delta[y] -= 1
        delta *= weight / b.weight.sum()
        for i in (2, 1, 0):
            truth[f"{i}.linear.weight"] += torch.outer(delta, activities[i])
            truth[f"{i}.linear.bias"] += delta
            if i > 0:
                delta = (delta @ feedback[i]) * (1 - activities[i] ** 2)
    assert_close(descent(RULE, net, state, b), truth, atol=1e-9)


@pytest.mark.parametrize("name", NETS)
def test_with_the_forward_weights_for_feedback_it_is_backpropagation(name):
    net = network(name)
    state, b = double(RULE.init(net, seed=1)), nonuniform(batch(RULE))
    for i, way in enumerate(ways(net)[1:], 1):
        state.fixed[f"{i}.feedback"].copy_(state.params[way.weight])
    params = leaves(state.params)
    loss = cross_entropy(net.forward(params, b.x), b)
    truth = dict(zip(params, torch.autograd.grad(loss, list(params.values())), strict=True))
    assert_close(descent(RULE, net, state, b), truth, atol=1e-9)


def test_feedback_is_shaped_like_the_weights_of_glorots_size_and_never_sent():
    net = network("lenet")
    state = RULE.init(net, seed=1)
    assert set(state.fixed) == {"1.feedback", "2.feedback"} and not set(state.fixed) & set(state.params)
    for i in (1, 2):
        feedback, weight = state.fixed[f"{i}.feedback"], state.params[ways(net)[i].weight]
        assert feedback.shape == weight.shape and not torch.equal(feedback, weight)
        size = feedback.square().mean() / xavier(weight.shape) ** 2
        assert abs(size - 1) < 4 * (4 / 5 / feedback.numel()) ** 0.5  # 4 standard errors
    before = {key: p.clone() for key, p in state.fixed.items()}
    step(RULE, net, state, batch(RULE, dtype=torch.float32))
    assert all(torch.equal(before[key], p) for key, p in state.fixed.items())


def test_the_angle_with_the_gradient_falls():
    # The paper's claim: the weights above turn towards the feedback, and with them the update towards the gradient.
    net, rule = network("mlp-tanh"), FeedbackAlignment(lr=0.1, momentum=0.0)
    state, b = double(rule.init(net, seed=1)), batch(rule, 64)
    keys, angles = ("0.linear.weight", "1.linear.weight"), []
    for _ in range(300):
        params = leaves(state.params)
        truth = torch.autograd.grad(cross_entropy(net.forward(params, b.x), b), [params[key] for key in keys])
        before = [state.params[key].clone() for key in keys]
        step(rule, net, state, b)
        moved = [p - state.params[key] for p, key in zip(before, keys, strict=True)]
        cosines = [torch.cosine_similarity(m.flatten(), g.flatten(), dim=0) for m, g in zip(moved, truth, strict=True)]
        angles.append(torch.stack(cosines).acos().rad2deg())
    assert all(angles[0] > 70) and all(torch.stack(angles[-50:]).amax(0) < angles[0] - 15)


@pytest.mark.parametrize("rule", [FeedbackAlignment(momentum=0.5, weight_decay=0.1)])
@pytest.mark.parametrize("net", ["mlp", "mlp-tanh", "flat"])
def test_replicas_side_by_side_learn_what_each_learns_alone(rule, net):
    assert rule.stackable(network(net)) and not rule.stackable(network("lenet"))
    assert_side_by_side_as_alone(rule, network(net))


def activations(rule, depth, size=64, width=32):
    net = Network(lambda: mlp(SHAPE, CLASSES, hidden=(width,) * depth), SHAPE, CLASSES)
    return Planner(net).step(rule, size).parts["activations"]


def test_every_layer_more_stores_its_activity():
    more = [activations(RULE, depth) for depth in (4, 8, 16)]
    assert more[1] - more[0] == 4 * 4 * 64 * 32 and more[2] - more[1] == 8 * 4 * 64 * 32
    assert more[2] > 1.85 * more[1]


@pytest.mark.parametrize("depth, size, width", [(1, 7, 61), (3, 16, 80), (5, 3, 70)])
def test_it_stores_the_bytes_that_are_promised_and_as_many_as_fused_backpropagation(depth, size, width):
    # Beside activities and da: the error and the last bias's gradient, or another's; and stats.
    by_hand = 4 * (size * (depth + 1) * width + max(size * CLASSES + CLASSES, width) + 3)
    assert activations(RULE, depth, size, width) == by_hand
    assert activations(FusedBackprop(), depth, size, width) == by_hand


@pytest.mark.parametrize("name", ["lenet", "cnn-group", "mlp-gelu"])
def test_a_graph_inside_a_block_costs_what_fused_backpropagation_does(name):
    planner = Planner(network(name))
    fused, own = (planner.step(rule, 32).parts["activations"] for rule in (FusedBackprop(), RULE))
    assert own <= 1.02 * fused


def test_blocks_of_two_layers_are_refused():
    pair = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 4))
    with pytest.raises(RuleError, match="feedback-alignment sends the error through one weighted layer a block"):
        RULE.check(Network(torch.nn.Sequential(pair, torch.nn.Sequential(torch.nn.Linear(4, 2))), (4,), 2))
