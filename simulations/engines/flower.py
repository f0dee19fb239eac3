"""The flower engine: clients run in Flower's Ray simulation, on the cores of this machine or of a Ray cluster.

The simulation runs in a thread, and its ServerApp does nothing but lend its grid to the round loop, which stays in the
main thread: what goes wrong in a round is raised where it is on any engine, and so is Ctrl-C.

Flower looks for messages ten times a second, so a round takes up to a tenth of a second more. Each time it goes over
all clients: of 2000, measured, the ten of a round are found in 0.15 s, and all are asked for their partition in 15 s.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from contextlib import nullcontext, redirect_stdout, suppress
from functools import lru_cache
from importlib.util import find_spec
from io import StringIO
from logging import CRITICAL, ERROR, getLogger
from typing import Any, Self

import psutil
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from ...server.rounds import RunFailed
from ..experiment import Experiment, ExperimentError, from_run_config
from ..world import build
from .local import raised

MOST_CLIENTS = 2000
POLL = 0.002  # seconds between two looks for replies; Flower's own grid takes 0.1
CLUSTER = "RAY_ADDRESS"  # Ray's own variable: the address of a cluster that is there already


def check(experiment: Experiment, devices: Iterable[str]) -> None:
    """Raise ExperimentError, with the remedy, if an experiment cannot run here on Ray."""
    if find_spec("ray") is None:
        raise ExperimentError("engine flower runs on Ray, which is not installed: pip install 'fedforward[ray]'")
    if set(devices) - {"cpu"}:
        raise ExperimentError(f"engine flower trains on CPUs, not on {experiment.devices}: use --engine pool")
    if experiment.clients > MOST_CLIENTS:
        raise ExperimentError(
            f"engine flower registers every client, and is slow with more than {MOST_CLIENTS}: use --engine pool"
        )


class FlowerGrid(Grid):
    """Runs clients in Flower's simulation. Use as a context manager: on leaving it, Ray ends.

    Args:
        experiment: the experiment, of which every actor makes the world.
        actors: processes to run on this machine; without effect on a cluster, which has one for each of its cores.
        on_reply: called after each client, for progress.

    Raises:
        RunFailed: whenever it is used, if the simulation has ended by itself.
    """

    def __init__(self, experiment: Experiment, actors: int, on_reply: Callable[[], None] | None = None) -> None:
        self.experiment, self.actors, self.on_reply = experiment, actors, on_reply
        self._lent: Future[Grid] = Future()  # Flower's own grid
        self._over = threading.Event()
        self._ended: BaseException | None = None
        self._simulation = threading.Thread(target=self._simulate, name="Flower simulation")

    def __enter__(self) -> Self:
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # or Ray gives a tip about it
        self._simulation.start()
        while not self._lent.done():
            self._check()
            time.sleep(POLL)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        workers = _workers()
        self._over.set()
        with redirect_stdout(StringIO()) if kind else nullcontext():  # Ray has many words for a worker that was killed
            if kind:  # Flower would wait for clients that are under way
                _kill(workers)
            self._simulation.join()
        _kill(psutil.wait_procs(workers, timeout=1)[1])  # Ray does not wait for them to end

    def _simulate(self) -> None:
        from flwr.simulation import run_simulation

        server = ServerApp()

        @server.main()
        def main(grid: Grid, context: Context) -> None:
            self._lent.set_result(grid)
            self._over.wait()

        log, cluster = getLogger("flwr"), os.environ.get(CLUSTER)
        before = log.level
        log.setLevel(CRITICAL)  # what it has to say is recorded with the client, or raised by `_check`
        init_args = {"address": cluster} if cluster else {"address": "local", "num_cpus": self.actors}
        config = {
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
            "init_args": init_args | {"logging_level": ERROR, "log_to_driver": False},
        }
        try:
            app = ExperimentApp(self.experiment.to_run_config())
            run_simulation(server, app, self.experiment.clients, backend_config=config)
        except BaseException as error:
            self._ended = error
        finally:
            log.setLevel(before)

    def _check(self) -> None:
        """Raise RunFailed if the simulation is no more, with the first cause."""
        if self._simulation.is_alive():
            return
        error = self._ended
        while error and error.__cause__:
            error = error.__cause__
        words = f"{type(error).__name__}: {' '.join(str(error).split())}" if error else "it said nothing"
        raise RunFailed(f"Flower's simulation ended: {words}")

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Send messages and return the replies that come in time, looking for them oftener than Flower's own grid."""
        deadline = time.monotonic() + (float("inf") if timeout is None else timeout)
        waiting, replies = set(self.push_messages(messages)), []
        while waiting and time.monotonic() < deadline:
            self._check()
            for reply in self.pull_messages(waiting):
                waiting.discard(reply.metadata.reply_to_message_id)
                replies.append(reply)
                if self.on_reply:
                    self.on_reply()
            time.sleep(POLL)
        return replies

    def get_node_ids(self) -> Iterable[int]:
        """Return the nodes that Flower has registered so far."""
        self._check()
        return self._lent.result().get_node_ids()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Pass on."""
        return self._lent.result().push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Pass on."""
        return self._lent.result().pull_messages(message_ids)

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """Pass on."""
        return self._lent.result().create_message(content, message_type, dst_node_id, group_id, ttl)

    def set_run(self, run: Any) -> None:
        """Pass on."""
        self._lent.result().set_run(run)

    @property
    def run(self) -> Any:
        """Flower's description of the run."""
        return self._lent.result().run


def _workers() -> list[psutil.Process]:
    """Return the processes of this machine's own Ray that run clients, or are about to."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if process.name().startswith(("ray::ClientAppActor", "ray::IDLE")):
                found.append(process)
    return found


def _kill(processes: Iterable[psutil.Process]) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()


class ExperimentApp(ClientApp):
    """The ClientApp of an experiment. Ray pickles it with every message, so it is pickled as the run-config alone."""

    def __init__(self, run_config: dict[str, Any]) -> None:
        super().__init__()
        self.run_config = run_config

    def __reduce__(self) -> tuple:
        return ExperimentApp, (self.run_config,)

    def __call__(self, message: Message, context: Context) -> Message:
        """Answer a message as the client that a node's context names."""
        try:
            return _app_of(tuple(sorted(self.run_config.items())))(message, context)
        except Exception as error:  # told as by the other engines; Flower would wrap it
            return raised(message, error)


@lru_cache(maxsize=1)
def _app_of(run_config: tuple[tuple[str, Any], ...]) -> ClientApp:
    """Return the app that serves any client of an experiment; its world is made once an actor."""
    return build(from_run_config(dict(run_config))).app()
