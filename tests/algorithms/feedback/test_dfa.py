"""DFA is the gradient of a pseudo-loss in which random projections of the error stand for the true one."""

import pytest
import torch
from cases import NETS, assert_close, batch, descent, double, leaves, network, nonuniform, run_block, step
from cases import weighted_cross_entropy as cross_entropy
from fedforward.algorithms import DFA, DRTP, PEPITA, Batch, RuleError, TargetProjection
from fedforward.algorithms.feedback.dfa import _ternary

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


SPREAD = {"uniform": 3**-0.5, "normal": 10**-0.5, "sign": 1.0, "ternary": (2 / 3) ** 0.5}  # of B √n_l / β, C = 10


@pytest.mark.parametrize("feedback", SPREAD)
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_feedback_has_the_size_that_the_docstring_states_and_is_never_sent(feedback, scale):
    state = DFA(feedback=feedback, scale=scale).init(network("mlp"), seed=1)
    assert set(state.fixed) == {"0.feedback", "1.feedback"} and not set(state.fixed) & set(state.params)
    for i, width in ((0, 24), (1, 16)):
        drawn = state.fixed[f"{i}.feedback"] * width**0.5 / scale
        assert drawn.shape == (10, width)
        assert abs(drawn.mean()) < 4 * SPREAD[feedback] / drawn.numel() ** 0.5  # 4 standard errors
        squares = drawn.square()
        assert abs(squares.mean() - SPREAD[feedback] ** 2) <= 4 * squares.std() / drawn.numel() ** 0.5 + 1e-6
        values = set(drawn.mul(1e4).round().flatten().tolist())
        assert {"sign": 2, "ternary": 3}.get(feedback, len(values)) == len(values)
        assert drawn.abs().max() <= 1 + 1e-6 or feedback == "normal"


def test_a_ternary_error_has_the_signs_of_what_is_large_and_the_length_of_all():
    error = torch.tensor([[0.5, -0.1, -0.4], [0.0, 0.0, 0.0], [-3.0, 1.0, 2.0]], dtype=torch.float64)
    wanted = torch.tensor([[1.0, 0.0, -1.0], [0.0, 0.0, 0.0], [-1.0, 0.0, 1.0]], dtype=torch.float64)
    wanted *= error.norm(dim=1, keepdim=True) / 2**0.5
    torch.testing.assert_close(_ternary(error, 0.5), wanted, rtol=0, atol=1e-12)


def test_noise_is_a_part_of_the_projection_and_changes_with_the_place():
    rule, net = DFA(noise=0.25), network("mlp")
    state = double(rule.init(net, seed=1))
    error = torch.randn(400, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    draws = [batch(rule, 400, step=step).draws for step in (0, 1)]
    clean = error @ state.fixed["0.feedback"]
    noisy = [rule._project(error, net, state, Batch(None, None, None, each), 0) - clean for each in draws]
    part = noisy[0].square().mean(1).sqrt() / clean.square().mean(1).sqrt()
    assert abs(part.mean() - 0.25) < 4 * part.std() / 400**0.5 + 0.25 / (4 * 24)  # the mean of a root of 24 squares
    assert abs((noisy[0] * noisy[1]).sum() / (noisy[0].norm() * noisy[1].norm())) < 4 / (400 * 24) ** 0.5


def test_impossible_settings_are_refused():
    with pytest.raises(RuleError, match="unknown feedback 'gaussian': use one of uniform, normal, sign, ternary"):
        DFA(feedback="gaussian")
    for wrong in ({"ternarise": 1.0}, {"noise": -0.1}):
        with pytest.raises(RuleError, match=r"0 ≤ rule\.ternarise < 1 and rule\.noise ≥ 0"):
            DFA(**wrong)


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


@pytest.mark.parametrize("rule", [DFA(scale=0.0), DRTP(scale=-1.0), TargetProjection(scale=0.0), PEPITA(scale=0.0)])
def test_feedback_of_no_size_is_refused(rule):
    with pytest.raises(RuleError, match=r"rule\.scale above 0"):
        rule.init(network("mlp"), 0)
