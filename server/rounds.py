"""The round loop: sample, send, aggregate, evaluate, record, checkpoint, resume.

Flower's `Strategy.start` is one call from the first round to the last. This loop makes the same calls of the public
Strategy API in the same order, so any Flower strategy runs unchanged, and after each round everything is on disk.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message
from flwr.serverapp import Grid

from .. import protocol
from ..algorithms.seeds import Purpose, integer_seed
from . import checkpoint, scalars
from .job import Job
from .roster import Roster
from .rows import AUDIT_FAILED, OVER_BUDGET, STATUS, Row, Sizes, answer_columns, mean, number, totals


class RunFailed(RuntimeError):
    """A run cannot go on; one line that says why. What was committed before stays."""


class AllClientsFailed(RunFailed):
    """No client of a round came back with an update."""


class AuditFailed(RunFailed):
    """A client used other memory than it had planned."""


def run_rounds(job: Job, grid: Grid) -> ArrayRecord:
    """Run, or go on with, all rounds of a job and return the final model.

    A run whose records hold round r goes on with round r + 1, from that round's checkpoint.

    Raises:
        AllClientsFailed: if a round ends without a single update, naming the first reason; not if all that were
            sampled are over budget and others are not known to be.
        AuditFailed: after a round in which an audited client used other memory than planned; the round is committed
            without its update, if any client gave one.
        RunFailed: if the strategy or the evaluation on the server raises something.
        TimeoutError: if too few clients come.
    """
    loop = _Loop(**vars(job), roster=Roster(grid, job.plan.clients))
    done = job.records.last_round()
    if done < 0:
        arrays, done = job.initial, 0
        loop.commit_initial(arrays)
    else:
        saved = checkpoint.load(job.records.checkpoint_path(done).read_bytes())
        arrays = saved.arrays
        vars(job.strategy).update(saved.strategy)
    for server_round in range(done + 1, job.plan.rounds + 1):
        arrays = loop.round(server_round, arrays)
    return arrays


@dataclass(kw_only=True)
class _Loop(Job):
    """A job on its grid."""

    roster: Roster

    def commit_initial(self, arrays: ArrayRecord) -> None:
        loss, accuracy = self._evaluate_server(arrays)
        row = {"round": 0, "loss": number(loss), "accuracy": number(accuracy)}
        zeros = ("clients", "over_budget", "failed", "bytes_down", "bytes_up", "wire_down", "wire_up", "flops")
        row |= dict.fromkeys(zeros, 0)
        row |= {"seconds": 0.0, "model_sha256": model_hash(arrays)}
        self.records.commit_round(row, [], [], self._checkpoint(0, arrays))

    def round(self, server_round: int, arrays: ArrayRecord) -> ArrayRecord:
        """Run one round, commit it, and return the new model."""
        started = time.perf_counter()
        lr, evaluates = self.plan.learning_rate(server_round), self.plan.evaluates(server_round)
        clients, arrays = self._train(server_round, arrays, lr, evaluates)
        row: Row = {"round": server_round, "learning_rate": lr, **totals(clients)}
        evaluations: list[Row] = []
        if evaluates:
            evaluations = self._evaluate_clients(server_round, arrays)
            loss, accuracy = self._evaluate_server(arrays)
            row |= {"loss": number(loss), "accuracy": number(accuracy)}
            row |= {"client_accuracy": mean(evaluations, "accuracy"), "client_loss": mean(evaluations, "loss")}
        averaged = getattr(self.strategy, "averaged", None)
        row["scalars"] = scalars.to_blob(averaged) if isinstance(averaged, torch.Tensor) else None
        row["model_sha256"] = model_hash(arrays)
        saved = self._checkpoint(server_round, arrays)
        row["seconds"] = time.perf_counter() - started  # all of the round but its commit
        self.records.commit_round(row, clients, evaluations, saved)
        if self.observer:
            self.observer.round_done(row, clients)
        self._check_audits(server_round, clients)
        return arrays

    def _check_audits(self, server_round: int, clients: list[Row]) -> None:
        """Raise AuditFailed if a client's memory was not the planned one; its update is in no model."""
        failed = [row for row in clients if row["status"] == AUDIT_FAILED]
        if failed:
            first, more = failed[0], len(failed) - 1
            others = f" (and {more} more client{'s' * (more > 1)} failed it)" if more else ""
            raise AuditFailed(
                f"audit of round {server_round}: client {first['client']} with rule {first['rule']} {first['reason']}"
                f"{others}: mend the rule, whose memory must follow from shapes alone, and go on with --resume"
            )

    def _train(
        self, server_round: int, arrays: ArrayRecord, lr: float, evaluates: bool
    ) -> tuple[list[Row], ArrayRecord]:
        config = protocol.train_config(
            server_round=server_round, lr=lr, epochs=self.plan.epochs, batch_size=self.plan.batch_size,
            evaluate=evaluates,
        )  # fmt: skip
        seed_globals(self.plan.seed, server_round, 0)
        with _named(f"strategy {type(self.strategy).__name__}"):
            messages = list(self.strategy.configure_train(server_round, arrays, config, self.roster))
        if self.observer:
            self.observer.round_started(server_round, len(messages))
        replies = self.roster.send_and_receive(messages, timeout=self.plan.timeout)
        rows = [self.complete(server_round, row) for row in self._client_rows(messages, replies)]
        if messages and not any(row["status"] == "ok" for row in rows) and not self._may_go_on(rows):
            self.records.note_failures(server_round, rows)
            self._check_audits(server_round, rows)
            raise AllClientsFailed(f"every client of round {server_round} failed: {_why(rows)}")
        seed_globals(self.plan.seed, server_round, 1)
        with _named(f"strategy {type(self.strategy).__name__}"):
            new, _ = self.strategy.aggregate_train(server_round, replies)
        return rows, arrays if new is None else _as_float32(new)

    def _may_go_on(self, rows: list[Row]) -> bool:
        """Return whether a round without an update is bad luck: its clients are over budget, and there are others."""
        return {row["status"] for row in rows} == {OVER_BUDGET} and len(rows) < self.plan.clients

    def _client_rows(self, messages: list[Message], replies: list[Message]) -> list[Row]:
        """Return one row for each client that was asked, whether it answered or not, by partition."""
        answers = {reply.metadata.src_node_id: reply for reply in replies}
        down = Sizes()
        rows = []
        for message in messages:
            node = message.metadata.dst_node_id
            row: Row = {"client": self.roster.partition[node], "rule": self.plan.rule}
            row["bytes_down"], row["wire_down"] = down.of(message)
            rows.append(row | answer_columns(answers.get(node), self.plan.rule))
        return sorted(rows, key=lambda row: row["client"])

    def _evaluate_clients(self, server_round: int, arrays: ArrayRecord) -> list[Row]:
        """Run the strategy's federated evaluation of the new model and return one row a client."""
        seed_globals(self.plan.seed, server_round, 2)
        config = ConfigRecord({"server-round": server_round})
        with _named(f"strategy {type(self.strategy).__name__}"):
            messages = list(self.strategy.configure_evaluate(server_round, arrays, config, self.roster))
        replies = self.roster.send_and_receive(messages, timeout=self.plan.timeout) if messages else []
        rows, answered = [], []
        sent = {m.metadata.dst_node_id: m for m in messages}
        down = Sizes()
        for reply in replies:
            node = reply.metadata.src_node_id
            row: Row = {"client": self.roster.partition[node], "bytes_down": down.of(sent[node])[0]}
            if not reply.has_content():
                rows.append(row | {"status": STATUS.get(reply.error.code, "failed"), "bytes_up": 0})
                continue
            metrics = protocol.only(reply.content.metric_records)
            row |= {"status": "ok", "samples": int(metrics[protocol.SAMPLES])}
            row |= {"loss": number(metrics["loss"]), "accuracy": number(metrics["accuracy"])}
            rows.append(row | {"bytes_up": protocol.payload_bytes(reply.content)})
            if row["samples"]:  # a client without held-out data has no say, and its NaN must not spread
                answered.append(reply)
        if answered:
            with _named(f"strategy {type(self.strategy).__name__}"):
                self.strategy.aggregate_evaluate(server_round, answered)
        return rows

    def _evaluate_server(self, arrays: ArrayRecord) -> tuple[float, float]:
        with _named(f"the server's evaluation of rule {self.plan.rule}"):
            return self.evaluate(arrays)

    def _checkpoint(self, server_round: int, arrays: ArrayRecord) -> bytes:
        with _named(f"strategy {type(self.strategy).__name__}"):
            return checkpoint.dump(server_round, arrays, self.strategy)


