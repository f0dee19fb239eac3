"""The run database: a run is a folder, and everything that happened in it is in one SQLite file.

    runs/<name>/
    ├── experiment.toml       the exact experiment
    ├── run.sqlite            tables runs, rounds, clients, evaluations, diagnoses
    ├── checkpoints/          the server's state after the last committed round
    ├── lock                  held by the process that writes the run; the kernel releases it when that dies
    ├── report.html, *.png    written when the run ends

Rounds are written in transactions, fast ones several together. The last one's checkpoint is on disk before the
transaction commits, so the database alone says how far a run got: whatever a killed process left beyond the last
committed round is overwritten by the resumed one.
"""

from __future__ import annotations

import json
import math
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any, NamedTuple

import pandas as pd

try:
    import fcntl
except ImportError:  # not Unix: runs are not locked
    fcntl = None

DATABASE, EXPERIMENT, CHECKPOINTS, LOCK = "run.sqlite", "experiment.toml", "checkpoints", "lock"

# Bytes are payload bytes (Flower's own count over all records of a message); wire_* is the message content as Flower
# serialises it. `seconds` are of this machine and the only columns in which two equal runs may differ.
SCHEMA = """
CREATE TABLE IF NOT EXISTS runs (
    name TEXT PRIMARY KEY, version TEXT, created TEXT, finished TEXT, status TEXT, experiment TEXT, environment TEXT
);
CREATE TABLE IF NOT EXISTS rounds (
    round INTEGER PRIMARY KEY, learning_rate REAL, accuracy REAL, loss REAL, client_accuracy REAL, client_loss REAL,
    train_loss REAL, train_accuracy REAL, clients INTEGER, over_budget INTEGER, failed INTEGER,
    bytes_down INTEGER, bytes_up INTEGER, wire_down INTEGER, wire_up INTEGER, flops INTEGER,
    seconds REAL, model_sha256 TEXT, scalars BLOB
);
CREATE TABLE IF NOT EXISTS clients (
    round INTEGER, client INTEGER, device TEXT, rule TEXT, status TEXT, reason TEXT,
    samples INTEGER, steps INTEGER, batch INTEGER, micro_batch INTEGER, abreast INTEGER, chunk INTEGER,
    fit TEXT, loss REAL, train_accuracy REAL, accuracy_before REAL, accuracy_after REAL,
    budget_bytes INTEGER, peak_bytes INTEGER, parameters_bytes INTEGER, state_bytes INTEGER, optimizer_bytes INTEGER,
    gradients_bytes INTEGER, batch_bytes INTEGER, activations_bytes INTEGER, audited INTEGER, flops INTEGER,
    bytes_down INTEGER, bytes_up INTEGER, wire_down INTEGER, wire_up INTEGER, simulated_seconds REAL, seconds REAL,
    PRIMARY KEY (round, client)
);
CREATE TABLE IF NOT EXISTS evaluations (
    round INTEGER, client INTEGER, status TEXT, samples INTEGER, loss REAL, accuracy REAL,
    bytes_down INTEGER, bytes_up INTEGER, PRIMARY KEY (round, client)
);
CREATE TABLE IF NOT EXISTS diagnoses (
    round INTEGER, block INTEGER, angle REAL, hoyer REAL, separation REAL, PRIMARY KEY (round, block)
);
"""
DIAGNOSED = ("round", "block", "angle", "hoyer", "separation")
TIMES = {"rounds": ("seconds",), "clients": ("seconds",)}  # columns that are not a function of the experiment


class NotARun(FileNotFoundError):
    """A folder holds no run of this program; one line that says so."""


class RunInUse(RuntimeError):
    """Another process writes this run; one line that names the remedy."""


def _known(value: Any) -> Any:
    return value.result() if isinstance(value, Future) else value


def _insert(db: sqlite3.Connection, table: str, row: Mapping[str, Any]) -> None:
    db.execute(_insertion(table, tuple(row)), tuple(row.values()))


def _insertion(table: str, columns: tuple[str, ...]) -> str:
    return f"INSERT OR REPLACE INTO {table} ({', '.join(columns)}) VALUES ({', '.join('?' * len(columns))})"


class _Round(NamedTuple):
    """A round that waits to be written."""

    row: Mapping[str, Any]
    parts: Mapping[str, Iterable[Mapping[str, Any]]]
    checkpoint: Callable[[IO[bytes]], object] | None  # None: a later round's is written


