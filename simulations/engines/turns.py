"""What the pool keeps of one round: who is asked what, in which order replies are due, and those that came early."""

from __future__ import annotations

from collections import deque
from typing import Any

from flwr.app import ArrayRecord, Message

from ... import protocol
from ...algorithms.rule import Tensors
from .local import own
from .worker import IN_PLACE, Packed, pack


class Turns:
    """The messages of a round, in the order in which their replies are due.

    Args:
        groups: whom a worker answers together.
        folded: the models of each group are summed.
    """

    def __init__(self, groups: list[list[Message]], folded: bool) -> None:
        self.messages = [message for group in groups for message in group]
        self.group: dict[int, int] = {}  # of each turn whose model is summed with others'
        self.queue: deque[tuple[int, ...]] = deque()  # turns of the jobs to come
        self.done: dict[int, tuple[Message, Any, int]] = {}  # reply, and whose place is free after it
        for number, group in enumerate(groups):
            first = self.queue[-1][-1] + 1 if self.queue else 0
            self.queue.append(tuple(range(first, first + len(group))))
            if folded and len(group) > 1:
                self.group |= dict.fromkeys(self.queue[-1], number)

    def note(self, turn: int, reply: Message, worker: Any = None, place: int = 0) -> None:
        """Note a reply; with a worker, its place is free when the reply has been seen."""
        if turn in self.group:
            protocol.join(reply, self.group[turn])
        self.done[turn] = reply, worker, place

    def clear(self, worker: Any) -> None:
        """Free a place of a worker by copying a reply whose turn has not come."""
        for turn, (reply, whose, place) in self.done.items():
            if whose is worker:
                self.done[turn] = own(reply), None, 0
                worker.free.append(place)
                return

    def keep(self, worker: Any) -> None:
        """Copy all replies that lie in a worker's places."""
        for turn, (reply, whose, _) in self.done.items():
            if whose is worker:
                self.done[turn] = own(reply), None, 0


class Contents:
    """What the messages of a round hold, packed; one model that all share is put where the workers see it.

    Attributes:
        shared: whether all hold the same.
    """

    def __init__(self, messages: list[Message], shared: Tensors) -> None:
        self.packed: dict[int, Packed] = {}
        distinct = {id(message.content): message.content for message in messages}
        self.shared = len(distinct) == 1
        if self.shared:
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
