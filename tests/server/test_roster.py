"""Clients are known by their partition, whatever Flower calls them and whoever answers first."""

import random
from collections import Counter

import pytest
from fedforward.client import make_client_app
from fedforward.server.roster import CROWD, Roster, most_used
from fedforward.server.rounds import seed_globals
from fedforward.server.strategies import DEFAULTS, STRATEGIES
from fedforward.simulations.engines.inline import InlineGrid
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp.strategy import FedAvg, FedXgbCyclic


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


# ---- a crowd ---------------------------------------------------------------------------------------------------------

FEW = {"fraction_train": 3e-6, "min_train_nodes": 3, "min_available_nodes": 3, "fraction_evaluate": 5e-6}
FEW |= {"min_evaluate_nodes": 5}


def crowd(clients, strategy=None):
    return Roster(InlineGrid(make_client_app(lambda context: None), clients, {}), clients, strategy=strategy)


def sampled(clients, server_round=1, seed=0, **options):
    """Return whom FedAvg trains and evaluates in a round."""
    strategy = FedAvg(**FEW | options)
    roster, found = crowd(clients, strategy), []
    for phase, configure in ((0, strategy.configure_train), (2, strategy.configure_evaluate)):
        seed_globals(seed, server_round, phase)
        messages = configure(server_round, ArrayRecord(), ConfigRecord({"lr": 0.1}), roster)
        found.append([roster.partition[message.metadata.dst_node_id] for message in messages])
    return found


def test_nodes_of_a_range_are_believed_and_never_listed():
    roster = crowd(10**9)
    assert len(roster.partition) == 10**9 and roster.partition[10**9] == 10**9 - 1
    for stranger in (0, 10**9 + 1):
        with pytest.raises(KeyError):
            roster.partition[stranger]
    assert crowd(4).partition == {1: 0, 2: 1, 3: 2, 4: 3}
    assert Roster(InlineGrid(make_client_app(lambda context: None), 9, {}), 4).get_node_ids() == [1, 2, 3, 4]


def test_up_to_a_crowd_flower_samples_from_all_nodes():
    seed_globals(0, 1, 0)
    nodes = random.sample(list(range(1, CROWD + 1)), 3)
    assert sampled(CROWD)[0] == [node - 1 for node in nodes]
    assert crowd(CROWD, FedAvg(**FEW)).get_node_ids() == list(range(1, CROWD + 1))


def test_of_a_crowd_flower_is_offered_as_many_as_it_can_use():
    roster = crowd(CROWD + 1, FedAvg(**FEW))
    offers = [roster.get_node_ids() for _ in range(300)]
    assert all(len(set(offer)) == 5 and offer == sorted(offer) for offer in offers)
    assert len({node for offer in offers for node in offer}) > 1300 and max(map(max, offers)) <= CROWD + 1


def test_who_of_a_crowd_is_sampled_is_of_seed_and_round_alone():
    train, evaluate = sampled(10**6)
    assert (len(set(train)), len(set(evaluate))) == (3, 5) and sampled(10**6) == [train, evaluate]
    assert train != sampled(10**6, server_round=2)[0] and train != sampled(10**6, seed=1)[0]
    drawn = Counter(client // 250_000 for t in range(200) for client in sampled(10**6, server_round=t)[1])
    assert all(200 < count < 300 for count in drawn.values())  # of 1000, a quarter each


@pytest.mark.parametrize("clients", [20_000])
def test_a_strategy_that_may_use_more_is_offered_all(clients):
    class Own(FedAvg):
        def configure_train(self, server_round, arrays, config, grid):
            return super().configure_train(server_round, arrays, config, grid)

    class Inherited(FedAvg):
        pass

    all_of_them = [FedAvg(**FEW | {"fraction_train": 0.01}), FedAvg(), Own(**FEW), FedXgbCyclic()]
    assert [most_used(strategy, clients) for strategy in all_of_them] == [clients] * 4
    assert most_used(Inherited(**FEW), clients) == 5
    assert most_used(FedAvg(**FEW | {"min_available_nodes": 10**6}), clients) == clients
    for name, kind in STRATEGIES.items():
        more = {"fedscalar": {"rule": None, "seed": 0}, "fedprojection": {"seed": 0}}.get(name, DEFAULTS.get(name, {}))
        assert most_used(kind(**FEW, **more), clients) == 5
    assert len(sampled(clients, fraction_train=0.01)[0]) == 200
    assert len(crowd(clients).get_node_ids()) == clients  # nobody said who samples
