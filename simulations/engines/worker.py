"""A worker process of the pool: it has the experiment's world, and answers the messages of any client."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from ... import protocol
from ...algorithms.rule import RuleError, Tensors
from ...server.fold import Sum
from ..experiment import from_run_config
from ..world import World, build
from .arena import Arena
from .cohort import CohortGrid
from .local import Nodes, assume_identity

IN_PLACE = "in place"  # stands for arrays that lie in shared memory
Packed = dict[str, tuple[type, Any]]  # the records of a message: name -> type, values


@dataclass(frozen=True)
class Job:
    """Messages of one content to be answered, one client after the other.

    Attributes:
        turns: of the messages in their round.
        nodes: whom they are for.
        kind: their type.
        place: of the arena, where a client trains and leaves its model.
        summed: the clients leave the sum of their models there.
        content: their records, or None for those of the job before.
    """

    turns: tuple[int, ...]
    nodes: tuple[int, ...]
    kind: str
    place: int
    summed: bool
    content: Packed | None


class Outcome(NamedTuple):
    """What became of a message: an answer without its model, which is in its place, other records, or an error."""

    trained: protocol.Trained | None = None
    content: Packed | None = None
    error: tuple[int, str] | None = None  # code and reason


def work(
    jobs: Connection, run_config: dict[str, Any], arena: Arena, device: str, cpu: int | None, sharers: int
) -> None:
    """Answer jobs until there are no more: first of all `None`, when the world is built, or why it cannot be.

    Args:
        jobs: gives jobs and takes answers.
        run_config: the experiment.
        arena: place 0 holds the model that the server sends.
        device: where to train.
        cpu: the core to stay on.
        sharers: workers on that device.
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
    desk = _Desk(world, run_config, models, sharers)
    jobs.send(None)
    while True:
        try:
            job = jobs.recv()
        except EOFError:
            return
        try:
            jobs.send(desk.answer(job))
        except RuleError as error:  # it cannot run as a cohort: that ends the run, with its words
            jobs.send(error)


class _Desk:
    """Where a worker's clients train: one after the other or, if that is the experiment's engine, as cohorts.

    Args:
        world: knows the clients.
        run_config: what they find in their context.
        models: the places of the arena.
        sharers: workers on this one's device.
    """

    def __init__(self, world: World, run_config: dict[str, Any], models: list[Tensors], sharers: int) -> None:
        self.models, self.records = models, RecordDict()
        self.own = {key: torch.empty_like(p) for key, p in models[0].items()}
        self.memory: Tensors = {}  # where the next client trains
        self.nodes = Nodes(world.app(self.memory), world.experiment.clients, run_config)
        self.cohorts = CohortGrid(world, sharers=sharers) if world.experiment.engine == "cohort" else None

    def answer(self, job: Job) -> list[Outcome]:
        """Return what became of each message of a job."""
        self.records = self.records if job.content is None else unpack(job.content, self.models[0])
        place = self.models[job.place]
        self.memory.update(self.own if job.summed else place)
        messages = [Message(self.records, dst_node_id=node, message_type=job.kind) for node in job.nodes]
        replies = self.cohorts.answer(messages) if self.cohorts else map(self.nodes.answer, messages)
        total = Sum(place) if job.summed else None
        found = {protocol.sender(reply): self._outcome(reply, total) for reply in replies}
        outcomes = [found[node] for node in job.nodes]
        last = max((i for i, outcome in enumerate(outcomes) if outcome.trained), default=None)
        if total and last is not None:
            outcomes[last] = Outcome(outcomes[last].trained._replace(summed=total.samples))
        return outcomes

    def _outcome(self, reply: Message, total: Sum | None) -> Outcome:
        """Return what became of a message, after adding its model to a sum if there is one."""
        if not reply.has_content():
            return Outcome(error=(reply.error.code, reply.error.reason))
        answer = protocol.live(reply)
        if answer and total:
            total.add(answer.params, answer.measured[protocol.SAMPLES])
            return Outcome(answer._replace(params={}, summed=0.0))
        if answer and (answer.scalars is not None or _lie_in(answer.params, self.memory)):
            return Outcome(answer._replace(params={}))
        return Outcome(content=pack(reply.content, self.memory))


def _lie_in(params: Tensors, shared: Tensors) -> bool:
    return all(p.data_ptr() == shared[key].data_ptr() for key, p in params.items())


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
