"""Pooling as a linear map: what goes up is PyTorch's, and what goes down is its transposed."""

import pytest
import torch
from fedforward.algorithms.equilibrium.pooling import Pooling
from torch import nn

ROWS = {  # layers and the shape of a sample
    "flatten": ([nn.Flatten()], (2, 3, 4)),
    "max": ([nn.MaxPool2d(2)], (2, 5, 4)),
    "overlapping": ([nn.MaxPool2d(3, stride=2, padding=1)], (2, 7, 6)),
    "dilated": ([nn.MaxPool2d(2, stride=1, dilation=2, ceil_mode=True)], (2, 7, 6)),
    "of a row": ([nn.MaxPool1d(2)], (2, 6)),
    "of a space": ([nn.MaxPool3d(2)], (2, 4, 2, 5)),
    "adaptive": ([nn.AdaptiveMaxPool2d((2, 1)), nn.Flatten()], (2, 5, 4)),
    "mean": ([nn.AvgPool2d(2)], (2, 4, 6)),
    "global mean": ([nn.AdaptiveAvgPool2d(1), nn.Flatten()], (2, 4, 6)),
    "one after the other": ([nn.MaxPool2d(2), nn.AvgPool2d(2), nn.MaxPool2d((1, 2))], (2, 8, 9)),
}


def numbers(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("marked", [torch.contiguous_format, torch.channels_last])
def test_it_goes_up_as_pytorch_says_and_down_as_autograd_says(row, marked):
    layers, shape = ROWS[row]
    x = numbers(5, *shape)
    if x.dim() == 4:
        x = x.contiguous(memory_format=marked)
    pooling, leaf = Pooling(layers), x.clone().requires_grad_()
    a = nn.Sequential(*layers)(leaf)
    assert torch.equal(pooling.up(x), a) and torch.equal(pooling.up(x), a), "now with its winners held"
    s = numbers(*a.shape, seed=1)
    truth = torch.autograd.grad(a, leaf, s)[0]
    torch.testing.assert_close(pooling.down(s), truth, rtol=0, atol=1e-12)
    assert truth.abs().max() > 0


@pytest.mark.parametrize("row", ROWS)
def test_once_it_has_run_it_is_linear_and_down_is_transposed(row):
    layers, shape = ROWS[row]
    pooling, x, y = Pooling(layers), numbers(5, *shape), numbers(5, *shape, seed=1)
    a = pooling.up(x)
    torch.testing.assert_close(pooling.up(x - 3 * y), a - 3 * pooling.up(y), rtol=0, atol=1e-12)
    s = numbers(*a.shape, seed=2)
    torch.testing.assert_close((pooling.down(s) * y).sum(), (s * pooling.up(y)).sum(), rtol=0, atol=1e-9)
