"""From an experiment to the things it names: rule, network, data, clients, strategy.

Everything that can be wrong with an experiment is found here, before a run's folder exists.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from flwr.app import ArrayRecord, Context
from flwr.serverapp.strategy import FedAvg, Strategy

from .. import protocol
from ..algorithms import MODELS, RULES, Network, NetworkError, Rule, RuleError
from ..client import Client, Trainer
from ..server import checkpoint
from ..server.rounds import Plan
from ..server.strategies import DEFAULTS, STRATEGIES, FedScalar
from .datasets import DataSet, load, partition, split
from .experiment import Experiment, ExperimentError, from_run_config
from .naming import checked_options, is_reference, named
from .refusal import DataError

MISTAKES = (ExperimentError, DataError, RuleError, NetworkError)


@dataclass(frozen=True)
class World:
    """All that an experiment needs to run, on any engine."""

    experiment: Experiment
    trainer: Trainer
    data: DataSet
    partitions: list[torch.Tensor]  # rows of the training data, one tensor a client

    def client(self, index: int) -> Client:
        """Return client `index`, whose data are views of the data set."""
        rows = self.partitions[index]
        train, test = split(rows, self.experiment.holdout, self.experiment.seed, index)
        return Client(index, self.trainer, self.data.train.subset(train), self.data.train.subset(test))

    def initial(self) -> ArrayRecord:
        """Return the initial model as the server sends it."""
        return protocol.encode_params(self.trainer.initial_params())

    def evaluate(self, arrays: ArrayRecord) -> tuple[float, float]:
        """Return (loss, accuracy) of a model on the server's test set."""
        result = self.trainer.evaluate(protocol.decode_params(arrays), self.data.test)
        return result.loss, result.accuracy

    def plan(self) -> Plan:
        """Return what the round loop needs to know."""
        e = self.experiment
        return Plan(
            e.rule, e.seed, e.rounds, e.clients, e.epochs, e.batch_size, self.trainer.rule.lr,
            e.lr_schedule, e.evaluate_every, e.timeout or None,
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
        trainer = Trainer(rule, net, experiment.seed)
        trainer.evaluate(trainer.initial_params(), data.test.subset(torch.arange(min(1, len(data.test)))))
    partitions = partition(data, experiment.partition, experiment.clients, experiment.seed)
    world = World(experiment, trainer, data, partitions)
    with blamed_on(f"strategy '{experiment.strategy}'"):
        checkpoint.dump(0, ArrayRecord(), world.strategy())
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


def build_rule(experiment: Experiment) -> Rule:
    """Return the rule an experiment names, with its options and learning rate."""
    options = dict(experiment.set.get("rule", {}))
    if experiment.lr is not None:
        options["lr"] = experiment.lr
    rule = named("rule", experiment.rule, RULES)
    if not isinstance(rule, Rule) and not (isinstance(rule, type) and issubclass(rule, Rule)):
        raise ExperimentError(f"rule '{experiment.rule}' is {_kind(rule)}, not a fedforward.algorithms.Rule")
    with blamed_on(f"rule '{experiment.rule}'"):
        if isinstance(rule, Rule):
            return dataclasses.replace(rule, **checked_options("rule", type(rule), options))
        return rule(**checked_options("rule", rule, options))


def build_data(experiment: Experiment) -> DataSet:
    """Return the data set an experiment names."""
    options, name = dict(experiment.set.get("data", {})), experiment.data
    if not is_reference(name):
        options = checked_options("data", load, options, given=("name", "seed"))
        with blamed_on(f"data '{name}'"):
            return load(name, **options, seed=experiment.seed)
    made = named("data", name, {})
    with blamed_on(f"data '{name}'"):
        data = made(**checked_options("data", made, options)) if callable(made) else _as_it_is("data", made, options)
    if not isinstance(data, DataSet):
        raise ExperimentError(f"data '{name}' gives {_kind(data)}, not a fedforward.simulations.datasets.DataSet")
    return data


def build_network(experiment: Experiment, data: DataSet) -> Network:
    """Return the network an experiment names, fitted to the data's shape and classes."""
    model, options = named("model", experiment.model, MODELS), experiment.set.get("model", {})
    if not callable(model):
        raise ExperimentError(f"model '{experiment.model}' is {_kind(model)}, not an nn.Sequential or what makes one")
    with blamed_on(f"model '{experiment.model}'"):
        if isinstance(model, torch.nn.Module):
            return Network(_as_it_is("model", model, options), data.shape, data.classes)
        options = checked_options("model", model, options, given=("shape", "classes"))
        return Network(lambda: model(data.shape, data.classes, **options), data.shape, data.classes)


def build_strategy(experiment: Experiment, rule: Rule) -> Strategy:
    """Return the strategy an experiment names, sampling and evaluating as it says.

    An object of the user's, already made, is copied and samples as it was made to.
    """
    name = experiment.strategy
    if name == "auto":
        name = "fedscalar" if rule.exchange == "scalars" else "fedavg"
    kind = named("strategy", name, STRATEGIES)
    options = dict(experiment.set.get("strategy", {}))
    made, cls = isinstance(kind, Strategy), kind if isinstance(kind, type) else type(kind)
    if not issubclass(cls, Strategy):
        raise ExperimentError(f"strategy '{name}' is {_kind(kind)}, not a flwr.serverapp.strategy.Strategy")
    takes = getattr(kind, "exchange", "scalars" if issubclass(cls, FedScalar) else "weights")
    if takes != rule.exchange:
        remedy = "fedscalar" if rule.exchange == "scalars" else "fedavg"
        raise ExperimentError(
            f"{experiment.rule} sends {rule.exchange}, which {name} cannot aggregate: use --strategy {remedy}"
        )
    if made:
        return deepcopy(_as_it_is("strategy", kind, options))
    given = _sampling(experiment) if issubclass(cls, FedAvg) else {}
    if issubclass(cls, FedScalar):
        given |= {"rule": rule, "seed": experiment.seed}
    with blamed_on(f"strategy '{name}'"):
        options = checked_options("strategy", cls, DEFAULTS.get(name, {}) | options, given=tuple(given))
        return cls(**given, **options)


def _sampling(experiment: Experiment) -> dict[str, Any]:
    """Return FedAvg's options that train the sampled clients of a round and evaluate all clients."""
    sampled, clients = experiment.sampled(), experiment.clients
    return {
        "fraction_train": sampled / clients,
        "min_train_nodes": sampled,
        "min_available_nodes": sampled,
        "fraction_evaluate": 1.0,
        "min_evaluate_nodes": clients,
    }


@contextmanager
def blamed_on(part: str) -> Iterator[None]:
    """Turn whatever somebody's rule, model, strategy or data raises into an ExperimentError that names it."""
    try:
        yield
    except MISTAKES:
        raise
    except Exception as error:
        raise ExperimentError(f"{part} failed: {type(error).__name__}: {error}") from error


def _as_it_is(part: str, made: Any, options: Mapping[str, Any]) -> Any:
    """Return a user's object that is made already; ExperimentError if options are given for it."""
    if options:
        raise ExperimentError(f"{part} is an object that is made already and takes no options: drop [set.{part}]")
    return made


def _kind(item: Any) -> str:
    return f"the class {item.__name__}" if isinstance(item, type) else f"an object of type {type(item).__name__}"
