"""The messages that cross the wire, both directions, encode and decode side by side.

    train     down  arrays: the model          config: round, learning rate, epochs, batch size, ...
              up    arrays: the new model  or  scalars: one bytes field of little-endian float32
                    metrics: what the client measured
    evaluate  down  arrays, config             up  metrics: loss, accuracy, number of samples
    query     down  (nothing)                  up  metrics: which partition of the data the node holds

Names in records follow Flower's own (`arrays`, `config`, `metrics`, `num-examples`), so its strategies work unchanged.
Metrics are float64 whatever they count: their size on the wire then depends on nothing but their names.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from io import BytesIO

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from torch import Tensor

Tensors = dict[str, Tensor]
ARRAYS, CONFIG, METRICS, SCALARS = "arrays", "config", "metrics", "scalars"
PARTITION, SAMPLES = "partition-id", "num-examples"
CLIENT_FAILED, OVER_BUDGET, AUDIT_FAILED = 1001, 1002, 1003  # error codes of a client that says itself what is wrong

TRAIN_METRICS = (  # of a train reply, in this order
    PARTITION, SAMPLES, "steps", "batch", "loss", "accuracy", "accuracy-before", "accuracy-after",
    "peak-bytes", "fit", "flops", "seconds",
)  # fmt: skip
FIT = (
    "micro-batch",
    "chunk",
    "rank",
)  # the numbers of "fit": how a step was made to fit its device
EVALUATE_METRICS = (PARTITION, SAMPLES, "loss", "accuracy")


def encode_params(params: Mapping[str, Tensor]) -> ArrayRecord:
    """Return the model as Flower sends it: one NumPy array per parameter, under the parameter's key."""
    return ArrayRecord({key: Array(p.detach().cpu().numpy()) for key, p in params.items()})


def decode_params(arrays: ArrayRecord) -> Tensors:
    """Return fresh float32 tensors, in the record's order."""
    return {key: torch.from_numpy(np.array(array.numpy(), dtype=np.float32)) for key, array in arrays.items()}


def encode_scalars(scalars: Tensor) -> ConfigRecord:
    """Return scalars (n,) as 4·n bytes."""
    return ConfigRecord({"values": scalars.detach().cpu().numpy().astype("<f4").tobytes()})


def decode_scalars(record: ConfigRecord) -> Tensor:
    """Return the scalars (n,) float32 of a record made by `encode_scalars`."""
    return torch.from_numpy(np.frombuffer(record["values"], dtype="<f4").astype(np.float32))


def encode_metrics(names: Iterable[str], values: Mapping[str, float | Sequence[float]]) -> MetricRecord:
    """Return the named values, numbers or lists of them, as float64 metrics, in the order of `names`."""
    as_floats = lambda value: [float(v) for v in value] if isinstance(value, Sequence) else float(value)  # noqa: E731
    return MetricRecord({name: as_floats(values[name]) for name in names})


def train_config(*, server_round: int, lr: float, epochs: int, batch_size: int, evaluate: bool) -> ConfigRecord:
    """Return what a train message asks of a client beside the model."""
    values = {"lr": lr, "epochs": epochs, "batch-size": batch_size, "evaluate": evaluate}
    return ConfigRecord(values | {"server-round": server_round})


def train_reply(params: Tensors, scalars: Tensor | None, metrics: Mapping[str, float]) -> RecordDict:
    """Return a client's answer to a train message: its scalars if it has any, else its model."""
    answer = {ARRAYS: encode_params(params)} if scalars is None else {SCALARS: encode_scalars(scalars)}
    return RecordDict({**answer, METRICS: encode_metrics(TRAIN_METRICS, metrics)})


def only(records: Mapping[str, object]) -> object:
    """Return the only record of a kind: a strategy may have renamed `arrays` or `config`."""
    (record,) = records.values()
    return record


def payload_bytes(content: RecordDict) -> int:
    """Return the bytes that all records of a message hold, by Flower's own count (values and keys)."""
    return sum(record.count_bytes() for record in content.values())


def scalar_uplink_bytes(scalars: int) -> int:
    """Return the payload of a train reply that carries `scalars` numbers: 4 bytes each and a constant."""
    return 4 * scalars + len("values") + _METRICS_BYTES


def model_uplink_bytes(params: Mapping[str, Tensor]) -> int:
    """Return the payload of a train reply that carries a model; only keys and shapes are looked at."""
    return _model_bytes(params) + _METRICS_BYTES


def model_downlink_bytes(params: Mapping[str, Tensor]) -> int:
    """Return the payload of a train message; only keys and shapes are looked at."""
    config = train_config(server_round=1, lr=0.1, epochs=1, batch_size=1, evaluate=True)
    return _model_bytes(params) + config.count_bytes()


_METRICS_BYTES = sum(8 * (len(FIT) if name == "fit" else 1) + len(name) for name in TRAIN_METRICS)


def _model_bytes(params: Mapping[str, Tensor]) -> int:
    """Return Flower's count of a model's bytes: keys, and each array in NumPy's file format, header and values."""
    return sum(len(key) + _header_bytes(tuple(p.shape)) + 4 * p.numel() for key, p in params.items())


@lru_cache(maxsize=4096)
def _header_bytes(shape: tuple[int, ...]) -> int:
    header = BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return len(header.getvalue())


def wire_bytes(content: RecordDict) -> int:
    """Return the bytes of a message's content as Flower serialises it: every object of its tree.

    A function of names, dtypes and shapes, never of an array's values: equal arrays or chunks, which Flower would send
    once, count each. Arrays are not deflated here: Flower would hash them all and keep views that cannot be pickled.
    """
    size, tree = 0, RecordDict()
    for i, (name, record) in enumerate(content.items()):
        if isinstance(record, ArrayRecord):
            size += _arrays_wire_bytes(tuple((key, a.dtype, tuple(a.shape)) for key, a in record.items()))
            tree[name] = ConfigRecord({"stand-in": i})  # a tree lists its children by hashes, all of one length
        else:
            size += len(record.deflate())
            tree[name] = record
    return size + len(tree.deflate())


@lru_cache(maxsize=4096)
def _arrays_wire_bytes(layout: tuple[tuple[str, str, tuple[int, ...]], ...]) -> int:
    """Return the size of a serialised record of arrays (key, dtype, shape), with the arrays and their chunks."""
    record = ArrayRecord({key: Array(np.array(i)) for i, (key, _, _) in enumerate(layout)})
    size = len(record.deflate())
    for _, dtype, shape in layout:
        data = np.random.default_rng(0).bytes(len(Array(np.zeros(shape, dtype)).data))  # no two chunks alike
        array = Array(dtype, shape, "numpy.ndarray", data)
        size += len(array.deflate()) + sum(len(chunk.deflate()) for chunk in array.children.values())
    return size
