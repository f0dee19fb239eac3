"""A worker process of the pool: it has the experiment's world, and answers the messages of any client."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from ... import protocol
from ...algorithms.rule import Tensors
from ..experiment import from_run_config
from ..world import build
from .arena import Arena
from .local import Nodes, assume_identity

IN_PLACE = "in place"  # stands for arrays that lie in shared memory
Packed = dict[str, tuple[type, Any]]  # the records of a message: name -> type, values


@dataclass(frozen=True)
class Job:
    """A message to be answered.

    Attributes:
        number: of the message in its round.
        node, kind: whom it is for, and its type.
        place: of the arena, where the client trains and leaves its model.
        content: its records, or None for those of the job before.
    """

    number: int
    node: int
    kind: str
    place: int
    content: Packed | None


@dataclass(frozen=True)
class Answer:
    """What became of a job: records, or an error's code and reason."""

    number: int
    content: Packed | None
    error: tuple[int, str] | None = None


def work(jobs: Connection, run_config: dict[str, Any], arena: Arena, device: str, cpu: int | None) -> None:
    """Answer jobs until there are no more: first of all `None`, when the world is built, or why it cannot be.

    Args:
        jobs: gives jobs and takes answers.
        run_config: the experiment.
        arena: place 0 holds the model that the server sends.
        device: where to train.
        cpu: the core to stay on.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends its workers
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if cpu is not None:
        os.sched_setaffinity(0, {cpu})
    assume_identity()
    try:
        world = build(from_run_config(run_config))
        world.trainer.to(device)
    except Exception as error:
        jobs.send(f"{type(error).__name__}: {' '.join(str(error).split())}")
        return
    models = [arena.model(place) for place in range(arena.places)]
    memory: Tensors = {}
    nodes = Nodes(world.app(memory), world.experiment.clients, run_config)
    jobs.send(None)
    records = RecordDict()
    while True:
        try:
            job = jobs.recv()
        except EOFError:
            return
        memory.clear()
        memory.update(models[job.place])
        records = records if job.content is None else unpack(job.content, models[0])
        reply = nodes.answer(Message(records, dst_node_id=job.node, message_type=job.kind))
        if reply.has_content():
            jobs.send(Answer(job.number, pack(reply.content, memory)))
        else:
            jobs.send(Answer(job.number, None, (reply.error.code, reply.error.reason)))


def pack(content: RecordDict, shared: Tensors) -> Packed:
    """Return the records of a message so that they can be sent; arrays that are `shared` already stay in place."""
    return {
        name: (type(record), IN_PLACE if _lies_in(record, shared) else dict(record)) for name, record in content.items()
    }


def unpack(content: Packed, shared: Tensors) -> RecordDict:
    """Return what `pack` has packed; arrays in place are those of `shared`."""
    records = RecordDict()
    for name, (kind, values) in content.items():
        if isinstance(values, str):
            records[name] = protocol.encode_params(shared)
        else:
            records[name] = _filled(kind, values.items())
    return records


def _filled(kind: type, items: Iterable[tuple[str, Any]]) -> ArrayRecord | MetricRecord | ConfigRecord:
    record = kind()
    for key, value in items:
        record[key] = value
    return record


def _lies_in(record: Any, shared: Tensors) -> bool:
    """Return whether a record's arrays are the shared ones, in their order."""
    return (
        isinstance(record, ArrayRecord)
        and list(record) == list(shared)
        and all(
            isinstance(array, protocol.LiveArray) and array.values.ctypes.data == shared[key].data_ptr()
            for key, array in record.items()
        )
    )


def _end_with_parent() -> None:
    """End this process as soon as its parent is gone, whatever it is doing."""
    wait([multiprocessing.parent_process().sentinel])
    os._exit(1)
