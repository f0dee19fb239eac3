"""Backpropagation is the gradient of the cross-entropy."""

import pytest
import torch
from cases import NETS, assert_close, batch, descent, double, leaves, network, nonuniform, run_block
from cases import weighted_cross_entropy as cross_entropy
from fedforward.algorithms import Backprop

RULE = Backprop()


@pytest.mark.parametrize("name", NETS)
def test_one_step_subtracts_the_gradient_of_the_weighted_cross_entropy(name):
    net = network(name)
    state = double(RULE.init(net, seed=1))
    b = nonuniform(batch(RULE))
    x, params = b.x, leaves(state.params)
    for i in range(len(net.blocks)):
        x = run_block(net, i, params, x)
    truth = torch.autograd.grad(cross_entropy(x, b), list(params.values()))
    got = descent(RULE, net, state, b)
    assert_close(got, dict(zip(params, truth, strict=True)), atol=1e-9)
    assert all(g.abs().max() > 1e-6 for g in truth)
