"""The messages that cross the wire, both directions, encode and decode side by side.

    train     down  arrays: the model  or  news: what became of it since, see below
                    config: round, learning rate, epochs, batch size, ...
              up    arrays: the new model  or  scalars: one bytes field of little-endian float32
                    metrics: what the client measured
    evaluate  down  arrays or news, config     up  metrics: loss, accuracy, number of samples
    query     down  (nothing)                  up  metrics: which partition of the data the node holds

Names in records follow Flower's own (`arrays`, `config`, `metrics`, `num-examples`), so its strategies work unchanged.
Metrics are float64 whatever they count: their size on the wire then depends on nothing but their names.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, Metadata, MetricRecord, RecordDict
from torch import Tensor

from .scalar_wire import UNSAID, Garbled, decode_answer, encode_answer

Tensors = dict[str, Tensor]
ARRAYS, CONFIG, METRICS, SCALARS, NEWS = "arrays", "config", "metrics", "scalars", "news"
PARTITION, SAMPLES = "partition-id", "num-examples"
# Error codes of a client that says itself what is wrong.
CLIENT_FAILED, OVER_BUDGET, AUDIT_FAILED, OUT_OF_STEP = 1001, 1002, 1003, 1004

TRAIN_METRICS = (  # of a train reply, in this order
    PARTITION, SAMPLES, "steps", "batch", "loss", "accuracy", "accuracy-before", "accuracy-after",
    "peak-bytes", "fit", "flops", "seconds",
)  # fmt: skip
FIT = ("micro-batch", "abreast", "chunk", "rank")  # the numbers of "fit": how a step was made to fit its device
EVALUATE_METRICS = (PARTITION, SAMPLES, "loss", "accuracy")


class Trained(NamedTuple):
    """A client's answer to a train message."""

    params: Tensors  # its model; none if it has scalars
    scalars: Tensor | None  # (n,) float32
    measured: Mapping[str, float | Sequence[float]]  # `TRAIN_METRICS`
    summed: float | None = None  # samples, if params are the sum of a group of clients, weighted; 0 if another tells it
    round: int = 0  # that scalars answer
    fingerprint: bytes = UNSAID  # of the model that scalars were found at


class LiveReply(Message):
    """A client's answer that is still in this process: Flower's records are made when they are asked for, if ever.

    From then on they are the answer, and may be changed as those of any message.

    Args:
        to: the message that is answered.
        answer: shared and not copied.
    """

    def __init__(self, to: Message, answer: Trained) -> None:
        self.__dict__.update(to=to, answer=answer)

    def made(self) -> LiveReply:
        """Return this message with all that Flower gives one."""
        if self.answer:
            answer, self.answer = self.answer, None
            super().__init__(train_reply(answer), reply_to=self.to)
        return self

    metadata = property(lambda self: Message.metadata.fget(self.made()))
    content = property(
        lambda self: Message.content.fget(self.made()), lambda self, value: Message.content.fset(self.made(), value)
    )

    def has_content(self) -> bool:
        """Return that it has: an answer is no error."""
        return True

    def has_error(self) -> bool:
        """Return that it has none."""
        return False

    def __reduce__(self) -> tuple:
        return _message, (self.content, self.metadata)


def _message(content: RecordDict, metadata: Metadata) -> Message:
    return Message(content=content, metadata=metadata)


class LiveArray(Array):
    """An array that is still in this process: it is serialised when its bytes are asked for, and not before.

    Args:
        values: the array, shared and not copied: whoever changes it changes what is sent.
    """

    def __init__(self, values: np.ndarray) -> None:
        self.__dict__.update(values=values, dtype=_name_of(values.dtype), shape=values.shape, stype="numpy.ndarray")

    @property
    def data(self) -> bytes:
        """The bytes that Flower would send."""
        return Array(self.values).data

    def numpy(self) -> np.ndarray:
        """Return a copy, as an array that crossed the wire would."""
        return self.values.copy()

    def deflate(self) -> bytes:
        """Return the head of the object that Flower would send: that of a plain array."""
        return Array(self.values).deflate()

    def __reduce__(self) -> tuple:
        return LiveArray, (self.values,)


@lru_cache(maxsize=64)
def _name_of(dtype: np.dtype) -> str:
    return str(dtype)


def encode_params(params: Mapping[str, Tensor]) -> ArrayRecord:
    """Return the model as Flower sends it: one NumPy array per parameter, under the parameter's key.

    On the CPU the record shares the tensors' memory until it is sent.
    """
    record = ArrayRecord()  # which would copy a dictionary
    for key, p in params.items():
        record[key] = LiveArray(p.detach().cpu().numpy())
    return record


def decode_params(arrays: ArrayRecord, into: Tensors | None = None) -> Tensors:
    """Return fresh float32 tensors, in the record's order, or copy the model `into` tensors of its keys and shapes."""
    if into is None:
        return {key: torch.from_numpy(np.array(values_of(array), dtype=np.float32)) for key, array in arrays.items()}
    for key, array in arrays.items():
        into[key].copy_(tensor_of(array))
    return into


