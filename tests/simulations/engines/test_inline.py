"""The inline engine is a Flower grid: its nodes, its messages, its clients' own state."""

import pytest
from fedforward.simulations.engines.inline import InlineGrid
from fedforward.simulations.engines.local import CLIENT_RAISED
from flwr.app import Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid


@pytest.fixture
def seen():
    return []


@pytest.fixture
def grid(seen):
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        partition = context.node_config["partition-id"]
        seen.append((partition, context.node_config["num-partitions"], context.run_config["lr"]))
        if partition == 2:
            raise ZeroDivisionError("a fault\nof the client")
        visits = int(context.state["visits"]["n"]) + 1 if "visits" in context.state else 1
        if partition:
            context.state["visits"] = MetricRecord({"n": visits})
        return Message(RecordDict({"metrics": MetricRecord({"visits": visits})}), reply_to=message)

    return InlineGrid(app, 4, {"lr": 0.5}, on_reply=lambda: seen.append("reply"))


def to(*nodes):
    return [Message(RecordDict(), dst_node_id=node, message_type="train") for node in nodes]


def visits(reply):
    return reply.content["metrics"]["visits"]


def test_nodes_are_the_partitions_in_order(grid):
    assert isinstance(grid, Grid)
    assert list(grid.get_node_ids()) == [1, 2, 3, 4]
    assert [grid.partition_of(node) for node in grid.get_node_ids()] == [0, 1, 2, 3]


def test_a_message_reaches_its_client_and_the_reply_its_sender(grid, seen):
    replies = grid.send_and_receive(to(4, 1))
    assert seen == [(0, 4, 0.5), "reply", (3, 4, 0.5), "reply"]
    assert [reply.metadata.src_node_id for reply in replies] == [4, 1]


def test_a_client_keeps_its_state_between_rounds(grid):
    for expected in (1, 2, 3):
        one, stateless = grid.send_and_receive(to(2, 1))
        assert (visits(one), visits(stateless)) == (expected, 1)


def test_a_client_that_raises_becomes_an_error_reply(grid):
    good, bad = grid.send_and_receive(to(1, 3))
    assert good.has_content() and not bad.has_content()
    assert (bad.error.code, bad.error.reason) == (CLIENT_RAISED, "ZeroDivisionError: a fault of the client")
    assert bad.metadata.src_node_id == 3


def test_an_interrupt_is_not_a_clients_fault():
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        InlineGrid(app, 1, {}).send_and_receive(to(1))


def test_push_and_pull(grid):
    first, second = grid.push_messages(to(1, 2))
    (pulled,) = grid.pull_messages([first])
    assert pulled.metadata.src_node_id == 1
    assert grid.pull_messages([first]) == []
    (third,) = grid.push_messages(to(2))
    assert len({first, second, third}) == 3
    assert [visits(reply) for reply in grid.pull_messages([second, third])] == [1, 2]


def test_create_message_is_flowers(grid):
    message = grid.create_message(RecordDict(), "train", 2, "1")
    assert visits(grid.send_and_receive([message])[0]) == 1


def test_a_million_clients_cost_nothing_until_they_are_asked(grid):
    crowd = InlineGrid(grid.nodes.app, 1_000_000, {"lr": 0.1})
    (reply,) = crowd.send_and_receive(to(1_000_000))
    assert visits(reply) == 1 and len(crowd.nodes.states) == 1
