"""Mirrors: their shapes, what passes through them by hand, and the blocks that have none."""

import pytest
import torch
from cases import CLASSES, NETS, SHAPE, network
from fedforward.algorithms import Network, RuleError
from fedforward.algorithms.layerwise.mirrored import mirrors
from torch import nn


def test_a_mirror_is_as_its_block_the_other_way_round():
    found = {name: [mirror.weight for mirror in mirrors(network(name))] for name in NETS}
    assert found["mlp"] == [(64, 24), (24, 16), (16, 10)]
    assert found["flat"] == [(64, 20), (20, 12), (12, 10)]
    assert found["lenet"] == [(1, 4, 5, 5), (4, 6, 5, 5), (6, 10)]
    assert found["cnn-group"] == [(1, 16, 3, 3), (16, 16, 3, 3), (16, 10)]
    assert [type(mirror.activation) for mirror in mirrors(network("lenet"))] == [nn.ReLU, nn.ReLU, nn.Identity]


def test_cells_are_repeated_and_what_is_beyond_the_edge_is_0():
    """A 3×3 kernel of ones adds up the neighbours of every cell of [1 1 2 2 / 1 1 2 2 / 3 3 4 4 / 3 3 4 4]."""
    block = nn.Sequential(nn.Conv2d(1, 1, 3, padding=1), nn.MaxPool2d(2))
    head = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    mirror = mirrors(Network(nn.Sequential(block, head), (1, 4, 4), 3))[0]
    below = mirror.run(torch.ones(1, 1, 3, 3), torch.tensor([[1.0, 2, 3, 4]])).view(4, 4)
    assert below.tolist() == [[4, 8, 10, 8], [10, 18, 21, 16], [14, 24, 27, 20], [12, 20, 22, 16]]


def test_an_average_says_the_same_of_every_cell():
    block = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.ReLU())
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 3))
    mirror = mirrors(Network(nn.Sequential(block, head), (1, 2, 2), 3))[1]
    below = mirror.run(torch.tensor([[1.0, 2, 3], [4, 5, 6]]), torch.eye(3)[[2, 0]])
    assert below.tolist() == [[3] * 4 + [6] * 4, [1] * 4 + [4] * 4]


CONV = nn.Conv2d(4, 4, 3, padding=1)
REFUSED = {  # in the place of block 1, which sees four channels of 8×8
    "an even kernel": [nn.Conv2d(4, 4, 2)],
    "groups": [nn.Conv2d(4, 4, 3, padding=1, groups=4)],
    "dilation": [nn.Conv2d(4, 4, 3, padding=2, dilation=2)],
    "an average": [CONV, nn.ReLU(), nn.AvgPool2d(2)],
    "an activation with parameters": [CONV, nn.PReLU()],
    "an activation across channels": [CONV, nn.Softmax(1)],
    "two activations": [CONV, nn.ReLU(), nn.Tanh()],
    "two pools": [CONV, nn.MaxPool2d(2), nn.MaxPool2d(2)],
    "a norm after the activation": [CONV, nn.ReLU(), nn.GroupNorm(2, 4)],
    "an average before": [nn.AdaptiveAvgPool2d(1), CONV],
    "a vector": [CONV, nn.Flatten()],
    "a linear layer of the last dimension": [nn.Linear(8, 4)],
    "nothing to learn": [nn.ReLU()],
    "an average alone": [nn.AdaptiveAvgPool2d(1)],
    "a view alone": [nn.Flatten()],
}


def with_block(layers):
    """Return a network whose block 1 is of these layers."""
    first, head = [nn.Conv2d(1, 4, 3, padding=1), nn.ReLU()], [nn.Flatten(), nn.LazyLinear(CLASSES)]
    blocks = nn.Sequential(*(nn.Sequential(*block) for block in (first, layers, head)))
    blocks(torch.zeros(1, *SHAPE))  # how wide a lazy layer is
    return Network(blocks, SHAPE, CLASSES)


@pytest.mark.parametrize("case", REFUSED)
def test_other_blocks_have_no_mirror(case):
    assert len(mirrors(with_block([CONV]))) == 3
    with pytest.raises(RuleError, match=r"block 1 is .*: use --model mlp, lenet or cnn, or mono-forward"):
        mirrors(with_block(REFUSED[case]))
