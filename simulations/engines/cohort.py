"""The cohort engine: many clients at once as one batched program, in chunks that fit the device's memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import cached_property
from itertools import groupby

import psutil
import torch
from flwr.app import Message, MessageType

from ... import protocol
from ...algorithms.rule import RuleError, Tensors
from ...client.app import REASONS, assignment, evaluated, failed, trained
from ...client.cohort import Cohort, Member, clients_within, evaluate_many
from ...client.fitting import OverBudget
from ...client.trainer import Assignment, Report
from ..world import World
from .local import LocalGrid, log, raised

SHARE = 0.5  # of the free memory that clients in flight may take
AT_ONCE = 1000  # clients in flight, at most
EVALUATED = 4096  # clients evaluated at once


class CohortGrid(LocalGrid):
    """Trains clients side by side on the device of the world's trainer.

    Replies differ from those of the other engines by the order of floating-point sums: a batched program takes others.

    Args:
        world: knows the clients.
        on_reply: called after each client, for progress.
        at_once: clients in flight; None for as many as half of the device's free memory holds.
        sharers: processes that share that half.
    """

    def __init__(
        self,
        world: World,
        on_reply: Callable[[], None] | None = None,
        at_once: int | None = None,
        sharers: int = 1,
    ) -> None:
        super().__init__(world.experiment.clients, on_reply, world.work)
        self.world, self.at_once, self.sharers = world, at_once, sharers

    def stream(self, messages: Iterable[Message], *, folded: bool = False) -> Iterator[Message]:
        """Run the clients in chunks and yield their replies; those of one chunk are alive together."""
        messages = list(messages)
        for number, group in enumerate(self.in_cohorts(messages, [self.world.trainer.device])):
            for _, alike in groupby(group, key=lambda m: (id(m.content), m.metadata.message_type)):
                for reply in self.answer(list(alike)):
                    yield protocol.join(reply, number) if folded and 1 < len(group) < len(messages) else reply
                    if self.on_reply:
                        self.on_reply()

    def answer(self, messages: list[Message]) -> Iterator[Message]:
        """Yield a reply to each of some messages of one content and type, those of one chunk alive together."""
        params = protocol.decode_params(protocol.only(messages[0].content.array_records))
        params = {key: p.to(self.world.trainer.device) for key, p in params.items()}
        if messages[0].metadata.message_type != MessageType.TRAIN:
            yield from self._evaluate(messages, params)
            return
        todo = assignment(protocol.config_of(messages[0]))
        members = [self._member(message) for message in messages]
        size = self.at_once or self._at_once(members, todo)
        pairs = list(zip(messages, members, strict=True))
        for chunk in (pairs[start : start + size] for start in range(0, len(pairs), size)):
            started = time.perf_counter()
            outcomes = self._fit(params, [member for _, member in chunk], todo)
            seconds = (time.perf_counter() - started) / len(chunk)
            for (message, member), outcome in zip(chunk, outcomes, strict=True):
                if isinstance(outcome, Exception):
                    yield (failed if type(outcome) in REASONS else raised)(message, outcome)
                else:
                    yield trained(message, member.partition, outcome, seconds)
            del outcomes

    def _fit(self, params: Tensors, members: list[Member], todo: Assignment) -> list[Report | Exception]:
        """Return what became of each client; if they raise something together, of each by itself: it shows whose it is.

        Raises:
            RuleError: if the rule claims to be vmappable and is not.
        """
        try:
            return Cohort(self.world.trainer, len(members)).fit(params, members, todo)
        except RuleError:
            raise
        except Exception:
            log.debug("a cohort raised", exc_info=True)
        outcomes: list[Report | Exception] = []
        for member in members:
            try:
                outcomes += Cohort(self.world.trainer, 1).fit(params, [member], todo)
            except Exception as error:  # a client's fault must not end the run: it is recorded with the client
                outcomes.append(error)
        return outcomes

    def _evaluate(self, messages: list[Message], params: Tensors) -> Iterator[Message]:
        """Evaluate one model on the held-out samples of many clients."""
        for start in range(0, len(messages), EVALUATED):
            chunk, willing = messages[start : start + EVALUATED], []
            for message in chunk:
                member = self._member(message)
                try:
                    if member.budget is not None:
                        self.world.trainer.evaluation_batch(member.budget)
                    willing.append((message, member))
                except OverBudget as failure:
                    yield failed(message, failure)
            found = evaluate_many(self.world.trainer, params, [member.test for _, member in willing])
            for (message, member), evaluation in zip(willing, found, strict=True):
                yield evaluated(message, member.partition, evaluation)

    def _member(self, message: Message) -> Member:
        client = self.world.client(self.partition_of(message.metadata.dst_node_id))
        return Member(client.partition, client.train, client.test, client.device.budget if client.device else None)

    def _at_once(self, members: list[Member], todo: Assignment) -> int:
        """Return how many clients the free memory holds, by the most demanding one's plan."""
        fits = []
        for member in {(len(member.train), member.budget): member for member in members}.values():
            with suppress(OverBudget):
                fits.append(self.world.trainer.fit_to(len(member.train), todo, member.budget))
        if not fits:
            return 1
        most, samples = max(fits, key=lambda fit: fit.peak), max(len(m.train) + len(m.test) for m in members)
        room = int(SHARE * self._free / self.sharers)
        return min(clients_within(self.world.trainer, most, room, samples), AT_ONCE)

    @cached_property
    def _free(self) -> int:
        """The bytes that are free on the device before the first cohort."""
        device = torch.device(self.world.trainer.device)
        return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
