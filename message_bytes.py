"""What messages weigh, counted without making them: payload as Flower counts it, and bytes as Flower serialises them.

A size depends on names, types and shapes alone, so it is found once for each layout.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from io import BytesIO
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from torch import Tensor

from .protocol import FIT, TRAIN_METRICS, LiveArray, Trained, live, train_config, train_reply
from .scalar_wire import ANSWER_BYTES, NEWS_BYTES, round_bytes

_NOTHING = dict.fromkeys(TRAIN_METRICS, 0) | {"fit": [0] * len(FIT)}
_METRICS_BYTES = sum(8 * (len(FIT) if name == "fit" else 1) + len(name) for name in TRAIN_METRICS)


def reply_bytes(reply: Message) -> tuple[int, int]:
    """Return (payload bytes, wire bytes) of a reply's content."""
    answer = live(reply)
    if not answer:
        return payload_bytes(reply.content), wire_bytes(reply.content)
    if answer.scalars is not None:
        return _scalar_reply_bytes(len(answer.scalars))
    return _model_reply_bytes(tuple((key, tuple(p.shape)) for key, p in answer.params.items()))


@lru_cache(maxsize=4096)
def _scalar_reply_bytes(scalars: int) -> tuple[int, int]:
    content = train_reply(Trained({}, torch.zeros(scalars), _NOTHING))
    return payload_bytes(content), wire_bytes(content)


@lru_cache(maxsize=64)
def _model_reply_bytes(layout: tuple[tuple[str, tuple[int, ...]], ...]) -> tuple[int, int]:
    zeros = {key: torch.zeros(()).expand(shape) for key, shape in layout}
    content = train_reply(Trained(zeros, None, _NOTHING))
    return payload_bytes(content), wire_bytes(content)


def payload_bytes(content: RecordDict) -> int:
    """Return the bytes that all records of a message hold, by Flower's own count (values and keys)."""
    return sum(
        _model_bytes(record) if isinstance(record, ArrayRecord) else record.count_bytes() for record in content.values()
    )


def scalar_uplink_bytes(scalars: int) -> int:
    """Return the payload of a train reply that carries `scalars` numbers: 4 bytes each and a constant."""
    return 4 * scalars + ANSWER_BYTES + len("values") + _METRICS_BYTES


def news_bytes(scalars: int) -> int:
    """Return the payload of a train message to a client that missed nothing but one round of one answer."""
    config = train_config(server_round=1, lr=0.1, epochs=1, batch_size=1, evaluate=True)
    return config.count_bytes() + len("values") + NEWS_BYTES + round_bytes([scalars])


def model_uplink_bytes(params: Mapping[str, Tensor]) -> int:
    """Return the payload of a train reply that carries a model; only keys and shapes are looked at."""
    return _model_bytes(params) + _METRICS_BYTES


def model_downlink_bytes(params: Mapping[str, Tensor]) -> int:
    """Return the payload of a train message; only keys and shapes are looked at."""
    config = train_config(server_round=1, lr=0.1, epochs=1, batch_size=1, evaluate=True)
    return _model_bytes(params) + config.count_bytes()


def _model_bytes(arrays: Mapping[str, Tensor | Array]) -> int:
    """Return Flower's count of a model's bytes: keys, and each array in NumPy's file format, header and values."""
    return sum(len(key) + _array_bytes(array) for key, array in arrays.items())


def _array_bytes(array: Tensor | Array) -> int:
    if isinstance(array, Tensor):
        return _file_bytes("float32", tuple(array.shape))
    return _file_bytes(array.dtype, array.shape) if isinstance(array, LiveArray) else len(array.data)


@lru_cache(maxsize=4096)
def _file_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    header, kind = BytesIO(), np.dtype(dtype)
    np.lib.format.write_array_header_1_0(header, {"descr": kind.str, "fortran_order": False, "shape": shape})
    return len(header.getvalue()) + kind.itemsize * int(np.prod(shape, dtype=np.int64))


def wire_bytes(content: RecordDict) -> int:
    """Return the bytes of a message's content as Flower serialises it: every object of its tree.

    A function of names, types and shapes, never of an array's values: equal arrays or chunks, which Flower would send
    once, count each. Arrays are not deflated here: Flower would hash them all and keep views that cannot be pickled.
    """
    return sum(_record_wire_bytes(record) for record in content.values()) + _tree_wire_bytes(tuple(content))


def _record_wire_bytes(record: Any) -> int:
    if isinstance(record, ArrayRecord):
        return _arrays_wire_bytes(tuple((key, a.dtype, tuple(a.shape)) for key, a in record.items()))
    layout = tuple((name, *_layout(value)) for name, value in record.items())
    if any(kind is None for _, kind, _ in layout):
        return len(record.deflate())
    return _layout_wire_bytes(type(record), layout)


def _layout(value: Any) -> tuple[type | None, int]:
    """Return the type and length on which the size of a serialised value depends; None if it depends on more."""
    if isinstance(value, float):
        return float, 1
    if isinstance(value, bytes):
        return bytes, len(value)
    if isinstance(value, list) and all(isinstance(v, float) for v in value):
        return list, len(value)
    return None, 0


@lru_cache(maxsize=4096)
def _layout_wire_bytes(record: type, layout: tuple[tuple[str, type, int], ...]) -> int:
    """Return the size of a serialised record of floats, lists of floats and bytes."""
    make = {float: lambda n: 1.0, bytes: bytes, list: lambda n: [1.0] * n}
    return len(record({name: make[kind](length) for name, kind, length in layout}).deflate())


@lru_cache(maxsize=4096)
def _tree_wire_bytes(names: tuple[str, ...]) -> int:
    """Return the size of a serialised tree; it lists its children by hashes, all of one length."""
    return len(RecordDict({name: ConfigRecord({"stand-in": i}) for i, name in enumerate(names)}).deflate())


@lru_cache(maxsize=4096)
def _arrays_wire_bytes(layout: tuple[tuple[str, str, tuple[int, ...]], ...]) -> int:
    """Return the size of a serialised record of arrays (key, dtype, shape), with the arrays and their chunks."""
    record = ArrayRecord({key: Array(np.array(i)) for i, (key, _, _) in enumerate(layout)})
    size = len(record.deflate())
    for _, dtype, shape in layout:
        data = np.random.default_rng(0).bytes(_file_bytes(dtype, shape))  # no two chunks alike
        array = Array(dtype, shape, "numpy.ndarray", data)
        size += len(array.deflate()) + sum(len(chunk.deflate()) for chunk in array.children.values())
    return size
