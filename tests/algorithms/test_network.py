"""A network's blocks: how layers are grouped, what is refused, and that the closed form is autograd's."""

import pytest
import torch
from cases import CLASSES, SHAPE, assert_close, leaves, run_block
from fedforward.algorithms import Network, NetworkError
from fedforward.algorithms.network import Dense
from fedforward.algorithms.optimizer import made
from torch import nn


def grouped(*layers, shape=SHAPE, classes=CLASSES):
    net = Network(nn.Sequential(*layers), shape, classes)
    return [[name for name, _ in block.named_children()] for block in net.blocks]


def test_a_flat_sequential_is_cut_before_every_weighted_layer():
    layers = (nn.Flatten(), nn.Linear(64, 20), nn.ReLU(), nn.Linear(20, 12), nn.LayerNorm(12), nn.Tanh())
    assert grouped(*layers, nn.Linear(12, 10)) == [
        ["flatten", "linear", "relu"],
        ["linear", "layernorm", "tanh"],
        ["linear"],
    ]


def test_reshaping_belongs_to_the_block_that_wants_the_shape():
    layers = (nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.MaxPool2d(2))
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))
    assert grouped(*layers, *head) == [
        ["conv2d", "groupnorm", "maxpool2d", "relu"],
        ["adaptiveavgpool2d", "flatten", "linear"],
    ]
    assert grouped(*layers, nn.Conv2d(4, 10, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()) == [
        ["conv2d", "groupnorm", "maxpool2d", "relu"],
        ["conv2d", "adaptiveavgpool2d", "flatten"],
    ]


def test_nested_sequentials_are_the_blocks():
    first = nn.Sequential(nn.Flatten(), nn.Linear(64, 20), nn.ReLU(), nn.Linear(20, 20), nn.ReLU())
    net = Network(nn.Sequential(first, nn.Sequential(nn.Linear(20, 10))), SHAPE, CLASSES)
    assert list(net.init(0)) == [
        "0.linear.weight", "0.linear.bias", "0.linear_2.weight", "0.linear_2.bias", "1.linear.weight", "1.linear.bias",
    ]  # fmt: skip
    assert net.sizes == ((20,), (10,)) and net.hidden == range(1) and net.output == 1


@pytest.mark.parametrize(
    "layer, remedy",
    [
        (nn.BatchNorm1d(20), "BatchNorm1d mixes samples .* use nn.GroupNorm"),
        (nn.Dropout(0.1), "Dropout draws from the global generator, .* take it out"),
        (nn.Sequential(nn.AlphaDropout()), "AlphaDropout draws .* take it out"),
        (nn.InstanceNorm1d(20, track_running_stats=True), "InstanceNorm1d keeps state .* without buffers"),
    ],
)
def test_layers_that_would_break_a_promise_are_refused_with_the_remedy(layer, remedy):
    with pytest.raises(NetworkError, match=remedy):
        Network(nn.Sequential(nn.Flatten(), nn.Linear(64, 20), layer, nn.Linear(20, 10)), SHAPE, CLASSES)


def test_wrong_shapes_and_types_are_named():
    with pytest.raises(NetworkError, match=r"block 0 \(linear-relu\) cannot take inputs of shape \(1, 8, 8\)"):
        grouped(nn.Linear(64, 20), nn.ReLU(), nn.Linear(20, 10))
    with pytest.raises(NetworkError, match=r"ends in shape \(7,\), but the data has 10 classes"):
        grouped(nn.Flatten(), nn.Linear(64, 7))
    with pytest.raises(NetworkError, match=r"must be an nn\.Sequential of layers or blocks, not Linear"):
        Network(nn.Linear(64, 10), SHAPE, CLASSES)
    with pytest.raises(NetworkError, match="no parameters to train"):
        grouped(nn.Flatten(), nn.ReLU())


def test_a_linear_layer_over_the_last_of_several_dimensions_is_not_flattened():
    mixer = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Flatten(), nn.Linear(48, 10))
    net = Network(mixer, (8, 8), CLASSES)
    assert net.dense(0) is None and net.dense(1) is not None
    x = torch.rand(3, 8, 8)
    torch.testing.assert_close(net.forward(net.init(0), x), mixer(x))


def test_the_structure_costs_no_memory_and_the_global_generator_is_untouched():
    before = torch.get_rng_state()
    net = Network(lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), SHAPE, CLASSES)
    assert all(p.is_meta for block in net.blocks for p in block.parameters())
    a, b = net.init(0), net.init(1)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(a["0.linear.weight"], net.init(0)["0.linear.weight"])
    assert not torch.equal(a["0.linear.weight"], b["0.linear.weight"])


def test_a_sequential_with_weights_keeps_them_whatever_the_seed():
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 20), nn.ReLU(), nn.Linear(20, 10))
    net = Network(model, SHAPE, CLASSES)
    x = torch.rand(5, *SHAPE)
    for seed in (0, 1):
        params = net.init(seed)
        assert torch.equal(params["0.linear.weight"], model[1].weight)
        torch.testing.assert_close(net.forward(params, x), model(x))
    params["0.linear.weight"].zero_()
    assert model[1].weight.any() and net.init(0)["0.linear.weight"].any()
    assert not model[1].weight.is_meta


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh, nn.Identity])
@pytest.mark.parametrize("bias", [True, False])
def test_the_closed_form_of_a_dense_block_is_autograds(activation, bias):
    block = nn.Sequential(nn.Flatten(), nn.Linear(64, 20, bias=bias), activation())
    net = Network(nn.Sequential(block, nn.Sequential(nn.Linear(20, 10))), SHAPE, CLASSES)
    assert net.dense(0) == Dense(activation, "0.linear.weight", "0.linear.bias")
    check_pulls(net, torch.randn(7, 20).double())


