"""Copies of blocks for other inputs."""

import pytest
import torch
from cases import CLASSES, SHAPE, equal
from fedforward.algorithms import Network, RuleError
from fedforward.algorithms.layerwise.aug_local import AugLocal
from torch import nn


class Odd(nn.Module):
    """A layer with weights that nobody knows how to draw again."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(6, 1, 1))

    def forward(self, x):
        return x * self.scale


def test_a_block_that_cannot_be_rebuilt_is_named():
    def of(*layers):
        convolutions = (nn.Sequential(nn.Conv2d(i, o, 3, padding=1), nn.ReLU()) for i, o in ((1, 5), (5, 6)))
        head = nn.Sequential(nn.Flatten(), nn.Linear(6 * 64, CLASSES))
        return Network(lambda: nn.Sequential(*convolutions, nn.Sequential(*layers), head), SHAPE, CLASSES)

    net, rule = of(nn.Conv2d(6, 6, 1), Odd(), nn.ReLU()), AugLocal(aux_depth=1)
    with pytest.raises(RuleError, match=r"block 2 \(conv2d-odd-relu\) for inputs of shape \(5, 8, 8\).*Odd draws no"):
        rule.check(net)
    with pytest.raises(RuleError, match=r"copies block 2 \(groupnorm-conv2d\) .*divisible"):
        rule.check(of(nn.GroupNorm(6, 6), nn.Conv2d(6, 6, 1)))
    Odd.rebuilt = lambda self, channels: Odd()

    def fresh():
        convolutions = (nn.Sequential(nn.Conv2d(i, o, 3, padding=1), nn.ReLU()) for i, o in ((1, 5), (5, 6)))
        head = nn.Sequential(nn.Flatten(), nn.Linear(6 * 64, CLASSES))
        return nn.Sequential(*convolutions, nn.Sequential(nn.Conv2d(6, 6, 1), Odd(), nn.ReLU()), head)

    try:
        net = Network(fresh, SHAPE, CLASSES)
        with pytest.raises(RuleError, match="Odd draws no"):
            rule.check(net)
        Odd.reset_parameters = lambda self: nn.init.uniform_(self.scale)
        first, again = (rule.init(net, seed=1).params for _ in range(2))
        assert equal(first, again) and all(p.isfinite().all() for p in first.values())
    finally:
        del Odd.rebuilt, Odd.reset_parameters