@contextmanager
def _named(what: str) -> Iterator[None]:
    """Turn whatever `what` raises into RunFailed, in one line."""
    try:
        yield
    except Exception as error:
        raise RunFailed(f"{what} failed: {type(error).__name__}: {' '.join(str(error).split())}") from error


def _why(rows: list[Row]) -> str:
    """Return why the first of some clients failed, of those that were admitted if there are any."""
    row = next((row for row in rows if row["status"] != OVER_BUDGET), rows[0])
    return row["reason"] if row["status"] == "failed" else f"{row['status']}: {row['reason']}"


def _as_float32(arrays: ArrayRecord) -> ArrayRecord:
    """Return the model in float32: some strategies average in float64, and clients train in float32."""
    return protocol.encode_params(protocol.decode_params(arrays))


def seed_globals(seed: int, server_round: int, phase: int) -> None:
    """Seed the global generators that Flower's strategies draw from (sampling, differential-privacy noise).

    Ours draw from none; seeding by place makes a resumed round draw what an undisturbed one would have.
    """
    value = integer_seed(seed, Purpose.SERVER, server_round, phase)
    random.seed(value)
    np.random.seed(value % 2**32)  # noqa: NPY002
    torch.manual_seed(value)


def model_hash(arrays: ArrayRecord) -> str:
    """Return the SHA-256 of a model: keys, shapes and the bytes of all values."""
    digest = sha256()
    for key, array in arrays.items():
        values = np.ascontiguousarray(array.numpy())
        digest.update(f"{key}{values.dtype.str}{values.shape}".encode())
        digest.update(values.tobytes())
    return digest.hexdigest()
