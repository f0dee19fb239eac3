"""From an experiment to the things it names: rule, network, data, clients, strategy.

Everything that can be wrong with an experiment is found here, before a run's folder exists.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
from flwr.app import ArrayRecord, Context, Message, MessageType
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import Strategy

from .. import protocol
from ..algorithms.diagnosis import diagnose
from ..algorithms.directions import layout_of
from ..algorithms.projection import pieces_of
from ..algorithms.rule import Tensors
from ..algorithms.seeds import Place
from ..client import Client, Trainer, make_client_app
from ..client.app import assignment
from ..client.budget import Device
from ..client.fitting import OverBudget
from ..client.plan import MemoryPlan
from ..client.trainer import Assignment
from ..server import checkpoint
from ..server.job import Plan
from ..server.rows import AUDIT_FAILED, Row
from ..server.strategies import DEFAULTS
from .datasets import DataSet, learned, split
from .experiment import Experiment, from_run_config
from .parts import (
    blamed_on,
    build_data,
    build_initial,
    build_ladder,
    build_network,
    build_partitions,
    build_rule,
    build_strategy,
)
from .population import AS_ASKED, Admission, Devices, devices_of
from .resampling import Resampled

REMEMBERED = 100  # clients
DIAGNOSED, DIAGNOSED_BYTES = 256, 2**30  # samples, and what a step of so many may take in float32


@dataclass(frozen=True)
class World:
    """All that an experiment needs to run, on any engine."""

    experiment: Experiment
    trainer: Trainer
    data: DataSet
    partitions: Sequence[torch.Tensor]  # rows of the training data, one tensor a client, perhaps made when asked for
    devices: Sequence[Device]  # one a client; empty: without limits
    chosen: str = ""  # why its engine was chosen, if it was

    @cached_property
    def client(self) -> Callable[[int], Client]:
        """Return client by index; its data are views of the data set. Those asked for last are remembered."""
        return lru_cache(REMEMBERED)(self._client)

    def _client(self, index: int) -> Client:
        rows = self.partitions[index]
        train, test = split(rows, self.experiment.holdout, self.experiment.seed, index)
        device = self.devices[index] if self.devices else None
        return Client(index, self.trainer, self.data.train.subset(train), self.data.train.subset(test), device)

    def samples(self, index: int) -> int:
        """Return how many samples client `index` learns from, without making it."""
        rows = self.partitions
        held = rows.samples if isinstance(rows, Resampled) else len(rows[index])
        return learned(held, self.experiment.holdout)

    def initial(self) -> ArrayRecord:
        """Return the initial model as the server sends it.

        Raises:
            ExperimentError: if it is that of another run, and that is not there: a node need not have it.
        """
        initial, asked = self.trainer.initial(self.trainer.rule), self.experiment
        return build_initial(asked, initial, self.trainer.net) if asked.init else protocol.encode_params(initial.params)

    def evaluate(self, arrays: ArrayRecord) -> tuple[float, float]:
        """Return (loss, accuracy) of a model on the server's test set."""
        result = self.trainer.evaluate(protocol.params_of(arrays), self.data.test)
        return result.loss, result.accuracy

    def diagnose(self, server_round: int, arrays: ArrayRecord) -> list[Row]:
        """Return what is found of each block of a model on samples strewn evenly over the server's test set."""
        rule, count = self.trainer.rule, min(DIAGNOSED, len(self.data.test))
        while count > 1 and self.trainer.planner.step(rule, count).peak > DIAGNOSED_BYTES:
            count //= 2
        rows = torch.linspace(0, len(self.data.test) - 1, count).long()  # a test set may be sorted by class
        # A place of its own: the client after the last one has no other step.
        place = Place(self.experiment.seed, server_round, self.experiment.clients, 0)
        state, batch = self.trainer.replica_of(rule, protocol.params_of(arrays), self.data.test, rows, place)
        return [found._asdict() for found in diagnose(rule, self.trainer.net, state, batch)]

    def app(self, memory: Tensors | None = None) -> ClientApp:
        """Return a client app whose clients train in the same `memory` in turn: a reply's model lies there."""
        memory = self.trainer.initial_params() if memory is None else memory
        return make_client_app(lambda context: self.client(int(context.node_config["partition-id"])), memory)

    def work(self, message: Message) -> Callable[[int], int]:
        """Return, by client, the FLOPs of what a message asks it to train; 0 for one that will not."""
        if message.metadata.message_type != MessageType.TRAIN:
            return lambda index: 0
        with suppress(Exception):  # of a user's strategy, as below of a user's rule: the client will say what is wrong
            todo = assignment(protocol.config_of(message))

        def flops(index: int) -> int:
            with suppress(Exception):
                budget = self.devices[index].budget if self.devices else None
                return self.trainer.flops(self.samples(index), todo, budget)
            return 0

        return flops

    def admissions(self) -> list[Admission]:
        """Return what becomes of the clients on their devices, before anything runs; nothing without a fleet."""
        found = []
        for (samples, device), clients in self._alike().items():
            try:
                with blamed_on(f"rule '{self.experiment.rule}'"):
                    fit = self.trainer.fit_to(samples, self.asked, device.budget)
                rule = fit.rule.name if fit.rank else self.experiment.rule
                words = self.changes(rule, fit.micro_batch, fit.abreast, fit.chunk)
                found.append(Admission(clients, device, fit, words))
            except OverBudget as error:
                found.append(Admission(clients, device, None, f"over budget: {error}"))
        return found

    def _alike(self) -> Counter[tuple[int, Device]]:
        """Count the clients that learn from as many samples on the same device, in the order of the first of each."""
        if isinstance(self.partitions, Resampled) and isinstance(self.devices, Devices):  # no need to ask each of them
            return Counter({(self.samples(0), device): clients for device, clients in self.devices.counts.items()})
        return Counter((self.samples(index), device) for index, device in enumerate(self.devices))

    def changes(self, rule: str, micro_batch: int, abreast: int, chunk: int) -> str:
        """Return in words what a client changed to fit its device: rule, batch parts, directions at a time, slices."""
        asked = self.experiment
        said = [f"rule {rule}"] if rule != asked.rule else []
        said += [f"parts of {micro_batch}"] if micro_batch not in (0, asked.micro_batch) else []
        rules = {each.name: each for each in self.trainer.ladder}
        own = rules.get(rule, self.trainer.rule)
        said += [f"{abreast} abreast"] if abreast < getattr(own, "abreast", 0) else []
        said += [f"slices of {chunk}"] if chunk < getattr(own, "chunk", 0) else []
        return ", ".join(said) or AS_ASKED

    def complete(self, server_round: int, row: Row) -> Row:
        """Return a client's row with what its answer does not say: device, parts of the peak, simulated time."""
        ran = row["status"] in ("ok", AUDIT_FAILED)
        known: Row = {"audited": int(ran and self.trainer.audited(server_round, row["client"]))}
        device = self.devices[row["client"]] if self.devices else None
        if device:
            known |= {"device": device.name, "budget_bytes": device.budget}
        if row["status"] == "ok":
            known["fit"] = self.changes(row["rule"], row["micro_batch"], row["abreast"], row["chunk"])
            known |= {f"{part}_bytes": n for part, n in self._step_plan(row).parts.items()}
            if device:
                known["simulated_seconds"] = device.seconds(row["flops"], row["bytes_down"], row["bytes_up"])
        return row | known

    def _step_plan(self, row: Row) -> MemoryPlan:
        """Return the plan of the step that a client's row speaks of."""
        trainer, todo = self.trainer, self.asked
        rule = next((rule for rule in trainer.ladder if rule.name == row["rule"]), trainer.rule)
        known = {name: row[name] for name in ("abreast", "chunk") if row[name]}
        rule = dataclasses.replace(rule, **known)
        return trainer.planner.step(rule, row["batch"], row["micro_batch"], anchored=todo.anchored)

    @cached_property
    def asked(self) -> Assignment:
        """What a round asks of clients, as far as memory and work depend on it."""
        e, strategy = self.experiment, self.strategy()
        return Assignment(
            1, self.trainer.rule.lr, e.epochs, e.batch_size, e.local_steps,
            proximal_mu=getattr(strategy, "proximal_mu", 0.0), projection=getattr(strategy, "projection", 0),
        )  # fmt: skip

    def plan(self) -> Plan:
        """Return what the round loop needs to know."""
        e = self.experiment
        return Plan(
            e.rule, e.seed, e.rounds, e.clients, e.epochs, e.batch_size, self.trainer.rule.lr,
            e.local_steps, e.lr_schedule, e.evaluate_every, e.diagnose_every, e.timeout or None,
        )  # fmt: skip

    def strategy(self) -> Strategy:
        """Return a new strategy that samples as many clients a round as the experiment says."""
        return build_strategy(self.experiment, self.trainer.rule)