class Records:
    """The writing end of one run's database.

    Args:
        folder: the run's folder; created if missing.
        delay: seconds that a round may wait for the next ones, to be written together with them. A process that dies
            in this time leaves the rounds before; a resumed run makes the same ones again.

    Raises:
        RunInUse: if another process has the run open for writing.
    """

    def __init__(self, folder: Path, delay: float = 0.0) -> None:
        self.folder, self.delay = folder, delay
        self._waiting: list[_Round] = []
        self._written = -math.inf
        self._writing = threading.RLock()
        self._timer: threading.Timer | None = None
        self._failure: Exception | None = None  # of the timer
        (folder / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
        self._lock = _lock(folder)
        self.db = sqlite3.connect(folder / DATABASE, isolation_level=None, check_same_thread=False)
        self.db.execute("PRAGMA journal_mode=WAL")
        self.db.execute("PRAGMA synchronous=FULL")
        self.db.executescript(SCHEMA)

    def start(self, name: str, experiment: str, version: str, environment: Mapping[str, str]) -> None:
        """Write the run's one row; `experiment` is its TOML, `environment` the versions it ran under."""
        row = {"name": name, "version": version, "created": _now(), "status": "running", "experiment": experiment}
        _insert(self.db, "runs", row | {"environment": json.dumps(dict(environment))})

    def go_on(self) -> None:
        """Mark the run as running again."""
        self.db.execute("UPDATE runs SET status = 'running', finished = NULL")

    def finish(self, status: str = "finished") -> None:
        """Mark the run `finished` or `failed`, and make the database one file that can be copied as it is."""
        self.flush()
        self.db.execute("UPDATE runs SET status = ?, finished = ?", (status, _now()))
        with suppress(sqlite3.OperationalError):  # somebody reads it now: the log beside it stays
            self.db.execute("PRAGMA journal_mode=DELETE")

    def last_round(self) -> int:
        """Return the last round on disk (0 is the initial model), or -1 if there is none."""
        return self.db.execute("SELECT COALESCE(MAX(round), -1) FROM rounds").fetchone()[0]

    def status(self) -> str | None:
        """Return the run's status, or None if the run was never started."""
        row = self.db.execute("SELECT status FROM runs").fetchone()
        return row[0] if row else None

    def experiment(self) -> str | None:
        """Return the experiment's TOML as the run began with it, or None if the run was never started."""
        row = self.db.execute("SELECT experiment FROM runs").fetchone()
        return row[0] if row else None

    def model_sha256(self, server_round: int) -> str:
        """Return the hash of the model after a committed round."""
        return self.db.execute("SELECT model_sha256 FROM rounds WHERE round = ?", (server_round,)).fetchone()[0]

    def checkpoint_path(self, server_round: int) -> Path:
        """Return the file that holds the server's state after `server_round`."""
        return checkpoint_of(self.folder, server_round)

    def commit_round(
        self,
        row: Mapping[str, Any],
        parts: Mapping[str, Iterable[Mapping[str, Any]]],
        checkpoint: Callable[[IO[bytes]], object],
    ) -> None:
        """Take one round, and write it with those that wait by the time that the first of them has waited `delay`.

        Args:
            row: of table rounds; a value may be a `Future`, which is waited for when the round is written.
            parts: rows of the tables clients, evaluations and diagnoses, by table and without the round.
            checkpoint: writes the server's state after the round to a file; only that of the last round is asked for.

        Raises:
            OSError, sqlite3.Error: if this round, or one before it that waited, cannot be written.
        """
        with self._writing:
            self._raise_failure()
            self._waiting = [waiting._replace(checkpoint=None) for waiting in self._waiting]
            self._waiting.append(_Round(row, parts, checkpoint))
            left = self._written + self.delay - time.monotonic()
            if left <= 0:
                self.flush()
            elif self._timer is None:
                self._timer = threading.Timer(left, self._flush_in_time)
                self._timer.daemon = True
                self._timer.start()

    def flush(self) -> None:
        """Write the rounds that wait: the last one's checkpoint first, then all rows in one transaction."""
        with self._writing:
            self._raise_failure()
            if self._timer:
                self._timer.cancel()
                self._timer = None
            if self._waiting:
                rounds, self._waiting = self._waiting, []
                self._write(rounds)

    def _write(self, rounds: list[_Round]) -> None:
        last = rounds[-1]
        path = self.checkpoint_path(last.row["round"])
        write_atomically(path, last.checkpoint)
        with self._transaction():
            for row, parts, _ in rounds:
                _insert(self.db, "rounds", {name: _known(value) for name, value in row.items()})
                for table, rows in parts.items():
                    self._insert_all(table, row["round"], rows)
        self._written = time.monotonic()
        for old in (self.folder / CHECKPOINTS).iterdir():
            if old != path:
                old.unlink()

    def _flush_in_time(self) -> None:
        """Flush, in the timer's thread; what goes wrong is raised where the next round is committed."""
        try:
            self.flush()
        except Exception as error:
            self._failure = error

    def _raise_failure(self) -> None:
        if self._failure:
            failure, self._failure = self._failure, None
            raise failure

    def note_failures(self, server_round: int, clients: Iterable[Mapping[str, Any]]) -> None:
        """Write the clients of a round that came to nothing; a resumed run overwrites them."""
        self.flush()
        with self._transaction():
            self._insert_all("clients", server_round, clients)

    def scalars(self) -> list[tuple[int, bytes]]:
        """Return (round, what was taken of its scalars, see `scalar_wire.decode_round`) of every round that has any."""
        query = "SELECT round, scalars FROM rounds WHERE scalars IS NOT NULL ORDER BY round"
        return self.db.execute(query).fetchall()

    def close(self) -> None:
        """Close the database and let go of the run; rounds that still wait are not written."""
        with self._writing:
            if self._timer:
                self._timer.cancel()
            self._waiting = []
        self.db.close()
        if self._lock:
            self._lock.close()

    def _insert_all(self, table: str, server_round: int, rows: Iterable[Mapping[str, Any]]) -> None:
        alike: dict[tuple[str, ...], list[tuple]] = {}  # rows by their columns
        for row in rows:
            alike.setdefault(tuple(row), []).append((server_round, *row.values()))
        for columns, values in alike.items():
            self.db.executemany(_insertion(table, ("round", *columns)), values)

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self.db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self.db.execute("COMMIT")
        except BaseException:
            if self.db.in_transaction:
                self.db.execute("ROLLBACK")
            raise


@dataclass(frozen=True)
class Run:
    """The reading end: a run's tables as data frames, whatever state the run is in."""

    folder: Path
    info: dict[str, Any]  # the row of table runs
    rounds: pd.DataFrame
    clients: pd.DataFrame
    evaluations: pd.DataFrame
    diagnoses: pd.DataFrame


def checkpoint_of(folder: Path, server_round: int) -> Path:
    """Return the file that holds the server's state after a round of the run in `folder`."""
    return folder / CHECKPOINTS / f"round-{server_round:06d}.pkl"


def read_run(folder: Path) -> Run:
    """Read the run in `folder`.

    Raises:
        NotARun: if the folder holds no run.
    """
    if not (folder / DATABASE).is_file():
        raise NotARun(f"{folder} holds no run (no {DATABASE} in it)")
    try:
        with closing(sqlite3.connect(f"{(folder / DATABASE).resolve().as_uri()}?mode=ro", uri=True)) as db:
            tables = {
                name: pd.read_sql(f"SELECT * FROM {name} ORDER BY round{key}", db)
                for name, key in {"rounds": "", "clients": ", client", "evaluations": ", client"}.items()
            }
            asked = db.execute("SELECT 1 FROM sqlite_master WHERE name = 'diagnoses'").fetchone()
            none = f"SELECT {', '.join('NULL AS ' + column for column in DIAGNOSED)} WHERE 0"  # of an earlier version
            tables["diagnoses"] = pd.read_sql("SELECT * FROM diagnoses ORDER BY round, block" if asked else none, db)
            runs = pd.read_sql("SELECT * FROM runs WHERE status IS NOT NULL AND experiment IS NOT NULL", db)
    except (sqlite3.Error, pd.errors.DatabaseError):
        raise NotARun(f"{folder} holds no run of this program: its {DATABASE} is another's, or broken") from None
    if missing := {"fit", "device", "abreast"} - set(tables["clients"].columns):
        raise NotARun(f"{folder} was written by an earlier version, without {', '.join(sorted(missing))}: run it again")
    info = runs.to_dict("records")
    return Run(folder, info[0] if info else {}, **tables)


def write_atomically(path: Path, content: bytes | Callable[[IO[bytes]], object]) -> None:
    """Write `content`, or what it writes, to `path` so that a crash leaves either the old file or the whole new one."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        if callable(content):
            content(file)
        else:
            file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # or the new name may be lost with the power
    finally:
        os.close(folder)


def _lock(folder: Path) -> IO | None:
    """Take the run's lock and return the file that holds it, or None where the file system knows no locks."""
    if fcntl is None:
        return None
    lock = open(folder / LOCK, "a")  # noqa: SIM115  (open as long as the lock is held)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        lock.close()
        if isinstance(error, BlockingIOError):
            raise RunInUse(f"{folder} is in use by another process: wait until it ends, or stop it") from None
        return None
    return lock


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
