"""The pool engine: clients run in worker processes that stay, one a device.

Models lie in memory that all processes share: the server's is written once a round, and every client trains in place
where the server reads its update. A worker has two places, so that it trains the next client while the server folds the
last one's update. The client with most work goes first, and whoever is free takes the next.

Clients too small to be worth a message travel in groups, and a worker leaves the sum of a group's models (see
`server.fold`). If the engine is `cohort`, a worker trains whom it is given side by side.

A worker that dies takes its client's round with it and nothing else: it is recorded as failed, and another worker
begins. Of several clients, all are asked again, one by one.
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

from flwr.app import Error, Message

from ... import protocol
from ...algorithms.rule import RuleError, Tensors
from .arena import Arena
from .local import CLIENT_RAISED, LocalGrid, Work
from .turns import Contents, Turns
from .worker import Job, Outcome, Packed, unpack, work

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
    given: deque[Job] = field(default_factory=deque)  # the first is under way
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
        RuleError: of a round, if the rule cannot be batched and the engine is to do it.
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

    def stream(self, messages: Iterable[Message], *, folded: bool = False) -> Iterator[Message]:
        """Give messages to the workers and yield the replies, each as soon as it and those before it are there."""
        if not self.workers:
            self._begin_all()
        messages = list(messages)
        contents = Contents(messages, self.models[0])
        turns = Turns(self._jobs(messages, folded and contents.shared, contents.shared), folded)
        try:
            for turn in range(len(messages)):
                while turn not in turns.done:
                    self._give(turns, contents)
                    self._take(turns)
                reply, worker, place = turns.done.pop(turn)
                self._give(turns, contents)
                yield reply
                if worker:
                    worker.free.append(place)
                if self.on_reply:
                    self.on_reply()
        except BaseException:  # their answers would be taken for those of a later round
            self._end_all()
            raise

    def _jobs(self, messages: list[Message], folded: bool, shared: bool) -> list[list[Message]]:
        """Return whom a worker answers together: a group whose models are summed, or a worker's share as a cohort."""
        if self.run_config["engine"] == "cohort" and shared:
            return self.in_cohorts(messages, self.devices)
        return self.in_groups(messages) if folded else [[message] for message in self.in_order(messages)]

    def _give(self, turns: Turns, contents: Contents) -> None:
        """Give whoever is free a job, and one in store as long as there are enough for all."""
        for depth in (1, PLACES):
            for worker in self.workers:
                plenty = len(turns.queue) > len(self.workers)
                if turns.queue and len(worker.given) < depth and (depth == 1 or plenty):
                    if not worker.free and depth == 1:
                        turns.clear(worker)
                    if worker.free:
                        _send(worker, turns, contents)

    def _take(self, turns: Turns) -> None:
        """Wait for an answer, or the end of a worker, and note it."""
        by_connection = {worker.jobs: worker for worker in self.workers if worker.given}
        for connection in wait(list(by_connection)):
            worker = by_connection[connection]
            try:
                outcomes: list[Outcome] | RuleError = connection.recv()
            except (EOFError, ConnectionResetError):
                self._replace(worker, turns)
                continue
            if isinstance(outcomes, RuleError):
                raise outcomes
            job = worker.given.popleft()
            last = max((i for i, outcome in enumerate(outcomes) if not outcome.error), default=None)
            if last is None:
                worker.free.append(job.place)
            for i, (turn, outcome) in enumerate(zip(job.turns, outcomes, strict=True)):
                reply = _reply(turns.messages[turn], outcome, self.models[job.place])
                turns.note(turn, reply, worker if i == last else None, job.place)

    def _replace(self, worker: _Worker, turns: Turns) -> None:
        """Let another worker begin in the place of one that is no more, and note that its client is lost.

        Which client of several it was is not known: they are asked again, one by one.
        """
        worker.end()
        lost, *unharmed = worker.given
        for job in reversed(unharmed):
            turns.queue.appendleft(job.turns)
        if len(lost.turns) > 1:
            turns.queue.extendleft((turn,) for turn in reversed(lost.turns))
        else:
            code = worker.process.exitcode
            how = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
            reason = f"its worker process ended ({how}); out of memory, perhaps"
            (turn,) = lost.turns
            turns.note(turn, Message(Error(CLIENT_RAISED, reason), reply_to=turns.messages[turn]))
        turns.keep(worker)  # its places will be the new worker's
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
        device = self.devices[index]
        arguments = (theirs, self.run_config, self.arena, device, self.cpus[index], self.devices.count(device))
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


def _send(worker: _Worker, turns: Turns, contents: Contents) -> None:
    """Give the next job to a worker that has a free place."""
    due = turns.queue.popleft()
    messages = [turns.messages[turn] for turn in due]
    content, nodes = contents.of(messages[0]), tuple(message.metadata.dst_node_id for message in messages)
    known = content is worker.content
    kind = messages[0].metadata.message_type
    summed = len(due) > 1 and due[0] in turns.group
    job = Job(due, nodes, kind, worker.free.pop(), summed, None if known else content)
    worker.content = content
    worker.given.append(job)
    with suppress(BrokenPipeError, ConnectionResetError):  # it is dead, and `_take` will notice
        worker.jobs.send(job)


def _reply(message: Message, outcome: Outcome, model: Tensors) -> Message:
    """Return the reply to a message; its model, or that of its group, is the one given."""
    if outcome.error:
        return Message(Error(*outcome.error), reply_to=message)
    if outcome.trained:
        params = model if outcome.trained.scalars is None else {}
        return protocol.LiveReply(message, outcome.trained._replace(params=params))
    return Message(unpack(outcome.content, model), reply_to=message)
