"""The classifier of decoupled greedy learning is the paper's, and cheap at any resolution."""

import pytest
import torch
from cases import CLASSES
from fedforward.algorithms.layerwise.dgl import head
from torch import nn


@pytest.mark.parametrize("side", [1, 2, 4, 7, 8, 32])
def test_three_convolutions_of_one_position_and_three_dense_layers(side):
    made, quarter = head((16, side, side), CLASSES), -(-side // 4)
    weighted = [layer for layer in made if isinstance(layer, nn.Conv2d | nn.Linear)]
    width = 16 * min(quarter, 2) ** 2
    assert [tuple(layer.weight.shape) for layer in weighted] == [(16, 16, 1, 1)] * 3 + [
        (width, width), (width, width), (CLASSES, width)
    ]  # fmt: skip
    seen = []
    for layer in weighted:
        layer.register_forward_hook(lambda _, inputs, out: seen.append(tuple(out.shape[2:])))
    assert made(torch.rand(3, 16, side, side)).shape == (3, CLASSES)
    assert seen == [(quarter, quarter)] * 3 + [()] * 3


def test_maps_of_other_dimensions_and_vectors_have_one_too():
    assert head((8, 20), CLASSES)(torch.rand(3, 8, 20)).shape == (3, CLASSES)
    assert head((8, 6, 6, 6), CLASSES)(torch.rand(3, 8, 6, 6, 6)).shape == (3, CLASSES)
    assert [tuple(p.shape) for p in head((12,), CLASSES).parameters() if p.dim() == 2] == [(12, 12), (12, 12), (10, 12)]