def params_of(arrays: ArrayRecord) -> Tensors:
    """Return a model to look at, not to be changed: its memory may be the record's."""
    return {key: tensor_of(array).float() for key, array in arrays.items()}


def values_of(array: Array) -> np.ndarray:
    """Return an array's values, not to be changed: they may be shared."""
    return array.values if isinstance(array, LiveArray) else array.numpy()


def tensor_of(array: Array) -> Tensor:
    """Return an array as a tensor, not to be changed: its memory may be shared."""
    values = values_of(array)
    return torch.from_numpy(values if values.flags.writeable else values.copy())  # PyTorch knows no read-only memory


def encode_metrics(names: Iterable[str], values: Mapping[str, float | Sequence[float]]) -> MetricRecord:
    """Return the named values, numbers or lists of them, as float64 metrics, in the order of `names`."""
    as_floats = lambda value: [float(v) for v in value] if isinstance(value, tuple | list) else float(value)  # noqa: E731
    return MetricRecord({name: as_floats(values[name]) for name in names})


def train_config(
    *, server_round: int, lr: float, epochs: int, batch_size: int, steps: int = 0, evaluate: bool
) -> ConfigRecord:
    """Return what a train message asks of a client beside the model; a limit of local steps only if there is one."""
    values = {"lr": lr, "epochs": epochs, "batch-size": batch_size, "evaluate": evaluate}
    return ConfigRecord(values | {"server-round": server_round} | ({"steps": steps} if steps else {}))


def train_reply(answer: Trained) -> RecordDict:
    """Return a client's answer to a train message as records: its scalars if it has any, else its model."""
    metrics = encode_metrics(TRAIN_METRICS, answer.measured)
    if answer.scalars is None:
        return RecordDict({ARRAYS: encode_params(answer.params), METRICS: metrics})
    values = encode_answer(answer.scalars, answer.round, answer.fingerprint)
    return RecordDict({SCALARS: ConfigRecord({"values": values}), METRICS: metrics})


def scalars_of(reply: Message) -> tuple[int, bytes, Tensor]:
    """Return (round, fingerprint, scalars) of a client's answer.

    Raises:
        Garbled: if it is not what the client sent, or holds no scalars.
    """
    if (answer := live(reply)) and answer.scalars is not None:
        return answer.round, answer.fingerprint, answer.scalars
    try:
        return decode_answer(reply.content[SCALARS]["values"])
    except KeyError:
        raise Garbled("the answer holds no scalars") from None


def send(message: Message, content: RecordDict) -> Message:
    """Return a message that crosses a wire as `content`; an engine in the server's process sees what it has instead."""
    message.__dict__["sent"] = content
    return message


def sent(message: Message) -> RecordDict:
    """Return what of a message crosses a wire."""
    return message.__dict__.get("sent") or message.content


def live(reply: Message) -> Trained | None:
    """Return a reply's answer as long as no records have been made of it."""
    return reply.answer if isinstance(reply, LiveReply) else None


def sender(reply: Message) -> int:
    """Return the node that a reply comes from."""
    return reply.to.metadata.dst_node_id if isinstance(reply, LiveReply) else reply.metadata.src_node_id


def measured(reply: Message) -> Mapping[str, float | Sequence[float]]:
    """Return what a client measured."""
    answer = live(reply)
    return answer.measured if answer else only(reply.content.metric_records)


def model_of(reply: Message) -> Tensors:
    """Return the model of a client's answer, to look at: its memory may be shared."""
    answer = live(reply)
    return answer.params if answer else params_of(only(reply.content.array_records))


def summed_of(reply: Message) -> float | None:
    """Return how many samples the sum of a group's models holds, if a reply has it in place of its model, else None."""
    answer = live(reply)
    return answer.summed if answer else None


def join(reply: Message, group: int) -> Message:
    """Return a reply as one of those whose models are summed before that is added to others."""
    reply.__dict__["group"] = group
    return reply


def group_of(reply: Message) -> int | None:
    """Return the group that a reply was made to join, or None."""
    return reply.__dict__.get("group")


def kept(reply: Message) -> Message:
    """Return a reply whose arrays are its own: an engine may share them with the next one's."""
    if answer := live(reply):
        reply.answer = answer._replace(params={key: p.clone() for key, p in answer.params.items()})
        return reply
    for arrays in reply.content.array_records.values():
        for key, array in arrays.items():
            if isinstance(array, LiveArray):
                arrays[key] = LiveArray(array.numpy())
    return reply


def only(records: Mapping[str, object]) -> object:
    """Return the only record of a kind: a strategy may have renamed `arrays` or `config`."""
    (record,) = records.values()
    return record


def config_of(message: Message) -> ConfigRecord:
    """Return what a message asks for, whatever its strategy calls it."""
    return only({name: record for name, record in message.content.config_records.items() if name != NEWS})
