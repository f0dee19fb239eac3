"""Clients are known by their partition, whatever Flower calls them and whoever answers first."""

import pytest
from fedforward.client import make_client_app
from fedforward.server.roster import Roster
from fedforward.simulations.engines.inline import InlineGrid
from flwr.app import Message, RecordDict


class Shuffled:
    """Nodes in no order, whose answers come last first, and which must be asked what they hold."""

    def __init__(self, grid):
        self.grid = grid

    def get_node_ids(self):
        return [3, 1, 4, 2]

    def send_and_receive(self, messages, *, timeout=None):
        return self.grid.send_and_receive(messages)[::-1]


def test_nodes_and_replies_stand_in_the_order_of_partitions():
    roster = Roster(Shuffled(InlineGrid(make_client_app(lambda context: None), 4, {})), 4)
    assert roster.partition == {1: 0, 2: 1, 3: 2, 4: 3} and roster.get_node_ids() == [1, 2, 3, 4]
    questions = [Message(RecordDict(), dst_node_id=node, message_type="query") for node in (3, 4, 1)]
    assert [reply.metadata.src_node_id for reply in roster.send_and_receive(questions)] == [1, 3, 4]


def test_too_few_clients_are_told():
    grid = InlineGrid(make_client_app(lambda context: None), 2, {})
    with pytest.raises(TimeoutError, match="2 of 3 clients came within 0 s"):
        Roster(grid, 3, patience=0.0)
