"""What InfoPro draws and how its losses are weighted from module to module."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from cases import CLASSES, assert_close, batch, descent, double, network
from fedforward.algorithms import Network
from fedforward.algorithms.layerwise.infopro import InfoPro, decoder, head, shades
from fedforward.algorithms.models import mlp
from torch import nn

RULE = InfoPro(momentum=0.0)


@pytest.mark.parametrize("channels, wider, stride", [(16, 32, 2), (32, 64, 2), (64, 64, 1), (48, 64, 2), (256, 256, 1)])
def test_the_classifier_has_the_papers_widths(channels, wider, stride):
    made = head((channels, 8, 8), CLASSES)
    assert (made[0].out_channels, made[0].stride) == (wider, (stride, stride))
    assert [layer.out_features for layer in made if isinstance(layer, nn.Linear)] == [128, CLASSES]
    assert made(torch.rand(2, channels, 8, 8)).shape == (2, CLASSES)


def test_a_decoder_draws_inputs_of_any_shape():
    for shape, inputs in (
        ((6, 4, 4), (3, 9, 7)),
        ((6, 5), (2, 20)),
        ((6,), (3, 8, 8)),
        ((6, 4, 4), (30,)),
        ((6,), (5,)),
    ):
        assert decoder(shape, inputs)(torch.rand(2, *shape)).shape == (2, torch.Size(inputs).numel())


def test_standardised_inputs_are_drawn_in_the_same_shades():
    x = torch.rand(5, 1, 8, 8, dtype=torch.float64)
    wanted = shades(x)
    assert (wanted.amin(1) == 0).all() and (wanted.amax(1) == 1).all()
    torch.testing.assert_close(shades(x / 0.31 - 0.42), wanted, rtol=0, atol=1e-12)
    assert not shades(torch.full((2, 3), 7.0)).any()


def test_weights_of_the_losses_go_from_the_first_module_to_the_last_in_a_line():
    # Of every module's decoder the gradient is λ_1 times what it is with λ_1 = 1, and of its classifier λ_2 times.
    net = Network(partial(mlp, (1, 8, 8), CLASSES, hidden=(12,) * 5), (1, 8, 8), CLASSES)
    rule, even = (replace(RULE, ixx_1=a, ixy_1=b, ixx_2=c, ixy_2=d) for a, b, c, d in ((4, 0, 1, 3), (1, 1, 1, 1)))
    b = batch(rule)
    ours, ones = (descent(r, net, double(r.init(net, seed=1)), b) for r in (rule, even))
    for i, (ixx, ixy) in enumerate([(4, 0), (3, 1), (2, 2), (1, 3)]):
        for part, weight in (("decoder", ixx), ("classifier", ixy)):
            own = {key: g for key, g in ours.items() if key.startswith(f"{i}.{part}.")}
            assert len(own) == 4
            assert_close(own, {key: weight * ones[key] for key in own}, atol=1e-12)


def test_without_reconstruction_it_is_greedy_learning_through_the_classifier_alone():
    net, rule = network("lenet"), replace(RULE, ixx_1=0.0, ixy_1=1.0)
    grads = descent(rule, net, double(rule.init(net, seed=1)), batch(rule))
    assert not any(g.any() for key, g in grads.items() if ".decoder." in key)
    assert all(g.any() for key, g in grads.items() if ".decoder." not in key)
