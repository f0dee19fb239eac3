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

from collections.abc import Iterable, Mapping
from functools import lru_cache

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from torch import Tensor

Tensors = dict[str, Tensor]
ARRAYS, CONFIG, METRICS, SCALARS = "arrays", "config", "metrics", "scalars"
PARTITION, SAMPLES = "partition-id", "num-examples"
CLIENT_FAILED = 1001  # error code of a client that says itself why it could not finish

TRAIN_METRICS = (  # of a train reply, in this order
    PARTITION, SAMPLES, "steps", "batch", "loss", "accuracy", "accuracy-before", "accuracy-after",
    "peak-bytes", "base-bytes", "flops", "seconds",
)  # fmt: skip
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


def encode_metrics(names: Iterable[str], values: Mapping[str, float]) -> MetricRecord:
    """Return the named values as float64 metrics, in the order of `names`."""
    return MetricRecord({name: float(values[name]) for name in names})


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
    return 4 * scalars + len("values") + sum(8 + len(name) for name in TRAIN_METRICS)


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
