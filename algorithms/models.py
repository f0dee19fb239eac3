"""The ready-made networks: each a Sequential of blocks, without normalisation or with GroupNorm.

A model is a function (shape, classes, **options) -> nn.Sequential. A user's own is given as `module:object`.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from .blocks import NetworkError
from .residual import Residual, group_norm

ACTIVATIONS = {
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "elu": nn.ELU,
    "hardswish": nn.Hardswish,
}


def mlp(
    shape: Sequence[int], classes: int, *, hidden: Sequence[int] = (128, 128), activation: str = "relu"
) -> nn.Sequential:
    """Dense layers of the given widths, then a linear output."""
    act = _activation(activation)
    _check_widths("hidden", hidden)
    width, blocks = 1, []
    for size in shape:
        width *= size
    for size in hidden:
        blocks.append(nn.Sequential(nn.Flatten(), nn.Linear(width, size), act()))
        width = size
    return nn.Sequential(*blocks, nn.Sequential(nn.Flatten(), nn.Linear(width, classes)))


def lenet(
    shape: Sequence[int], classes: int, *, channels: Sequence[int] = (16, 64), activation: str = "relu"
) -> nn.Sequential:
    """Two 5×5 convolutions with pooling, global average, linear output: BAFFLE's LeNet.

    26,730 parameters for 1×28×28 and 10 classes, 27,530 for 3×32×32.
    """
    return _convolutional(shape, classes, channels, kernel=5, activation=activation, norm="none")


def cnn(
    shape: Sequence[int],
    classes: int,
    *,
    channels: Sequence[int] = (32, 64, 128, 256),
    activation: str = "relu",
    norm: str = "none",
) -> nn.Sequential:
    """Four 3×3 convolution blocks with pooling while the map allows it, global average, linear output."""
    return _convolutional(shape, classes, channels, kernel=3, activation=activation, norm=norm)


def resnet(
    shape: Sequence[int],
    classes: int,
    *,
    depth: int = 14,
    channels: Sequence[int] = (16, 32, 64),
    activation: str = "relu",
) -> nn.Sequential:
    """ResNet-(6n + 2) for small images: a convolution, n residual blocks a width, global average, linear output.

    He et al., arXiv 1512.03385, with GroupNorm and projected shortcuts. Each width after the first halves the map. The
    widths need not be three: `depth` is 2 for the first and last layer, and 2 for each residual block.
    """
    _check_images(shape)
    _check_widths("channels", channels)
    if not channels:
        raise NetworkError("a resnet needs widths: use model.channels=[16, 32, 64]")
    act, width, layers = _activation(activation), channels[0], 2 * len(channels)  # of one residual block a width
    if not isinstance(depth, int) or depth < 2 + layers or (depth - 2) % layers:
        known = ", ".join(str(layers * n + 2) for n in (1, 2, 3, 5))
        raise NetworkError(f"model.depth {depth} is not that of a resnet of {len(channels)} widths: use {known}, ...")
    stem = nn.Sequential(nn.Conv2d(shape[0], width, 3, padding=1, bias=False), group_norm(width), act())
    blocks = [stem]
    for i, size in enumerate(channels):
        for j in range((depth - 2) // layers):
            blocks.append(nn.Sequential(Residual(width, size, stride=2 if i and not j else 1, activation=act)))
            width = size
    return nn.Sequential(*blocks, nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes)))


def _convolutional(
    shape: Sequence[int], classes: int, channels: Sequence[int], kernel: int, activation: str, norm: str
) -> nn.Sequential:
    _check_images(shape)
    _check_widths("channels", channels)
    if norm not in ("none", "group"):
        raise NetworkError(f"unknown norm '{norm}': use none or group")
    act, width, height = _activation(activation), shape[0], min(shape[1:])
    blocks = []
    for size in channels:
        layers: list[nn.Module] = [nn.Conv2d(width, size, kernel, padding=kernel // 2)]
        if norm == "group":
            layers.append(group_norm(size))
        layers.append(act())
        if height >= 2:
            layers.append(nn.MaxPool2d(2))
        blocks.append(nn.Sequential(*layers))
        width, height = size, max(height // 2, 1)
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes))
    return nn.Sequential(*blocks, head)


def _check_images(shape: Sequence[int]) -> None:
    if len(shape) != 3:
        raise NetworkError(f"convolutions need images (channels, height, width), the data has shape {tuple(shape)}")


def _check_widths(name: str, widths: Sequence[int]) -> None:
    if not all(isinstance(width, int) and width > 0 for width in widths):
        raise NetworkError(f"model.{name} must be whole numbers above 0, as in [128, 128], not {list(widths)}")


def _activation(name: str) -> type[nn.Module]:
    if name not in ACTIVATIONS:
        raise NetworkError(f"unknown activation '{name}': use one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


MODELS = {"mlp": mlp, "lenet": lenet, "cnn": cnn, "resnet": resnet}
