"""The Flower ClientApp: train, evaluate and query, the same code in a simulation and on a device."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp

from .. import protocol
from ..algorithms.rule import Tensors
from ..scalar_wire import UNSAID
from .audit import AuditFailed
from .budget import Device
from .fitting import OverBudget
from .following import OutOfStep, follow
from .trainer import Assignment, Evaluation, LocalData, Report, Trainer, TrainingFailed

# What a client says itself when it cannot give an update, by Flower error code.
REASONS = {
    TrainingFailed: protocol.CLIENT_FAILED,
    OverBudget: protocol.OVER_BUDGET,
    AuditFailed: protocol.AUDIT_FAILED,
    OutOfStep: protocol.OUT_OF_STEP,
}


@dataclass(frozen=True)
class Client:
    """One client: whose partition it is, its data, what trains it, and the device it runs on (None: without limits)."""

    partition: int
    trainer: Trainer
    train: LocalData
    test: LocalData  # held out from training, for accuracy before and after
    device: Device | None = None


def make_client_app(load: Callable[[Context], Client], workspace: Tensors | None = None) -> ClientApp:
    """Return the app that serves the client which `load` makes of a node's context.

    Args:
        load: makes a client.
        workspace: parameters in whose memory one client trains after the other; None for memory of each one's own.
    """
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        started, client = time.perf_counter(), load(context)
        todo = assignment(protocol.config_of(message))
        budget = client.device.budget if client.device else None
        try:
            params, found_at = received(message, context, client.trainer, workspace)
            report = client.trainer.fit(params, client.train, client.test, client.partition, todo, budget)
        except tuple(REASONS) as failure:
            return failed(message, failure)
        return trained(message, client.partition, report, time.perf_counter() - started, found_at)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        client = load(context)
        try:
            params, _ = received(message, context, client.trainer, workspace)
            size = client.trainer.evaluation_batch(client.device.budget) if client.device else 1000
        except tuple(REASONS) as failure:
            return failed(message, failure)
        return evaluated(message, client.partition, client.trainer.evaluate(params, client.test, size))

    @app.query()
    def query(message: Message, context: Context) -> Message:
        values = {protocol.PARTITION: float(context.node_config["partition-id"])}
        metrics = protocol.encode_metrics((protocol.PARTITION,), values)
        return Message(RecordDict({protocol.METRICS: metrics}), reply_to=message)

    return app


def received(message: Message, context: Context, trainer: Trainer, workspace: Tensors | None) -> tuple[Tensors, bytes]:
    """Return the model that a message speaks of, in `workspace` if there is one, and a fingerprint if it was made here.

    Raises:
        OutOfStep: if the message has no model, and what this node holds is not enough to make it.
    """
    if protocol.NEWS not in message.content:
        return protocol.decode_params(protocol.only(message.content.array_records), workspace), UNSAID
    params, found_at = follow(message, context.state, trainer.replica)
    if workspace:
        for key, p in params.items():
            workspace[key].copy_(p)
    return workspace or params, found_at


def trained(message: Message, partition: int, report: Report, seconds: float, found_at: bytes = UNSAID) -> Message:
    """Return the answer of a client that has trained, in so many seconds of this machine, at a model."""
    measured = {
        protocol.PARTITION: partition,
        protocol.SAMPLES: report.samples,
        "steps": report.steps,
        "batch": report.batch,
        "loss": report.loss,
        "accuracy": report.accuracy,
        "accuracy-before": report.accuracy_before,
        "accuracy-after": report.accuracy_after,
        "peak-bytes": report.fit.peak,
        "fit": (report.fit.micro_batch, report.fit.abreast, report.fit.chunk, report.fit.rank),
        "flops": report.flops,
        "seconds": seconds,
    }
    if report.scalars is None:
        return protocol.LiveReply(message, protocol.Trained(report.params, None, measured))
    answer = protocol.Trained({}, report.scalars, measured, round=report.round, fingerprint=found_at)
    return protocol.LiveReply(message, answer)


def evaluated(message: Message, partition: int, evaluation: Evaluation) -> Message:
    """Return the answer of a client that has evaluated a model."""
    loss, accuracy, samples = evaluation
    values = {protocol.PARTITION: partition, protocol.SAMPLES: samples, "loss": loss, "accuracy": accuracy}
    metrics = protocol.encode_metrics(protocol.EVALUATE_METRICS, values)
    return Message(RecordDict({protocol.METRICS: metrics}), reply_to=message)


def failed(message: Message, failure: Exception) -> Message:
    """Return the answer of a client that cannot do as it is asked, for one of the `REASONS`."""
    return Message(Error(REASONS[type(failure)], str(failure)), reply_to=message)


def assignment(config: dict) -> Assignment:
    """Read a round's assignment from the config record of a train message."""
    return Assignment(
        round=int(config["server-round"]),
        lr=float(config["lr"]),
        epochs=int(config["epochs"]),
        batch_size=int(config["batch-size"]),
        steps=int(config.get("steps", 0)),
        evaluate=bool(config.get("evaluate", True)),
        proximal_mu=float(config.get("proximal-mu", 0.0)),
        projection=int(config.get("projection", 0)),
    )