def build(experiment: Experiment) -> World:
    """Make the world of an experiment.

    Raises:
        ExperimentError, DataError, RuleError, NetworkError: one line each, naming the remedy.
    """
    torch.set_num_threads(experiment.threads)
    rule = build_rule(experiment)
    data = build_data(experiment)
    net = build_network(experiment, data)
    with blamed_on(f"rule '{experiment.rule}' with model '{experiment.model}'"):
        trainer = Trainer(
            rule, net, experiment.seed,
            micro_batch=experiment.micro_batch, ladder=build_ladder(experiment, rule, net), audit=experiment.audit,
        )  # fmt: skip
        trainer.evaluate(trainer.initial_params(), data.test.subset(torch.arange(min(1, len(data.test)))))
        if getattr(rule, "abreast", 1) > 1:  # not every layer can be batched
            trainer.planner.step(rule, 1)
    devices = devices_of(experiment.fleet, experiment.clients, experiment.seed)
    world = World(experiment, trainer, data, build_partitions(experiment, data), devices)
    with blamed_on(f"strategy '{experiment.strategy}'"):
        checkpoint.freeze(world.strategy())
        if world.asked.projection:
            pieces_of(layout_of(trainer.initial(rule).params), world.asked.projection)
    return world


def resolved(experiment: Experiment) -> Experiment:
    """Return the experiment with every default that depends on its rule written out."""
    rule = build_rule(experiment)
    strategy = experiment.strategy
    if strategy == "auto":
        strategy = "fedscalar" if rule.exchange == "scalars" else "fedavg"
    options = dict(experiment.set)
    if strategy in DEFAULTS:
        options["strategy"] = DEFAULTS[strategy] | options.get("strategy", {})
    return experiment.replace(lr=rule.lr, strategy=strategy, set=options)


@lru_cache(maxsize=2)
def _world_of(run_config: tuple[tuple[str, Any], ...]) -> World:
    return build(from_run_config(dict(run_config)))


def load_client(context: Context) -> Client:
    """Return the client of a node's context: the loader of our ClientApp. The world is made once a process."""
    return _world_of(tuple(sorted(context.run_config.items()))).client(int(context.node_config["partition-id"]))
