"""The inline engine: clients run in this process, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from flwr.app import Message
from flwr.clientapp import ClientApp

from ... import protocol
from .local import LocalGrid, Nodes, Work


class InlineGrid(LocalGrid):
    """Runs a ClientApp in process.

    Args:
        app: the client app.
        clients: number of nodes.
        run_config: what every client finds in `context.run_config`.
        on_reply: called after each client, for progress.
        work: says what a message will cost.
    """

    def __init__(
        self,
        app: ClientApp,
        clients: int,
        run_config: dict[str, Any],
        on_reply: Callable[[], None] | None = None,
        work: Work | None = None,
    ) -> None:
        super().__init__(clients, on_reply, work)
        self.nodes = Nodes(app, clients, run_config)

    def stream(self, messages: Iterable[Message], *, folded: bool = False) -> Iterator[Message]:
        """Run the client of each message and yield its reply."""
        groups = self.in_groups(messages) if folded else [[message] for message in self.in_order(messages)]
        for number, group in enumerate(groups):
            for message in group:
                reply = self.nodes.answer(message)
                yield protocol.join(reply, number) if len(group) > 1 else reply
                if self.on_reply:
                    self.on_reply()
