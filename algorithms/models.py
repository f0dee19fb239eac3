"""The ready-made networks: each a Sequential of blocks, without normalisation or with GroupNorm.

A model is a function (shape, classes, **options) -> nn.Sequential. A user's own is given as `module:object`.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from .blocks import NetworkError

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


def _convolutional(
    shape: Sequence[int], classes: int, channels: Sequence[int], kernel: int, activation: str, norm: str
) -> nn.Sequential:
    if len(shape) != 3:
        raise NetworkError(f"convolutions need images (channels, height, width), the data has shape {tuple(shape)}")
    _check_widths("channels", channels)
    if norm not in ("none", "group"):
        raise NetworkError(f"unknown norm '{norm}': use none or group")
    act, width, height = _activation(activation), shape[0], min(shape[1:])
    blocks = []
    for size in channels:
        layers: list[nn.Module] = [nn.Conv2d(width, size, kernel, padding=kernel // 2)]
        if norm == "group":
            layers.append(nn.GroupNorm(min(8, size), size))
        layers.append(act())
        if height >= 2:
            layers.append(nn.MaxPool2d(2))
        blocks.append(nn.Sequential(*layers))
        width, height = size, max(height // 2, 1)
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes))
    return nn.Sequential(*blocks, head)


def _check_widths(name: str, widths: Sequence[int]) -> None:
    if not all(isinstance(width, int) and width > 0 for width in widths):
        raise NetworkError(f"model.{name} must be whole numbers above 0, as in [128, 128], not {list(widths)}")


def _activation(name: str) -> type[nn.Module]:
    if name not in ACTIVATIONS:
        raise NetworkError(f"unknown activation '{name}': use one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


MODELS = {"mlp": mlp, "lenet": lenet, "cnn": cnn}
