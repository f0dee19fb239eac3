"""Convolutions and pooling as the matrices that they are, by loops over places and windows."""

import torch
from torch import nn


def convolution(layer, weight, shape):
    """Return the matrix of a convolution of samples of a shape, by loops over places, and the shape that it makes."""
    (c, h, w), (o, _, kh, kw) = shape, weight.shape
    high = (h + 2 * layer.padding[0] - kh) // layer.stride[0] + 1
    wide = (w + 2 * layer.padding[1] - kw) // layer.stride[1] + 1
    rows, columns, read = [], [], []
    for out in range(o * high * wide):
        to, (y, x) = out // (high * wide), divmod(out % (high * wide), wide)
        for at in range(c * kh * kw):
            of, (ky, kx) = at // (kh * kw), divmod(at % (kh * kw), kw)
            v, u = y * layer.stride[0] + ky - layer.padding[0], x * layer.stride[1] + kx - layer.padding[1]
            if 0 <= v < h and 0 <= u < w:
                rows.append(out)
                columns.append((of * h + v) * w + u)
                read.append(to * c * kh * kw + at)
    matrix = weight.new_zeros(o * high * wide, c * h * w)
    return matrix.index_put((torch.tensor(rows), torch.tensor(columns)), weight.flatten()[read]), (o, high, wide)


def pooling(layer, z, shape):
    """Return the matrix of pooling the vector z of a shape, by loops over windows, and the shape that it makes."""
    c, h, w = shape
    size = (h, w) if isinstance(layer, nn.AdaptiveAvgPool2d) else layer.kernel_size
    kh, kw = size if isinstance(size, tuple) else (size, size)
    high, wide = h // kh, w // kw
    matrix = z.new_zeros(c * high * wide, c * h * w)
    for out in range(len(matrix)):
        of, (y, x) = out // (high * wide), divmod(out % (high * wide), wide)
        window = [(of * h + y * kh + v) * w + x * kw + u for v in range(kh) for u in range(kw)]
        if isinstance(layer, nn.MaxPool2d):
            matrix[out, window[int(z[window].argmax())]] = 1
        else:
            matrix[out, window] = 1 / (kh * kw)
    return matrix, (c, high, wide)


def as_matrices(net, params, x):
    """Return M_l, c_l, M_l with B_l in place of W_l, and f of each block, M s + c its map, as one sample passes."""
    ups, biases, backs, bends, s, shape = [], [], [], [], x.flatten(), net.shape
    for i, block in enumerate(net.blocks):
        up = back = torch.eye(len(s), dtype=s.dtype)
        bias, f = torch.zeros_like(s), lambda u: u
        for name, layer in block.named_children():
            if isinstance(layer, (nn.ReLU, nn.Tanh)):
                f = {nn.ReLU: torch.relu, nn.Tanh: torch.tanh}[type(layer)]
                continue
            if isinstance(layer, nn.Flatten):
                continue
            w = params.get(f"{i}.{name}.weight")
            b = params.get(f"{i}.{name}.bias", torch.zeros(1, dtype=s.dtype))
            if isinstance(layer, nn.Linear):
                step, returning, added, shape = w, params.get(f"{i}.back", w), b, (len(w),)
            elif isinstance(layer, nn.Conv2d):
                returning, _ = convolution(layer, params.get(f"{i}.back", w), shape)
                step, shape = convolution(layer, w, shape)
                added = b.expand(len(w)).repeat_interleave(shape[1] * shape[2])
            else:
                step, shape = pooling(layer, up @ s + bias, shape)
                returning, added = step, 0
            up, back, bias = step @ up, returning @ back, step @ bias + added
        for row, made in ((ups, up), (biases, bias), (backs, back), (bends, f)):
            row.append(made)
        s = f(up @ s + bias)
    return ups, biases, backs, bends
