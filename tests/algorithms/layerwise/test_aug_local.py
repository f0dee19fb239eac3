"""What an auxiliary net of AugLocal looks like, and what it saves on residual networks."""

import copy
from functools import partial

import pytest
import torch
from cases import CLASSES, SHAPE, network
from fedforward.algorithms import Backprop, Network
from fedforward.algorithms.layerwise.aug_local import AugLocal
from fedforward.algorithms.layerwise.auxiliary import copied, drawn, rebuilt
from fedforward.algorithms.models import resnet
from fedforward.algorithms.residual import Residual
from fedforward.client.plan import Planner
from torch import nn


def test_resnet_32_is_cut_as_in_the_paper():
    # 16 hidden blocks; with d = 2 the last three and the output are one module, with d = 4 the last five.
    net = Network(partial(resnet, (3, 32, 32), 10, depth=32), (3, 32, 32), 10)
    assert [len(m.blocks) for m in AugLocal(aux_depth=2).modules(net)] == [1] * 13 + [4]
    assert [len(m.blocks) for m in AugLocal(aux_depth=4).modules(net)] == [1] * 11 + [6]
    rule = AugLocal(aux_depth=4, pyramid=0.5)
    depths = [len(rule.sampled(i, i / 10, 16)) for i in range(11)]
    assert (
        depths == [max(1, round(4 * (1 - 0.05 * i) + 0.05 * i)) for i in range(11)] == [4, 4, 4, 4, 3, 3, 3, 3, 3, 3, 2]
    )
    assert [len(AugLocal(aux_depth=4, pyramid=p).sampled(10, 1.0, 16)) for p in (0.0, 1.0)] == [4, 1]
    assert rule.sampled(0, 0.0, 16) == [4, 8, 11, 15] and rule.sampled(10, 1.0, 16) == [12, 15]


def test_a_shallow_network_has_its_first_block_isolated_all_the_same():
    made = AugLocal(aux_depth=5).modules(network("lenet"))
    assert [list(m.blocks) for m in made] == [[0], [1, 2]]
    assert len(made[0].auxiliaries["auxiliary"].net.blocks) == 2  # of the one block there is, and a classifier


def test_copies_have_the_widths_and_the_positions_of_their_originals():
    net = Network(partial(resnet, (3, 32, 32), 10, depth=14), (3, 32, 32), 10)
    for module in AugLocal(aux_depth=3, pyramid=0.0).modules(net)[:-1]:
        i = module.blocks[0]
        auxiliary = module.auxiliaries["auxiliary"].net
        sampled = AugLocal(aux_depth=3).sampled(i, 0.0, 7)
        assert auxiliary.sizes == (*(net.sizes[k] for k in sampled), (10,))
        assert auxiliary.shape == net.sizes[i]
        for k, block in zip(sampled, auxiliary.blocks, strict=False):
            assert (block.residual.stride, block.residual.channels) == (
                net.blocks[k].residual.stride, net.blocks[k].residual.channels
            )  # fmt: skip


LAYERS = {
    "conv": lambda: nn.Conv2d(8, 12, 3, stride=2, padding=1, dilation=2, groups=4, bias=False, padding_mode="circular"),
    "depthwise": lambda: nn.Conv2d(8, 12, (3, 1), groups=2),
    "norm": lambda: nn.GroupNorm(4, 8, eps=0.1),
    "residual": lambda: Residual(8, 12, 2, nn.GELU),
    "nested": lambda: nn.Sequential(nn.Sequential(nn.Conv2d(8, 6, 1), nn.Tanh()), nn.Conv2d(6, 5, 1), nn.PReLU(5)),
    "linear": lambda: nn.Sequential(nn.Flatten(), nn.Linear(8 * 64, 7, bias=False)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_rebuilt_layer_is_like_the_one_for_other_channels(name):
    layer, x = LAYERS[name](), torch.empty(1, 16, 8, 8, device="meta")
    structure = copy.deepcopy(layer).to("meta")
    made = drawn(nn.Sequential(rebuilt(structure, x)))[0]
    assert made(torch.rand(2, 16, 8, 8)).shape[1:] == (
        layer(torch.rand(2, 8, 8, 8)).shape[1:] if name != "norm" else x.shape[1:]
    )
    same = drawn(nn.Sequential(rebuilt(structure, x[:, :8])))[0]  # for its own channels it is like itself
    same.load_state_dict(layer.state_dict())
    sample = torch.rand(2, 8, 8, 8)
    assert torch.equal(same(sample), layer(sample))


def test_a_dense_block_after_convolutions_is_copied_for_maps_and_for_vectors():
    def build():
        return nn.Sequential(
            nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.ReLU()),
            nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.ReLU()),
            nn.Sequential(nn.Flatten(), nn.Linear(4 * 9, 6), nn.ReLU()),
            nn.Sequential(nn.Linear(6, 5), nn.Tanh()),
            nn.Sequential(nn.Linear(5, CLASSES)),
        )

    net, wide = Network(build, SHAPE, CLASSES), {}
    for sampled in ((2,), (3,), (1, 3), (2, 3)):
        blocks = drawn(copied(net, sampled, net.sizes[0], "aug-local"))
        assert blocks(torch.rand(2, *net.sizes[0])).shape == (2, CLASSES)
        wide[sampled] = [p.shape[1] for p in blocks.parameters() if p.dim() == 2]
    assert wide == {(2,): [3 * 9, 6], (3,): [3, 5], (1, 3): [4, 5], (2, 3): [27, 6, 5]}


@pytest.mark.parametrize("depth, part", [(8, 1.0), (14, 0.75), (26, 0.5)])
def test_a_resnet_needs_less_than_backpropagation_and_a_deeper_one_much_less(depth, part):
    net = Network(partial(resnet, (1, 16, 16), 10, depth=depth, channels=(4, 6, 8)), (1, 16, 16), 10)
    ours, theirs = (Planner(net).step(rule, 16).peak for rule in (AugLocal(), Backprop(momentum=0.9)))
    assert ours < part * theirs


@pytest.mark.slow
@pytest.mark.parametrize("depth, part", [(14, 0.65), (32, 0.4)])
def test_the_ready_made_resnets_need_that_much_less_too(depth, part):
    net = Network(partial(resnet, (3, 32, 32), 10, depth=depth), (3, 32, 32), 10)
    ours, theirs = (Planner(net).step(rule, 64).peak for rule in (AugLocal(), Backprop(momentum=0.9)))
    assert ours < part * theirs
