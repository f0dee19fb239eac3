"""The inline engine: clients run in this process, one after the other.

A Flower Grid whose nodes are the partitions of the data. Messages and replies are Flower's own objects, handed over
without being serialised; the server counts their bytes exactly as Flower would send them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import count
from logging import getLogger
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

# Flower stamps messages with the identity of the task that makes them, and outside its own runtimes nobody sets it.
# This is the one internal name of Flower that we touch; it is checked with flwr 1.41, the range in pyproject.toml.
from flwr.supercore.task_identity import TaskIdentity

log = getLogger("fedforward")
CLIENT_RAISED = 2  # Flower's error code of a ClientApp that raised an exception


class InlineGrid(Grid):
    """Runs a ClientApp in process. Node n holds partition n − 1.

    Args:
        app: the client app.
        clients: number of nodes.
        run_config: what every client finds in `context.run_config`.
        on_reply: called after each client, for progress.
    """

    def __init__(
        self, app: ClientApp, clients: int, run_config: dict[str, Any], on_reply: Callable[[], None] | None = None
    ) -> None:
        self.app, self.clients, self.run_config, self.on_reply = app, clients, run_config, on_reply
        self._states: dict[int, RecordDict] = {}  # of clients that keep one
        self._replies: dict[str, Message] = {}
        self._pushed = count()
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 0, 1

    def partition_of(self, node_id: int) -> int:
        """Return the partition that a node holds."""
        return node_id - 1

    def get_node_ids(self) -> Iterable[int]:
        """Return all nodes, in the order of their partitions."""
        return range(1, self.clients + 1)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Run the client of each message and return the replies. There is nothing to wait for: no timeout."""
        replies = []
        for message in messages:
            replies.append(self._run_client(message))
            if self.on_reply:
                self.on_reply()
        return replies

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Run the clients and keep their replies for `pull_messages`."""
        ids = []
        for message in messages:
            ids.append(f"{next(self._pushed)}-{message.metadata.dst_node_id}")
            self._replies[ids[-1]] = self._run_client(message)
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

    def _run_client(self, message: Message) -> Message:
        node = message.metadata.dst_node_id
        context = Context(
            run_id=1,
            node_id=node,
            node_config={"partition-id": self.partition_of(node), "num-partitions": self.clients},
            state=self._states.get(node) or RecordDict(),
            run_config=self.run_config,
        )
        try:
            reply = self.app(message, context)
        except Exception as error:  # a client's fault must not end the run: it is recorded with the client
            log.debug("client %d raised", self.partition_of(node), exc_info=True)
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            return Message(Error(CLIENT_RAISED, reason), reply_to=message)
        if context.state:
            self._states[node] = context.state
        return reply
