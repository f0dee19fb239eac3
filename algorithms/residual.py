"""A residual block, the piece of a ResNet that cannot be written as a Sequential of layers.

K. He, X. Zhang, S. Ren, J. Sun, "Deep Residual Learning for Image Recognition", CVPR 2016, arXiv 1512.03385.

    a = f(norm(w_2 * f(norm(w_1 * x))) + s(x))      s(x) = x, or norm(w_s * x) where stride or width change
"""

from __future__ import annotations

import math

from torch import Tensor, nn


class Residual(nn.Module):
    """Two 3×3 convolutions around which the input passes.

    Departs from the paper: groups of channels are normalised, of each sample by itself; not channels over a batch.

    Args:
        inputs: channels of the input.
        channels: channels of the output.
        stride: of the first convolution, and of the shortcut.
        activation: f.
    """

    def __init__(self, inputs: int, channels: int, stride: int = 1, activation: type[nn.Module] = nn.ReLU) -> None:
        super().__init__()
        self.channels, self.stride, self.makes = channels, stride, activation
        self.conv_1 = nn.Conv2d(inputs, channels, 3, stride, padding=1, bias=False)
        self.norm_1 = group_norm(channels)
        self.conv_2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm_2 = group_norm(channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != channels:
            # What a strided 1×1 convolution computes. oneDNN writes past its memory in the backward pass of that one,
            # where channels come last and are fewer than eight (PyTorch 2.13).
            thinned = nn.AvgPool2d(1, stride)
            self.shortcut = nn.Sequential(thinned, nn.Conv2d(inputs, channels, 1, bias=False), group_norm(channels))
        # No backward pass reads what a ReLU overwrites here: a norm's output, or a sum.
        self.activation = nn.ReLU(inplace=True) if activation is nn.ReLU else activation()

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output (B, channels, ...)."""
        a = self.activation(self.norm_1(self.conv_1(x)))
        a = self.norm_2(self.conv_2(a))
        return self.activation(a + self.shortcut(x))

    def rebuilt(self, inputs: int) -> Residual:
        """Return a new block like this one for inputs of so many channels."""
        return Residual(inputs, self.channels, self.stride, self.makes)


class GroupNorm(nn.GroupNorm):
    """A group norm that costs the bytes that were planned for it, of a single sample too.

    Of one sample with its channels last, PyTorch's norm of a tensor without memory returns strides that the real one
    does not (2.13), and what follows would copy other tensors.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised map, like x."""
        a = super().forward(x)
        return a.contiguous() if len(a) == 1 else a


def group_norm(channels: int) -> GroupNorm:
    """Return a norm of eight groups, or of the power of two below that leaves each two channels or more, or of one."""
    return GroupNorm(math.gcd(16, channels) // 2 or 1, channels)
