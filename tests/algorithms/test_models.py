"""The ready-made models: their parameter counts, their blocks and what they refuse."""

from itertools import pairwise

import pytest
import torch
from cases import CLASSES, SHAPE, batch, copied, descent, double
from fedforward.algorithms import MODELS, Backprop, Network, NetworkError
from fedforward.algorithms.models import ACTIVATIONS, cnn, lenet, mlp, resnet
from fedforward.client import plan as planning
from fedforward.client.memory import PeakMemory
from fedforward.client.step import residents, take_step
from torch.nn import functional


def count(build, shape, **options):
    return sum(p.numel() for p in Network(lambda: build(shape, CLASSES, **options), shape, CLASSES).init(0).values())


def test_lenet_is_baffles():
    assert count(lenet, (1, 28, 28)) == 26_730
    assert count(lenet, (3, 32, 32)) == 27_530


def test_mlp_and_cnn_have_the_parameters_of_their_layers():
    assert count(mlp, (1, 28, 28)) == 784 * 128 + 128 + 128 * 128 + 128 + 128 * 10 + 10
    assert count(mlp, (20,), hidden=()) == 20 * 10 + 10
    widths = [3, 32, 64, 128, 256]
    convolutions = sum(9 * a * b + b for a, b in pairwise(widths))
    assert count(cnn, (3, 32, 32)) == convolutions + 256 * 10 + 10
    assert count(cnn, (3, 32, 32), norm="group") == convolutions + 2 * sum(widths[1:]) + 256 * 10 + 10


def test_every_weighted_layer_is_a_block_and_pooling_stops_at_one_pixel():
    net = Network(lambda: cnn((1, 5, 9), CLASSES, channels=(4, 4, 4, 4)), (1, 5, 9), CLASSES)
    assert net.sizes == ((4, 2, 4), (4, 1, 2), (4, 1, 2), (4, 1, 2), (10,))
    assert Network(lambda: mlp((7,), CLASSES, hidden=(5, 4)), (7,), CLASSES).sizes == ((5,), (4,), (10,))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("model", MODELS)
def test_the_activation_is_the_one_asked_for(model, activation):
    modules = list(MODELS[model]((1, 8, 8), CLASSES, activation=activation).modules())
    used = {type(m) for m in modules if type(m) in ACTIVATIONS.values()}
    assert used == {ACTIVATIONS[activation]}


def test_refusals_name_the_choices():
    with pytest.raises(NetworkError, match=r"images \(channels, height, width\), the data has shape \(20,\)"):
        lenet((20,), CLASSES)
    with pytest.raises(NetworkError, match="unknown norm 'batch': use none or group"):
        cnn((1, 8, 8), CLASSES, norm="batch")
    with pytest.raises(NetworkError, match="unknown activation 'swish': use one of relu, tanh"):
        mlp((8,), CLASSES, activation="swish")


@pytest.mark.parametrize("channels", [(8, 8), (12, 3)])
def test_norms_take_any_number_of_channels_and_each_sample_by_itself(channels):
    net = Network(lambda: cnn((1, 8, 8), CLASSES, channels=channels, norm="group"), (1, 8, 8), CLASSES)
    params, x = net.init(0), torch.rand(4, 1, 8, 8)
    alone = torch.cat([net.forward(params, row[None]) for row in x])
    torch.testing.assert_close(net.forward(params, x), alone)


def test_a_resnet_is_he_et_als_with_projections():
    # The 0.27 M of ResNet-20, two shortcuts among them.
    stages = [(3, 16, 0), *[(16, 16, 0)] * 6, (16, 32, 1), *[(32, 32, 0)] * 5, (32, 64, 1), *[(64, 64, 0)] * 5]
    wanted = sum(9 * a * b + 2 * b + new * (a * b + 2 * b) for a, b, new in stages) + 64 * 10 + 10
    assert count(resnet, (3, 32, 32), depth=20) == wanted == 272_474
    net = Network(lambda: resnet((3, 32, 32), CLASSES, depth=8), (3, 32, 32), CLASSES)
    assert net.sizes == ((16, 32, 32), (16, 32, 32), (32, 16, 16), (64, 8, 8), (10,))
    depths = {depth: len(resnet((1, 8, 8), CLASSES, depth=depth)) for depth in (8, 14, 20, 32)}
    assert depths == {8: 5, 14: 8, 20: 11, 32: 17}  # a stem, (depth − 2)/2 residual blocks, the output


