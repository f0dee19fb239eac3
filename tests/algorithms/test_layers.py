"""A block's layers as functions: what the modules compute, with pooling first and channels last."""

import pickle

import pytest
import torch
from cases import CLASSES
from fedforward.algorithms import Backprop, Batch, MonoForward, Network
from fedforward.algorithms.layers import channels_last
from fedforward.algorithms.models import lenet
from torch import nn

SHAPE = (3, 9, 9)
LAYERS = {
    "pooled": [nn.Conv2d(3, 4, 3, stride=2, padding=2), nn.ReLU(), nn.MaxPool2d(2, ceil_mode=True, padding=1)],
    "circular": [nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), nn.ReLU(inplace=True), nn.MaxPool2d(3)],
    "grouped": [nn.Conv2d(3, 6, 3, groups=3, bias=False), nn.GroupNorm(2, 6), nn.ReLU(), nn.MaxPool2d(2)],
    "smooth": [nn.Conv2d(3, 4, 3), nn.Tanh(), nn.MaxPool2d(2)],
    "dilated": [nn.Conv2d(3, 4, 3, dilation=2), nn.ReLU(), nn.AdaptiveMaxPool2d(2)],
    "nested": [nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2)), nn.Flatten(2)],
}


def model(name):
    torch.manual_seed(0)
    features = nn.Sequential(*LAYERS[name], nn.Flatten())
    width = features(torch.zeros(1, *SHAPE)).shape[1]
    return nn.Sequential(features, nn.Sequential(nn.Linear(width, CLASSES)))


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_a_network_is_the_model_it_was_made_of(name, fast):
    user, x = model(name), torch.randn(5, *SHAPE)
    net = Network(user, SHAPE, CLASSES)
    params = {key: p.requires_grad_() for key, p in net.init(0).items()}
    with torch.backends.mkldnn.flags(enabled=fast):
        scores, wanted = net.forward(params, x), user(x)
        got, truth = (
            torch.autograd.grad(s.square().sum(), list(p))
            for s, p in ((scores, params.values()), (wanted, user.parameters()))
        )
    atol = 1e-4 if fast else 0  # pooling first changes no bit; channels last, only how sums are rounded
    torch.testing.assert_close(scores, wanted, rtol=0, atol=atol)
    for g, t in zip(got, truth, strict=True):
        torch.testing.assert_close(g, t, rtol=0, atol=atol)


def test_max_pooling_goes_before_the_relu_and_keys_stay():
    net = Network(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 10)), SHAPE, 10
    )
    assert [name for name, _ in net.blocks[0].named_children()] == ["conv2d", "maxpool2d", "relu"]
    assert list(net.init(0)) == ["0.conv2d.weight", "0.conv2d.bias", "1.linear.weight", "1.linear.bias"]


def test_ties_and_dead_windows_pass_the_same_gradient():
    z = torch.tensor([[-1.0, 2.0, 2.0, 0.0], [-3.0, 2.0, 1.0, 0.0]])[None, None].requires_grad_()
    pulled = torch.tensor([[[[1.0, 5.0]]]])
    for window in (z, z - 10, torch.zeros_like(z).requires_grad_()):
        first, last = (nn.functional.max_pool2d(window, 2).relu(), nn.functional.max_pool2d(window.relu(), 2))
        assert torch.equal(first, last)
        grads = [torch.autograd.grad(a, window, pulled, retain_graph=True)[0] for a in (first, last)]
        assert torch.equal(*grads)


@pytest.mark.parametrize("channels", [1, 3])
def test_channels_last_marks_a_convolution_and_copies_no_image(channels):
    x, w = torch.randn(2, channels, 5, 5), torch.randn(4, channels, 3, 3)
    same, weight = channels_last(x, w)
    assert torch.equal(same, x) and torch.equal(weight, w) and same.data_ptr() == x.data_ptr()
    out = torch.conv2d(same, weight)
    assert out.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(out, torch.conv2d(x, w))
    assert channels_last(out, torch.randn(3, 4, 3, 3))[0] is out


@pytest.mark.parametrize("rule", [Backprop(), MonoForward()])
def test_weights_stay_contiguous_as_they_are_exchanged_and_hashed(rule):
    net = Network(lambda: lenet(SHAPE, CLASSES, channels=(4, 6)), SHAPE, CLASSES)
    state = rule.init(net, 0)
    with torch.no_grad():
        rule.step(net, state, Batch(torch.randn(4, *SHAPE), torch.arange(4), torch.ones(4)), 0.1)
    assert all(p.is_contiguous() for p in state.params.values())


def test_a_layer_that_is_there_twice_has_one_set_of_weights():
    layer = nn.Linear(6, 6)
    user = nn.Sequential(nn.Sequential(layer, nn.Tanh(), layer), nn.Sequential(nn.Linear(6, 3)))
    net, x = Network(user, (6,), 3), torch.randn(4, 6)
    assert net.keys(0) == ["0.linear.weight", "0.linear.bias"]
    torch.testing.assert_close(net.forward(net.init(0), x), user(x))


def test_a_layer_that_changes_its_weights_before_it_runs_is_asked_as_a_module():
    layer = nn.Linear(6, 6)
    layer.register_forward_hook(lambda module, args, out: out * 2)
    user = nn.Sequential(nn.Sequential(nn.Tanh(), layer), nn.Sequential(nn.Linear(6, 3)))
    net, x = Network(user, (6,), 3), torch.randn(4, 6)
    torch.testing.assert_close(net.forward(net.init(0), x), user(x))


def test_a_relu_overwrites_no_input_and_nothing_that_a_backward_pass_reads():
    user = nn.Sequential(
        nn.Sequential(nn.ReLU(inplace=True), nn.Linear(6, 6), nn.Sigmoid(), nn.ReLU(), nn.Linear(6, 3))
    )
    net, x = Network(user, (6,), 3), torch.randn(4, 6)
    kept = x.clone()
    grads, dx = net.block_vjp(0, net.init(0), x, wrt_input=True)[1](torch.ones(4, 3))
    assert torch.equal(x, kept) and dx.shape == x.shape and len(grads) == 4


def test_the_functions_of_a_block_can_be_sent_to_another_process():
    net = Network(lambda: lenet((1, 8, 8), CLASSES, channels=(4, 6)), (1, 8, 8), CLASSES)
    params, x = net.init(0), torch.randn(2, 1, 8, 8)
    for layers in pickle.loads(pickle.dumps(net._layers)):
        for layer in layers:
            x = layer(params, x)
    assert x.shape == (2, CLASSES)
