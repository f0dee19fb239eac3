"""Who the clients are: a grid whose nodes stand in the order of their partitions.

Flower's node ids are random, so a client is known by the partition of the data it holds. This grid lists nodes by
partition and hands replies back by partition; with sampling and summation in that order, one experiment gives the same
numbers on every engine, whatever the node ids and whoever answers first.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from .. import protocol
from .fold import groups_of
from .strategies import STRATEGIES

CROWD = 10_000  # nodes; of more, a strategy is offered no more than it can use


class Believed(Mapping[int, int]):
    """Which partition each of a range of nodes holds, asked for when it is wanted."""

    def __init__(self, nodes: range, partition_of: Callable[[int], int]) -> None:
        self.nodes, self.partition_of = nodes, partition_of

    def __len__(self) -> int:
        return len(self.nodes)

    def __iter__(self) -> Iterator[int]:
        return iter(self.nodes)

    def __getitem__(self, node: int) -> int:
        if node not in self.nodes:
            raise KeyError(node)
        return self.partition_of(node)


class Roster(Grid):
    """A grid around `grid`, ordered by partition.

    Args:
        grid: any Flower grid. If it has a method `partition_of(node_id)` that is believed, and so is a range of node
            ids to stand in the order of partitions; else nodes are asked once.
        clients: how many clients to wait for.
        patience: seconds to wait for them.
        strategy: who will sample the nodes; None is offered all of them.

    Raises:
        TimeoutError: if fewer than `clients` nodes came or answered in time.
    """

    def __init__(self, grid: Grid, clients: int, patience: float = 300.0, strategy: Strategy | None = None) -> None:
        self.grid = grid
        nodes = self._wait_for_nodes(clients, patience)
        known = getattr(grid, "partition_of", None)
        if known and isinstance(nodes, range):
            self.partition: Mapping[int, int] = Believed(nodes[:clients], known)
            self.nodes: Sequence[int] = nodes[:clients]
        else:
            partitions = {node: known(node) for node in nodes} if known else self._ask(nodes, patience)
            if len(partitions) < clients:
                raise TimeoutError(f"{len(partitions)} of {clients} clients said which partition they hold")
            self.partition = dict(sorted(partitions.items(), key=lambda item: item[1])[:clients])
            self.nodes = list(self.partition)
        self.offered = most_used(strategy, clients) if strategy and clients > CROWD else clients

    def _wait_for_nodes(self, clients: int, patience: float) -> Sequence[int]:
        deadline = time.monotonic() + patience
        while len(nodes := _indexable(self.grid.get_node_ids())) < clients:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{len(nodes)} of {clients} clients came within {patience:g} s")
            time.sleep(0.2)
        return nodes

    def _ask(self, nodes: Sequence[int], patience: float) -> dict[int, int]:
        questions = [Message(RecordDict(), dst_node_id=node, message_type="query") for node in nodes]
        answers = self.grid.send_and_receive(questions, timeout=patience)
        return {
            answer.metadata.src_node_id: int(protocol.only(answer.content.metric_records)[protocol.PARTITION])
            for answer in answers
            if answer.has_content()
        }

    def get_node_ids(self) -> list[int]:
        """Return the nodes in the order of their partitions: all, or of a crowd as many as the strategy can use.

        These are drawn anew each time from the generator that Flower's own sampling draws from next, which the round
        loop seeds by its place. A uniform sample of a uniform sample is one of all nodes.
        """
        if self.offered == len(self.nodes):
            return list(self.nodes)
        return [self.nodes[i] for i in sorted(random.sample(range(len(self.nodes)), self.offered))]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Send messages and return the replies in the order of their senders' partitions."""
        replies = self.grid.send_and_receive(messages, timeout=timeout)
        return sorted(replies, key=lambda reply: self.partition[reply.metadata.src_node_id])

    def stream(
        self, messages: Iterable[Message], *, timeout: float | None = None, folded: bool = False
    ) -> Iterator[Message]:
        """Send messages and yield the replies, most work first; a reply's arrays are valid until the next is asked for.

        A grid with a method `stream` of its own gives each reply as soon as its turn has come, in that same order.

        Args:
            messages: what is asked.
            timeout: seconds to wait; None for ever.
            folded: the replies' models will be summed, in groups (see `fold`).
        """
        stream = getattr(self.grid, "stream", None)
        if stream:
            yield from stream(messages, folded=folded)
            return
        for message in messages:
            message.content = protocol.sent(message)
        replies = self.grid.send_and_receive(messages, timeout=timeout)
        ordered = sorted(replies, key=lambda reply: (-work_of(reply), self.partition[reply.metadata.src_node_id]))
        yield from (reply for reply in ordered if reply.has_error())
        answers = [reply for reply in ordered if reply.has_content()]
        for number, group in enumerate(groups_of(answers, work_of) if folded else ([reply] for reply in answers)):
            yield from (protocol.join(reply, number) if len(group) > 1 else reply for reply in group)

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


def most_used(strategy: Strategy, clients: int) -> int:
    """Return how many of `clients` nodes are enough for a strategy to choose from; all, if that cannot be told.

    One that samples as FedAvg does takes int(fraction × nodes offered), or a minimum if that is more. Where the minimum
    is more for all clients, as in our experiments, it is so for fewer, and as many nodes as it says are enough.
    """
    for way in ("configure_train", "configure_evaluate"):
        if getattr(type(strategy), way) not in {getattr(kind, way) for kind in STRATEGIES.values()}:
            return clients
    s = strategy
    if int(clients * s.fraction_train) > s.min_train_nodes or int(clients * s.fraction_evaluate) > s.min_evaluate_nodes:
        return clients
    return min(max(s.min_train_nodes, s.min_evaluate_nodes, s.min_available_nodes), clients)


def _indexable(nodes: Iterable[int]) -> Sequence[int]:
    return nodes if isinstance(nodes, range) else list(nodes)


def work_of(reply: Message) -> float:
    """Return what a reply says that its training cost, in FLOPs; 0 where it says nothing."""
    if not reply.has_content():
        return 0.0
    return protocol.only(reply.content.metric_records).get("flops", 0.0)
