"""The round loop: sample, send, aggregate, evaluate, record, checkpoint, resume.

Flower's `Strategy.start` is one call from the first round to the last. This loop makes the same calls of the public
Strategy API in the same order, so any Flower strategy runs unchanged, and after each round everything is on disk.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from hashlib import sha256

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message
from flwr.serverapp import Grid

from .. import message_bytes, protocol
from ..algorithms.replica import ScalarRound
from ..algorithms.seeds import Purpose, integer_seed
from ..scalar_wire import encode_round
from . import checkpoint
from .fold import Fold, folds
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
    done = job.records.last_round()
    with ThreadPoolExecutor(1, "hash") as aside:
        loop = _Loop(**vars(job), roster=Roster(grid, job.plan.clients, strategy=job.strategy), aside=aside)
        try:
            if done < 0:
                arrays, done = job.initial, 0
                loop.commit_initial(arrays)
            else:
                saved = checkpoint.load(job.records.checkpoint_path(done).read_bytes())
                arrays = saved.arrays
                vars(job.strategy).update(saved.strategy)
            for server_round in range(done + 1, job.plan.rounds + 1):
                arrays = loop.round(server_round, arrays)
        finally:  # rounds that are done stay done, whatever came after them
            job.records.flush()
    return arrays


@dataclass(kw_only=True)
class _Loop(Job):
    """A job on its grid."""

    roster: Roster
    aside: Executor  # for what need not hold up the next round

    def commit_initial(self, arrays: ArrayRecord) -> None:
        loss, accuracy = self._evaluate_server(arrays)
        row = {"round": 0, "loss": number(loss), "accuracy": number(accuracy)}
        zeros = ("clients", "over_budget", "failed", "bytes_down", "bytes_up", "wire_down", "wire_up", "flops")
        row |= dict.fromkeys(zeros, 0)
        self._commit(row | {"seconds": 0.0}, [], [], self._diagnoses(0, arrays), arrays)

    def round(self, server_round: int, arrays: ArrayRecord) -> ArrayRecord:
        """Run one round, commit it, and return the new model."""
        started = time.perf_counter()
        lr, evaluates = self.plan.learning_rate(server_round), self.plan.evaluates(server_round)
        clients, arrays = self._train(server_round, arrays, lr, evaluates)
        row: Row = {"round": server_round, "learning_rate": lr, **totals(clients)}
        evaluations: list[Row] = []
        shown = getattr(self.strategy, "shown", None) or arrays
        if evaluates:
            evaluations = self._evaluate_clients(server_round, arrays)
            loss, accuracy = self._evaluate_server(shown)
            row |= {"loss": number(loss), "accuracy": number(accuracy)}
            row |= {"client_accuracy": mean(evaluations, "accuracy"), "client_loss": mean(evaluations, "loss")}
        taken = getattr(self.strategy, "taken", None)
        row["scalars"] = encode_round(taken) if isinstance(taken, ScalarRound) else None
        diagnoses = self._diagnoses(server_round, shown)
        row["seconds"] = time.perf_counter() - started  # all of the round but its commit
        self._commit(row, clients, evaluations, diagnoses, arrays)
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
            steps=self.plan.steps, evaluate=evaluates,
        )  # fmt: skip
        seed_globals(self.plan.seed, server_round, 0)
        with _named(f"strategy {type(self.strategy).__name__}"):
            messages = list(self.strategy.configure_train(server_round, arrays, config, self.roster))
        if self.observer:
            self.observer.round_started(server_round, len(messages))
        rows, update = self._receive(messages)
        rows = [self.complete(server_round, row) for row in rows]
        if messages and not any(row["status"] == "ok" for row in rows) and not self._may_go_on(rows):
            self.records.note_failures(server_round, rows)
            self._check_audits(server_round, rows)
            raise AllClientsFailed(f"every client of round {server_round} failed: {_why(rows)}")
        seed_globals(self.plan.seed, server_round, 1)
        with _named(f"strategy {type(self.strategy).__name__}"):
            new = update(server_round)
        return rows, arrays if new is None else new

    def _receive(self, messages: list[Message]) -> tuple[list[Row], Callable[[int], ArrayRecord | None]]:
        """Return a row for each client that was asked, by partition, and what makes the new model of their replies."""
        fold = Fold() if folds(self.strategy) else None
        down, kept, errors = Sizes(), [], []
        waiting = {message.metadata.dst_node_id: message for message in messages}
        rows: dict[int, Row] = {}

        refuse = getattr(self.strategy, "refuse", None)

        def note(message: Message, reply: Message | None, refused: str | None = None) -> None:
            node = message.metadata.dst_node_id
            row: Row = {"client": self.roster.partition[node], "rule": self.plan.rule}
            row["bytes_down"], row["wire_down"] = down.of(message)
            rows[node] = row | answer_columns(reply, self.plan.rule, refused)

        for reply in self.roster.stream(messages, timeout=self.plan.timeout, folded=fold is not None):
            message = waiting.pop(protocol.sender(reply), None)
            if message is None:  # it has answered already
                continue
            refused = refuse(reply) if refuse else None
            note(message, reply, refused)
            if refused:
                continue
            if not reply.has_content():
                errors.append(reply)
            elif fold:
                with _named("folding a round's models"):
                    fold.add(reply)
            else:
                kept.append(protocol.kept(reply))
        for message in waiting.values():
            note(message, None)

        def update(server_round: int) -> ArrayRecord | None:
            if fold:
                new = fold.aggregate(self.strategy, server_round, messages[0], errors) if fold.samples else None
            else:
                replies = sorted([*kept, *errors], key=lambda reply: self.roster.partition[reply.metadata.src_node_id])
                new, _ = self.strategy.aggregate_train(server_round, replies)
            return None if new is None else _as_float32(new)

        return sorted(rows.values(), key=lambda row: row["client"]), update

    def _may_go_on(self, rows: list[Row]) -> bool:
        """Return whether a round without an update is bad luck: its clients are over budget, and there are others."""
        return {row["status"] for row in rows} == {OVER_BUDGET} and len(rows) < self.plan.clients

    def _evaluate_clients(self, server_round: int, arrays: ArrayRecord) -> list[Row]:
        """Run the strategy's federated evaluation of the new model and return one row a client."""
        seed_globals(self.plan.seed, server_round, 2)
        config = ConfigRecord({"server-round": server_round})
        with _named(f"strategy {type(self.strategy).__name__}"):
            messages = list(self.strategy.configure_evaluate(server_round, arrays, config, self.roster))
        replies = self.roster.stream(messages, timeout=self.plan.timeout) if messages else []
        replies = sorted(replies, key=lambda reply: self.roster.partition[reply.metadata.src_node_id])
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
            rows.append(row | {"bytes_up": message_bytes.payload_bytes(reply.content)})
            if row["samples"]:  # a client without held-out data has no say, and its NaN must not spread
                answered.append(reply)
        if answered:
            with _named(f"strategy {type(self.strategy).__name__}"):
                self.strategy.aggregate_evaluate(server_round, answered)
        return rows

    def _evaluate_server(self, arrays: ArrayRecord) -> tuple[float, float]:
        with _named(f"the server's evaluation of rule {self.plan.rule}"):
            return self.evaluate(arrays)

    def _diagnoses(self, server_round: int, arrays: ArrayRecord) -> list[Row]:
        if not self.plan.diagnoses(server_round):
            return []
        with _named(f"the diagnosis of rule {self.plan.rule} (in float64; or leave out --diagnose-every)"):
            return self.diagnose(server_round, arrays)

    def _commit(
        self, row: Row, clients: list[Row], evaluations: list[Row], diagnoses: list[Row], arrays: ArrayRecord
    ) -> None:
        with _named(f"strategy {type(self.strategy).__name__}"):
            frozen = checkpoint.freeze(self.strategy)
        row["model_sha256"] = self.aside.submit(model_hash, arrays)
        saved = partial(checkpoint.dump, row["round"], arrays, frozen)
        self.records.commit_round(row, {"clients": clients, "evaluations": evaluations, "diagnoses": diagnoses}, saved)


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
    if all(isinstance(array, protocol.LiveArray) and array.dtype == "float32" for array in arrays.values()):
        return arrays
    return protocol.encode_params(protocol.decode_params(arrays))


def seed_globals(seed: int, server_round: int, phase: int) -> None:
    """Seed the global generators that Flower's strategies draw from (sampling, differential-privacy noise).

    Ours draw from none; seeding by place makes a resumed round draw what an undisturbed one would have.
    """
    value = integer_seed(seed, Purpose.SERVER, server_round, phase)
    random.seed(value)
    np.random.seed(value % 2**32)  # noqa: NPY002
    torch.default_generator.manual_seed(value)  # torch.manual_seed would take a stack trace for each GPU to come


def model_hash(arrays: ArrayRecord) -> str:
    """Return the SHA-256 of a model: keys, shapes and the bytes of all values."""
    digest = sha256()
    for key, array in arrays.items():
        values = np.ascontiguousarray(protocol.values_of(array))
        digest.update(f"{key}{values.dtype.str}{values.shape}".encode())
        digest.update(values.data)
    return digest.hexdigest()
