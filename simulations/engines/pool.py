"""The pool engine: clients run in worker processes that stay, one a device.

Models lie in memory that all processes share: the server's is written once a round, and every client trains in place
where the server reads its update. A worker has two places, so that it trains the next client while the server folds the
last one's update. The client with most work goes first, and whoever is free takes the next.

A worker that dies takes its client's round with it and nothing else: it is recorded as failed, and another worker
begins.
"""

from __future__ import annotations

import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from flwr.app import ArrayRecord, Error, Message

from ... import protocol
from ...algorithms.rule import Tensors
from .arena import Arena
from .local import CLIENT_RAISED, LocalGrid, Work, own
from .worker import IN_PLACE, Answer, Job, Packed, pack, unpack, work

PLACES = 2  # of a worker
# What making a world imports, seconds of it: once for all workers, and for those that take the place of others.
PRELOADED = (f"{__package__}.worker", f"{__package__.rpartition('.')[0]}.partitions", "torch._dynamo")


class PoolFailed(RuntimeError):
    """The workers cannot begin; one line that says why."""


@dataclass
class _Worker:
    """A process, what it has been given, and its free places."""

    process: BaseProcess
    jobs: Connection
    free: list[int]
    given: deque[tuple[Job, Message]] = field(default_factory=deque)  # the first is under way
    content: Packed | None = None  # what the message that it was given last holds

    def end(self) -> None:
        self.jobs.close()
        self.process.kill()
        self.process.join()


class PoolGrid(LocalGrid):
    """Runs clients in worker processes. Use as a context manager: on leaving it, they end.

    Args:
        run_config: the experiment, of which every worker makes the world.
        devices: "cpu" or a GPU, of each worker; the first of those on the CPU stays on the first core, and so on.
        params: the model's parameters; only keys and shapes are looked at.
        clients: number of nodes.
        on_reply: called after each client, for progress.
        work: says what a message will cost.

    Raises:
        PoolFailed: if a worker cannot make the world.
    """

    def __init__(
        self,
        run_config: dict[str, Any],
        devices: Sequence[str],
        params: Tensors,
        clients: int,
        on_reply: Callable[[], None] | None = None,
        work: Work | None = None,
    ) -> None:
        super().__init__(clients, on_reply, work)
        self.run_config, self.devices = run_config, devices
        self.cpus = _pinned(devices, run_config["threads"])
        self.arena = Arena(params, 1 + PLACES * len(devices))
        self.models = [self.arena.model(place) for place in range(self.arena.places)]
        self.workers: list[_Worker] = []

    def __enter__(self) -> PoolGrid:
        self._begin_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._end_all()
        self.arena.close()

    def stream(self, messages: Iterable[Message]) -> Iterator[Message]:
        """Give messages to the workers and yield the replies, each as soon as it and those before it are there."""
        if not self.workers:
            self._begin_all()
        ordered = self.in_order(messages)
        queue = deque(enumerate(ordered))
        contents = _Contents(ordered, self.models[0])
        done: dict[int, tuple[Message, _Worker | None, int]] = {}
        try:
            for turn in range(len(ordered)):
                while turn not in done:
                    self._give(queue, contents, done)
                    self._take(queue, done)
                reply, worker, place = done.pop(turn)
                self._give(queue, contents, done)
                yield reply
                if worker:
                    worker.free.append(place)
                if self.on_reply:
                    self.on_reply()
        except BaseException:  # their answers would be taken for those of a later round
            self._end_all()
            raise

    def _give(self, queue: deque[tuple[int, Message]], contents: _Contents, done: dict) -> None:
        """Give whoever is free a message, and one in store as long as there are enough for all."""
        for depth in (1, PLACES):
            for worker in self.workers:
                plenty = len(queue) > len(self.workers)
                if queue and len(worker.given) < depth and (depth == 1 or plenty):
                    if not worker.free and depth == 1:
                        _clear(worker, done)
                    if worker.free:
                        _send(worker, *queue.popleft(), contents)

    def _take(self, queue: deque[tuple[int, Message]], done: dict) -> None:
        """Wait for an answer, or the end of a worker, and note it."""
        by_connection = {worker.jobs: worker for worker in self.workers if worker.given}
        for connection in wait(list(by_connection)):
            worker = by_connection[connection]
            try:
                answer: Answer = connection.recv()
            except (EOFError, ConnectionResetError):
                self._replace(worker, queue, done)
                continue
            job, message = worker.given.popleft()
            if answer.error:
                worker.free.append(job.place)
                done[job.number] = Message(Error(*answer.error), reply_to=message), None, 0
                continue
            content = unpack(answer.content, self.models[job.place])
            done[job.number] = Message(content, reply_to=message), worker, job.place

    def _replace(self, worker: _Worker, queue: deque[tuple[int, Message]], done: dict) -> None:
        """Note that a worker's client is lost, and let another worker begin in its place."""
        worker.end()
        (lost, message), *unharmed = worker.given
        code = worker.process.exitcode
        how = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
        reason = f"its worker process ended ({how}); out of memory, perhaps"
        done[lost.number] = Message(Error(CLIENT_RAISED, reason), reply_to=message), None, 0
        queue.extendleft((job.number, waiting) for job, waiting in reversed(unharmed))
        for number, (reply, whose, _) in done.items():
            if whose is worker:  # its place will be the new worker's
                done[number] = own(reply), None, 0
        index = self.workers.index(worker)
        self.workers[index] = self._begin(index)
        self._wait_for(self.workers[index])

    def _begin_all(self) -> None:
        self.workers = [self._begin(index) for index in range(len(self.devices))]
        try:
            for worker in self.workers:
                self._wait_for(worker)
        except BaseException:
            self._end_all()
            raise

    def _begin(self, index: int) -> _Worker:
        context = multiprocessing.get_context("forkserver" if os.name == "posix" else "spawn")
        if os.name == "posix":
            context.set_forkserver_preload([*PRELOADED, *["sklearn.datasets"] * (self.run_config["data"] == "digits")])
        ours, theirs = context.Pipe()
        arguments = (theirs, self.run_config, self.arena, self.devices[index], self.cpus[index])
        process = context.Process(target=work, args=arguments, daemon=True, name=f"fedforward worker {index}")
        process.start()
        theirs.close()
        first = 1 + PLACES * index
        return _Worker(process, ours, list(range(first, first + PLACES)))

    def _wait_for(self, worker: _Worker) -> None:
        try:
            problem = worker.jobs.recv()
        except EOFError:
            worker.process.join()
            problem = f"it ended with exit code {worker.process.exitcode}"
        if problem:
            raise PoolFailed(f"a worker process cannot begin: {problem}")

    def _end_all(self) -> None:
        for worker in self.workers:
            worker.end()
        self.workers = []


