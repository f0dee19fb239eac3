"""DFA is the gradient of a pseudo-loss in which random projections of the error stand for the true one."""

import pytest
import torch
from cases import NETS, assert_close, batch, descent, double, leaves, network, nonuniform, run_block, step
from cases import weighted_cross_entropy as cross_entropy
from fedforward.algorithms import DFA

RULE = DFA(lr=0.1, momentum=0.0)


@pytest.mark.parametrize("name", NETS)
def test_one_step_subtracts_the_gradient_of_the_injected_feedback(name):
    net = network(name)
    state = double(RULE.init(net, seed=1))
    b = nonuniform(batch(RULE))
    params, x, activities = leaves(state.params), b.x, []
    for i in net.hidden:
        activities.append(run_block(net, i, params, x.detach()))
        x = activities[-1]
    scores = run_block(net, net.output, params, x.detach())
    loss = cross_entropy(scores, b)
    (error,) = torch.autograd.grad(loss, scores, retain_graph=True)
    for i, a in zip(net.hidden, activities, strict=True):
        loss = loss + (a.flatten(1) * (error @ state.fixed[f"{i}.feedback"])).sum()
    truth = dict(zip(params, torch.autograd.grad(loss, list(params.values())), strict=True))
    assert_close(descent(RULE, net, state, b), truth, atol=1e-9)
    assert all(g.abs().max() > 1e-6 for g in truth.values())


@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_feedback_is_uniform_within_scale_over_root_width_and_never_sent(scale):
    state = DFA(scale=scale).init(network("mlp"), seed=1)
    assert set(state.fixed) == {"0.feedback", "1.feedback"} and not set(state.fixed) & set(state.params)
    for i, width in ((0, 24), (1, 16)):
        feedback = state.fixed[f"{i}.feedback"] * width**0.5 / scale
        assert feedback.shape == (10, width) and 0.95 < feedback.abs().max() <= 1 + 1e-6
        assert abs(feedback.mean()) < 4 / (3 * feedback.numel()) ** 0.5  # 4 standard errors
        assert abs(feedback.square().mean() - 1 / 3) < 4 * (4 / 45 / feedback.numel()) ** 0.5


def test_training_aligns_the_network_with_its_feedback():
    # The paper's claim: the weights above turn towards the feedback, and with them the update towards the gradient.
    net, rule = network("mlp-tanh"), DFA(lr=0.1, momentum=0.0)
    state, b = double(rule.init(net, seed=1)), batch(rule, 64)
    cosines = []
    for _ in range(300):
        params = leaves(state.params)
        truth = torch.autograd.grad(cross_entropy(net.forward(params, b.x), b), params["0.linear.weight"])[0]
        before = state.params["0.linear.weight"].clone()
        step(rule, net, state, b)
        moved = before - state.params["0.linear.weight"]
        cosines.append(float(torch.cosine_similarity(moved.flatten(), truth.flatten(), dim=0)))
    chance = 1 / moved.numel() ** 0.5
    assert abs(cosines[0]) < 3 * chance and min(cosines[-50:]) > 10 * chance
