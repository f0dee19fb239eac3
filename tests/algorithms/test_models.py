"""The ready-made models: their parameter counts, their blocks and what they refuse."""

from itertools import pairwise

import pytest
import torch
from cases import CLASSES
from fedforward.algorithms import MODELS, Network, NetworkError
from fedforward.algorithms.models import ACTIVATIONS, cnn, lenet, mlp


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


def test_one_map_per_group_normalises_each_sample_by_itself():
    net = Network(lambda: cnn((1, 8, 8), CLASSES, channels=(8, 8), norm="group"), (1, 8, 8), CLASSES)
    params, x = net.init(0), torch.rand(4, 1, 8, 8)
    alone = torch.cat([net.forward(params, row[None]) for row in x])
    torch.testing.assert_close(net.forward(params, x), alone)
