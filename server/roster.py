"""Who the clients are: a grid whose nodes stand in the order of their partitions.

Flower's node ids are random, so a client is known by the partition of the data it holds. This grid lists nodes by
partition and hands replies back by partition; with sampling and summation in that order, one experiment gives the same
numbers on every engine, whatever the node ids and whoever answers first.
"""

from __future__ import annotations

import time
from collections.abc import Iterable

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from .. import protocol


class Roster(Grid):
    """A grid around `grid`, ordered by partition.

    Args:
        grid: any Flower grid. If it has a method `partition_of(node_id)` that is believed, else nodes are asked once.
        clients: how many clients to wait for.
        patience: seconds to wait for them.

    Raises:
        TimeoutError: if fewer than `clients` nodes came or answered in time.
    """

    def __init__(self, grid: Grid, clients: int, patience: float = 300.0) -> None:
        self.grid = grid
        nodes = self._wait_for_nodes(clients, patience)
        known = getattr(grid, "partition_of", None)
        partitions = {node: known(node) for node in nodes} if known else self._ask(nodes, patience)
        if len(partitions) < clients:
            raise TimeoutError(f"{len(partitions)} of {clients} clients said which partition they hold")
        self.partition = dict(sorted(partitions.items(), key=lambda item: item[1])[:clients])

    def _wait_for_nodes(self, clients: int, patience: float) -> list[int]:
        deadline = time.monotonic() + patience
        while len(nodes := list(self.grid.get_node_ids())) < clients:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{len(nodes)} of {clients} clients came within {patience:g} s")
            time.sleep(0.2)
        return nodes

    def _ask(self, nodes: list[int], patience: float) -> dict[int, int]:
        questions = [Message(RecordDict(), dst_node_id=node, message_type="query") for node in nodes]
        answers = self.grid.send_and_receive(questions, timeout=patience)
        return {
            answer.metadata.src_node_id: int(protocol.only(answer.content.metric_records)[protocol.PARTITION])
            for answer in answers
            if answer.has_content()
        }

    def get_node_ids(self) -> list[int]:
        """Return the nodes in the order of their partitions."""
        return list(self.partition)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Send messages and return the replies in the order of their senders' partitions."""
        replies = self.grid.send_and_receive(messages, timeout=timeout)
        return sorted(replies, key=lambda reply: self.partition[reply.metadata.src_node_id])

    def set_run(self, run) -> None:
        """Pass on."""
        self.grid.set_run(run)

    @property
    def run(self):
        """Run information of the grid behind."""
        return self.grid.run

    def create_message(self, *args, **kwargs) -> Message:
        """Pass on."""
        return self.grid.create_message(*args, **kwargs)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Pass on."""
        return self.grid.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Pass on."""
        return self.grid.pull_messages(message_ids)
