"""The ClientApp, driven by Flower's own messages: what goes in, what comes out, and how it fails."""

import math

import pytest
import torch
from cases import CLASSES, SHAPE, equal, network
from fedforward import message_bytes, protocol
from fedforward.algorithms import Baffle, MonoForward
from fedforward.client import Client, Trainer, make_client_app
from fedforward.client.app import assignment
from fedforward.client.trainer import Assignment
from fedforward.scalar_wire import UNSAID
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

CONFIG = {"server-round": 2, "lr": 0.1, "epochs": 1, "batch-size": 4}


class Data:
    def __init__(self, size):
        g = torch.Generator().manual_seed(size)
        self.x, self.y = torch.rand(size, *SHAPE, generator=g), torch.randint(CLASSES, (size,), generator=g)

    def __len__(self):
        return len(self.y)

    def batch(self, rows):
        return self.x[rows], self.y[rows]


@pytest.fixture
def send():
    """Return a function that sends one message to the app of a client and returns its reply."""
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 0, 1  # as our engines do

    def run(client, kind, content):
        app = make_client_app(lambda context: client)
        context = Context(1, 5, {"partition-id": 4, "num-partitions": 9}, RecordDict(), {})
        return app(Message(content, dst_node_id=5, message_type=kind), context)

    return run


def client(rule, train=10, test=6):
    return Client(4, Trainer(rule, network("mlp"), seed=0), Data(train), Data(test))


def train_message(client, **config):
    arrays = protocol.encode_params(client.trainer.initial_params())
    return RecordDict({"arrays": arrays, "config": ConfigRecord(CONFIG | config)})


def test_train_answers_with_the_model_that_the_trainer_makes_and_what_it_measured(send):
    c = client(MonoForward())
    reply = send(c, "train", train_message(c))
    wanted = c.trainer.fit(c.trainer.initial_params(), c.train, c.test, 4, Assignment(2, 0.1, 1, 4))
    assert equal(protocol.decode_params(reply.content[protocol.ARRAYS]), wanted.params)
    metrics = dict(reply.content[protocol.METRICS])
    assert metrics.pop("seconds") > 0
    assert metrics == {
        "partition-id": 4, "num-examples": 10, "steps": 3, "batch": 4, "loss": wanted.loss, "accuracy": wanted.accuracy,
        "accuracy-before": wanted.accuracy_before, "accuracy-after": wanted.accuracy_after,
        "peak-bytes": wanted.fit.peak, "fit": [0, 0, 0, 0], "flops": wanted.flops,
    }  # fmt: skip


def test_a_scalar_rule_never_sends_its_model(send):
    c = client(Baffle(directions=3))
    reply = send(c, "train", train_message(c, lr=0.01))
    wanted = c.trainer.fit(c.trainer.initial_params(), c.train, c.test, 4, Assignment(2, 0.01, 1, 4))
    assert not reply.content.array_records
    server_round, fingerprint, scalars = protocol.scalars_of(reply)
    assert torch.equal(scalars, wanted.scalars) and (server_round, fingerprint) == (2, UNSAID)
    assert message_bytes.payload_bytes(reply.content) == message_bytes.scalar_uplink_bytes(9)


def test_a_failure_is_an_error_that_says_why(send):
    c = client(MonoForward())
    reply = send(c, "train", train_message(c, lr=1e30))
    assert not reply.has_content() and reply.error.code == protocol.CLIENT_FAILED
    assert "loss is not finite at step 2 (lr 1e+30): lower --lr" in reply.error.reason
    reply = send(client(MonoForward(), train=0), "train", train_message(c))
    assert reply.error.code == protocol.CLIENT_FAILED and "no samples" in reply.error.reason


def test_evaluate_and_query_answer_with_metrics_alone(send):
    c = client(MonoForward())
    params = c.trainer.initial_params()
    reply = send(c, "evaluate", RecordDict({"renamed": protocol.encode_params(params), "config": ConfigRecord({})}))
    loss, accuracy, _ = c.trainer.evaluate(params, c.test)
    assert dict(reply.content[protocol.METRICS]) == {
        "partition-id": 4, "num-examples": 6, "loss": loss, "accuracy": accuracy,
    }  # fmt: skip
    empty = send(client(MonoForward(), test=0), "evaluate", RecordDict({"arrays": protocol.encode_params(params)}))
    assert math.isnan(empty.content[protocol.METRICS]["loss"]) and empty.content[protocol.METRICS]["num-examples"] == 0
    reply = send(c, "query", RecordDict())
    assert dict(reply.content[protocol.METRICS]) == {"partition-id": 4} and list(reply.content) == [protocol.METRICS]


def test_an_assignment_is_read_from_the_config():
    assert assignment(CONFIG) == Assignment(2, 0.1, 1, 4, evaluate=True, proximal_mu=0.0)
    assert assignment(CONFIG | {"evaluate": False, "proximal-mu": 0.5}) == Assignment(2, 0.1, 1, 4, 0, False, 0.5)
    assert assignment(CONFIG | {"steps": 3}).steps == 3