@pytest.mark.parametrize(
    "layers",
    [
        [nn.Conv2d(1, 4, 3), nn.GELU(), nn.MaxPool2d(2), nn.Flatten()],
        [nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(3), nn.Flatten()],
        [nn.Flatten(), nn.Linear(64, 36), nn.ReLU(), nn.LayerNorm(36)],
        [nn.Flatten(), nn.Linear(64, 20), nn.SiLU(), nn.Linear(20, 36), nn.Tanh()],
    ],
)
def test_the_graph_of_any_other_block_is_autograds(layers):
    net = Network(nn.Sequential(nn.Sequential(*layers), nn.Sequential(nn.Linear(36, 10))), SHAPE, CLASSES)
    assert net.dense(0) is None
    check_pulls(net, torch.randn(7, 36).double())


def check_pulls(net, pulled):
    """Compare what block 0 pulls back, with and without the gradient in its input, with autograd."""
    params = {key: p.double() for key, p in net.init(0).items()}
    x = torch.randn(7, *SHAPE).double()
    own, root = leaves({key: params[key] for key in net.keys(0)}), x.clone().requires_grad_()
    truth = run_block(net, 0, own, root)
    *grads, dx = torch.autograd.grad(truth, [*own.values(), root], pulled)
    for wrt_input in (False, True):
        a, pull = net.block_vjp(0, params, x, wrt_input=wrt_input)
        torch.testing.assert_close(a, truth.detach(), rtol=0, atol=1e-12)
        assert not a.requires_grad
        got = pull(pulled.clone())
        if wrt_input:
            got, gradient = got
            torch.testing.assert_close(gradient, dx, rtol=0, atol=1e-12)
        assert_close(multiplied(got), dict(zip(own, grads, strict=True)), atol=1e-12)


def multiplied(grads):
    """Return gradients with their products multiplied out."""
    return {key: made(grad) for key, grad in grads.items()}


def test_a_block_without_parameters_passes_the_gradient_on():
    blocks = (nn.Sequential(nn.Tanh()), nn.Sequential(nn.Flatten()), nn.Sequential(nn.Linear(64, 10)))
    net = Network(nn.Sequential(*blocks), SHAPE, CLASSES)
    params, x = net.init(0), torch.randn(7, *SHAPE)
    pulled = torch.randn(7, *SHAPE)
    assert net.block_vjp(0, params, x)[1](pulled) == {}
    grads, gradient = net.block_vjp(0, params, x, wrt_input=True)[1](pulled)
    assert grads == {}
    torch.testing.assert_close(gradient, pulled * (1 - x.tanh() ** 2))


def test_an_open_relu_passes_the_gradient_unchanged_and_no_other_activation_does():
    net = Network(nn.Sequential(nn.Flatten(), nn.Linear(64, 20), nn.ReLU(), nn.Linear(20, 10)), SHAPE, CLASSES)
    params, x, pulled = net.init(0), torch.rand(7, *SHAPE), torch.randn(7, 20)
    _, pull = net.block_vjp(0, params, x, open_relu=True)
    grads = multiplied(pull(pulled))
    torch.testing.assert_close(grads["0.linear.weight"], pulled.T @ x.flatten(1))
    torch.testing.assert_close(grads["0.linear.bias"], pulled.sum(0))
    net = Network(nn.Sequential(nn.Flatten(), nn.Linear(64, 20), nn.Tanh(), nn.Linear(20, 10)), SHAPE, CLASSES)
    pulls = [net.block_vjp(0, params, x, open_relu=flag)[1] for flag in (False, True)]
    gated, opened = (multiplied(pull(pulled.clone())) for pull in pulls)
    torch.testing.assert_close(opened["0.linear.weight"], gated["0.linear.weight"])


def test_the_closed_form_keeps_no_graph_and_any_other_block_only_its_own():
    conv = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU())
    net = Network(nn.Sequential(conv, nn.Sequential(nn.Flatten(), nn.Linear(144, 10))), SHAPE, CLASSES)
    params, x = net.init(0), torch.rand(2, *SHAPE, requires_grad=True)
    own = {key: params[key] for key in net.keys(0)}
    _, pull = net.block_vjp(0, params, x)
    grads = pull(torch.ones(2, 4, 6, 6))
    assert grads.keys() == own.keys() and x.grad is None


@pytest.mark.parametrize("name", ["relu", "tanh"])
def test_a_block_never_changes_its_input(name):
    act = {"relu": nn.ReLU(inplace=True), "tanh": nn.Tanh()}[name]
    net = Network(nn.Sequential(nn.Flatten(), nn.Linear(64, 20), act, nn.Linear(20, 10), act), SHAPE, CLASSES)
    params, x = net.init(0), torch.randn(3, *SHAPE)
    before, a = x.clone(), net.block(0, params, x)
    kept = a.clone()
    net.block(1, params, a)
    assert torch.equal(x, before) and torch.equal(a, kept)
