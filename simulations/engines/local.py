"""What the engines of one machine share: a Flower Grid whose nodes are the partitions of the data.

Node n holds partition n − 1. Messages and replies are Flower's own objects; between a client and the server of one
process nothing is serialised, and the server counts bytes exactly as Flower would send them.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import count
from logging import getLogger
from operator import itemgetter
from typing import Any, Self

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

# Flower stamps messages with the identity of the task that makes them, and outside its own runtimes nobody sets it.
# This is the one internal name of Flower that we touch; it is checked with flwr 1.41, the range in pyproject.toml.
from flwr.supercore.task_identity import TaskIdentity

from ... import protocol
from ...server.fold import groups_of, shares

log = getLogger("fedforward")
CLIENT_RAISED = 2  # Flower's error code of a ClientApp that raised an exception
Work = Callable[[Message], Callable[[int], float]]  # message -> partition -> FLOPs of answering what it says


class LocalGrid(Grid):
    """A grid of clients on this machine.

    Args:
        clients: number of nodes.
        on_reply: called after each client, for progress.
        work: says what a message will cost; the most expensive is answered first, so that no worker is left with it.
    """

    def __init__(self, clients: int, on_reply: Callable[[], None] | None = None, work: Work | None = None) -> None:
        self.clients, self.on_reply, self.work = clients, on_reply, work
        self._replies: dict[str, Message] = {}
        self._pushed = count()
        assume_identity()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Let go of whatever the engine holds."""

    @abstractmethod
    def stream(self, messages: Iterable[Message], *, folded: bool = False) -> Iterator[Message]:
        """Yield a reply to each message, most work first; its arrays are valid until the next is asked for.

        Args:
            messages: what is asked.
            folded: the replies' models will be summed, in groups (see `server.fold`): an engine may do that itself.
        """

    def in_order(self, messages: Iterable[Message]) -> list[Message]:
        """Return messages in the order in which they are answered: most work first, equal ones by partition."""
        return [message for message, _ in self._with_work(messages)]

    def in_groups(self, messages: Iterable[Message]) -> list[list[Message]]:
        """Return messages in that order, in the groups in which their models are summed."""
        return [[message for message, _ in group] for group in groups_of(self._with_work(messages), itemgetter(1))]

    def in_cohorts(self, messages: Sequence[Message], devices: Sequence[str]) -> list[list[Message]]:
        """Return messages in that order, and who are to train side by side, if there is memory.

        On a CPU, whose caches like few, these are the groups, if there are any; else each device takes its share.
        """
        pairs = self._with_work(messages)
        groups = groups_of(pairs, itemgetter(1))
        if devices[0] != "cpu" or len(groups) == len(pairs):
            groups = shares(pairs, itemgetter(1), len(devices))
        return [[message for message, _ in group] for group in groups]

    def _with_work(self, messages: Iterable[Message]) -> list[tuple[Message, float]]:
        """Return messages with the FLOPs of answering each, most work first, equal ones by partition."""
        asked: dict[int, Callable[[int], float]] = {}  # what many are asked is looked at once
        found = []
        for message in messages:
            partition, content = self.partition_of(message.metadata.dst_node_id), id(message.content)
            if content not in asked:
                asked[content] = self.work(message) if self.work else lambda partition: 0
            found.append((-asked[content](partition), partition, message))
        found.sort(key=itemgetter(0, 1))
        return [(message, -work) for work, _, message in found]

    def partition_of(self, node_id: int) -> int:
        """Return the partition that a node holds."""
        return node_id - 1

    def get_node_ids(self) -> Iterable[int]:
        """Return all nodes, in the order of their partitions."""
        return range(1, self.clients + 1)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Return the reply to each message, in their order. There is nothing to wait for: no timeout."""
        messages = list(messages)
        replies = {reply.metadata.src_node_id: own(reply) for reply in self.stream(messages)}
        return [replies[message.metadata.dst_node_id] for message in messages]

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Run the clients and keep their replies for `pull_messages`."""
        ids = []
        for reply in self.send_and_receive(messages):
            ids.append(f"{next(self._pushed)}-{reply.metadata.src_node_id}")
            self._replies[ids[-1]] = reply
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Return the replies to pushed messages, each once."""
        return [self._replies.pop(i) for i in list(message_ids) if i in self._replies]

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """Return a new message to a node."""
        return Message(content, dst_node_id, message_type, group_id=group_id, ttl=ttl)

    def set_run(self, run: Any) -> None:
        """Do nothing: this grid is one run."""

    @property
    def run(self) -> Any:
        """There is no run object outside Flower's runtimes."""
        return None


class Nodes:
    """Runs a ClientApp as any of the nodes, and keeps the state of those that have one.

    Args:
        app: the client app.
        clients: number of nodes.
        run_config: what every client finds in `context.run_config`.
    """

    def __init__(self, app: ClientApp, clients: int, run_config: dict[str, Any]) -> None:
        self.app, self.clients, self.run_config = app, clients, run_config
        self.states: dict[int, RecordDict] = {}

    def answer(self, message: Message) -> Message:
        """Return the reply of the node that a message is for; what the app raises becomes an error reply."""
        node = message.metadata.dst_node_id
        context = Context(
            run_id=1,
            node_id=node,
            node_config={"partition-id": node - 1, "num-partitions": self.clients},
            state=self.states.get(node) or RecordDict(),
            run_config=self.run_config,
        )
        try:
            reply = self.app(message, context)
        except Exception as error:  # a client's fault must not end the run: it is recorded with the client
            log.debug("client %d raised", node - 1, exc_info=True)
            return raised(message, error)
        if context.state:
            self.states[node] = context.state
        return reply


def raised(message: Message, error: Exception) -> Message:
    """Return the reply of a client that raised something; one line."""
    return Message(Error(CLIENT_RAISED, f"{type(error).__name__}: {' '.join(str(error).split())}"), reply_to=message)


def own(reply: Message) -> Message:
    """Return a reply whose arrays outlive the next one."""
    return protocol.kept(reply) if reply.has_content() else reply


def assume_identity() -> None:
    """Let this process make Flower messages."""
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 0, 1