def test_a_depth_that_no_resnet_has_is_refused():
    for depth, channels, use in ((10, (16, 32, 64), "8, 14, 20, 32"), (2, (4,), "4, 6, 8, 12"), (8.0, (4,), "4, 6, 8")):
        with pytest.raises(NetworkError, match=rf"depth {depth} is not .* of {len(channels)} widths: use {use}"):
            resnet((1, 8, 8), CLASSES, depth=depth, channels=channels)
    with pytest.raises(NetworkError, match=r"a resnet needs widths: use model\.channels="):
        resnet((1, 8, 8), CLASSES, channels=())


@pytest.mark.parametrize("channels", [(4, 8), (5, 7), (16, 32)])
def test_a_residual_block_is_what_the_paper_writes(channels):
    net = Network(lambda: resnet(SHAPE, CLASSES, depth=10, channels=channels), SHAPE, CLASSES)
    params, x = double(Backprop().init(net, 0)).params, torch.rand(3, *net.sizes[2], dtype=torch.float64)
    groups = {8: 4, 7: 1, 32: 8}[channels[1]]
    own = {key.removeprefix("3.residual."): params[key] for key in net.keys(3)}
    assert len(own) == 9

    def norm(z, name):
        return functional.group_norm(z, groups, own[f"{name}.weight"], own[f"{name}.bias"])

    a = norm(functional.conv2d(x, own["conv_1.weight"], stride=2, padding=1), "norm_1").relu()
    a = norm(functional.conv2d(a, own["conv_2.weight"], padding=1), "norm_2")
    wanted = (a + norm(functional.conv2d(x, own["shortcut.1.weight"], stride=2), "shortcut.2")).relu()
    kept = x.clone()
    torch.testing.assert_close(net.block(3, params, x), wanted, rtol=0, atol=1e-12)
    assert torch.equal(x, kept)


@pytest.mark.parametrize("channels", [(4, 6, 8), (3, 5, 7), (8, 16, 32)])
def test_a_resnet_of_few_channels_has_the_gradient_that_it_has_in_double(channels):
    # oneDNN writes past its memory in the backward pass of a strided 1×1 convolution, which is why there is none.
    net = Network(lambda: resnet(SHAPE, CLASSES, depth=8, channels=channels), SHAPE, CLASSES)
    state, b = Backprop().init(net, 0), batch(Backprop())
    truth = descent(Backprop(), net, double(copied(state)), b)
    for _ in range(3):
        grads = descent(Backprop(), net, copied(state), b._replace(x=b.x.float(), weight=b.weight.float()))
        for key, g in truth.items():
            torch.testing.assert_close(grads[key].double(), g, rtol=0, atol=1e-4, msg=key)


@pytest.mark.parametrize("size", [1, 2, 5])
def test_a_resnet_costs_what_was_planned_with_a_single_sample_too(size, monkeypatch):
    monkeypatch.setattr(planning, "SMALL", 0)
    net = Network(lambda: resnet(SHAPE, CLASSES, depth=10, channels=(4, 8)), SHAPE, CLASSES)
    plan = planning.Planner(net).step(Backprop(), size, timeline=True)
    state, b = Backprop().init(net, 0), batch(Backprop(), size, dtype=torch.float32)
    meter = PeakMemory(residents(state, {}), timeline=True)
    take_step(Backprop(), net, state, iter([b]), 0.1, meter)
    del b
    assert plan.peak == meter.peak and list(plan.timeline) == meter.timeline