def _pinned(devices: Sequence[str], threads: int) -> list[int | None]:
    """Return the core of each worker: one of its own for those on the CPU with one thread, if there are enough."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if threads > 1 or len(devices) > len(cores):
        return [None] * len(devices)
    return [core if device == "cpu" else None for device, core in zip(devices, cores, strict=False)]


class _Contents:
    """What the messages of a round hold, packed; one model that all share is put where the workers see it."""

    def __init__(self, messages: list[Message], shared: Tensors) -> None:
        self.packed: dict[int, Packed] = {}
        distinct = {id(message.content): message.content for message in messages}
        if len(distinct) == 1:
            (content,) = distinct.values()
            if _fits(content, shared):
                protocol.decode_params(protocol.only(content.array_records), shared)
                self.packed[id(content)] = {
                    name: (type(record), IN_PLACE if isinstance(record, ArrayRecord) else dict(record))
                    for name, record in content.items()
                }

    def of(self, message: Message) -> Packed:
        """Return a message's content, packed."""
        key = id(message.content)
        if key not in self.packed:
            self.packed[key] = pack(message.content, {})
        return self.packed[key]


def _fits(content: Any, shared: Tensors) -> bool:
    """Return whether a message holds one model, of the shared parameters."""
    records = list(content.array_records.values())
    return (
        len(records) == 1
        and list(records[0]) == list(shared)
        and all(array.dtype == "float32" and tuple(array.shape) == shared[k].shape for k, array in records[0].items())
    )


def _send(worker: _Worker, number: int, message: Message, contents: _Contents) -> None:
    """Give a message to a worker that has a free place."""
    content, metadata = contents.of(message), message.metadata
    known = content is worker.content
    job = Job(number, metadata.dst_node_id, metadata.message_type, worker.free.pop(), None if known else content)
    worker.content = content
    worker.given.append((job, message))
    with suppress(BrokenPipeError, ConnectionResetError):  # it is dead, and `_take` will notice
        worker.jobs.send(job)


def _clear(worker: _Worker, done: dict) -> None:
    """Free a place of a worker by copying a reply whose turn has not come."""
    for number, (reply, whose, place) in done.items():
        if whose is worker:
            done[number] = own(reply), None, 0
            worker.free.append(place)
            return
