"""The parts that an experiment names: rule, data, partitions, network, ladder, strategy, each with its options."""

from __future__ import annotations

import dataclasses
import pickle
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord
from flwr.serverapp.strategy import FedAvg, Strategy

from ..algorithms import LADDER, MODELS, RULES, Network, NetworkError, Rule, RuleError
from ..algorithms.rule import State
from ..client.budget import DeviceError
from ..client.fitting import OverBudget
from ..client.plan import Planner
from ..server import checkpoint
from ..server.records import NotARun, checkpoint_of, read_run
from ..server.strategies import DEFAULTS, STRATEGIES, FedProjection, FedScalar
from .datasets import DataSet, load, partition, resample
from .experiment import Experiment, ExperimentError, from_mapping
from .naming import checked_options, is_reference, named
from .refusal import DataError

MISTAKES = (ExperimentError, DataError, DeviceError, RuleError, NetworkError)


def rule_named(name: str) -> type[Rule] | Rule:
    """Return the rule of a name: a class, or an object of a user's."""
    rule = named("rule", name, RULES)
    if not isinstance(rule, Rule) and not (isinstance(rule, type) and issubclass(rule, Rule)):
        raise ExperimentError(f"rule '{name}' is {_kind(rule)}, not a fedforward.algorithms.Rule")
    return rule


def build_rule(experiment: Experiment) -> Rule:
    """Return the rule an experiment names, with its options and learning rate."""
    options = dict(experiment.set.get("rule", {}))
    if experiment.lr is not None:
        options["lr"] = experiment.lr
    rule = rule_named(experiment.rule)
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


def build_partitions(experiment: Experiment, data: DataSet) -> Sequence[torch.Tensor]:
    """Return the rows of every client: dealt out, or drawn by each client when it is asked for."""
    e = experiment
    if e.resample:
        return resample(data, e.partition, e.clients, e.samples_per_client, e.seed)
    return partition(data, e.partition, e.clients, e.seed)


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


def build_initial(experiment: Experiment, initial: State, net: Network) -> ArrayRecord:
    """Return the last model of the run that an experiment begins with.

    Args:
        experiment: names the run.
        initial: what it would begin with otherwise; of parameters only keys and shapes are looked at.
        net: the network.

    Raises:
        ExperimentError: if that run has no such model, or one that learned beside other fixed numbers.
    """
    folder, params = Path(experiment.init), initial.params
    try:
        run = read_run(folder)
        file = checkpoint_of(folder, int(run.rounds["round"].max()))
        arrays = checkpoint.load(file.read_bytes()).arrays
    except (NotARun, OSError, ValueError, pickle.UnpicklingError) as error:
        raise ExperimentError(f"cannot begin with the model of {folder} ({error}): name a run's folder") from None
    if {key: tuple(array.shape) for key, array in arrays.items()} != {k: tuple(p.shape) for k, p in params.items()}:
        raise ExperimentError(
            f"the model of {folder} is not one that {experiment.rule} trains on {experiment.model}: use the same"
            " --model and --set model options, and a rule of the same parameters"
        )
    told = from_mapping(tomllib.loads(run.info["experiment"]))
    if told.rule == experiment.rule and initial.fixed:
        fixed = build_rule(told).init(net, told.seed).fixed
        if fixed.keys() != initial.fixed.keys() or not all(map(torch.equal, fixed.values(), initial.fixed.values())):
            raise ExperimentError(
                f"the model of {folder} learned beside other fixed random numbers than {experiment.rule} would draw:"
                f" use --seed {told.seed} and its --set rule options"
            )
    return arrays


def build_ladder(experiment: Experiment, rule: Rule, net: Network) -> list[Rule]:
    """Return the rules that a client may fall back to: those of the ladder that train the same parameters.

    A rule of the same family keeps the rule's options, so that only its memory differs; another has its own.

    Raises:
        ExperimentError: if clients may change their rule, and there is none to change to.
    """
    if experiment.adapt != "rule":
        return []
    planner, found = Planner(net), []
    for kind in (RULES[name] for name in LADDER):
        own = {field.name for field in dataclasses.fields(kind)} & set(experiment.set.get("rule", {})) | {"lr"}
        candidate = kind(**{key: getattr(rule, key) for key in own}) if kind.family == rule.family else kind()
        with suppress(RuleError):
            candidate.check(net)
            same = _shapes(planner.params(candidate)) == _shapes(planner.params(rule))
            if same and rule.exchange == "weights" and not isinstance(rule, kind):
                found.append(candidate)
    if not found:
        raise ExperimentError(
            f"--adapt rule has nothing to offer: no rule of the ladder ({', '.join(LADDER)}) trains what"
            f" {experiment.rule} sends; leave it out"
        )
    return found


def _shapes(params: Mapping[str, torch.Tensor]) -> dict[str, torch.Size]:
    return {key: p.shape for key, p in params.items()}


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
    if name != "fedavg" and name in STRATEGIES and rule.wants_plain_mean:
        raise ExperimentError(
            f"{experiment.rule} as it is set sends sums of what its clients saw, of which only the plain mean is right:"
            " use --strategy fedavg"
        )
    if made:
        return deepcopy(_as_it_is("strategy", kind, options))
    given = _sampling(experiment) if issubclass(cls, FedAvg) else {}
    if issubclass(cls, FedScalar):
        given |= {"rule": rule, "seed": experiment.seed, "known": not experiment.init}
    if issubclass(cls, FedProjection):
        given |= {"seed": experiment.seed}
    with blamed_on(f"strategy '{name}'"):
        options = checked_options("strategy", cls, DEFAULTS.get(name, {}) | options, given=tuple(given))
        return cls(**given, **options)


def _sampling(experiment: Experiment) -> dict[str, Any]:
    """Return FedAvg's options that train the sampled clients of a round and evaluate those that the experiment says."""
    sampled, evaluated, clients = experiment.sampled(), experiment.evaluated(), experiment.clients
    return {
        "fraction_train": sampled / clients,
        "min_train_nodes": sampled,
        "min_available_nodes": sampled,
        "fraction_evaluate": evaluated / clients,
        "min_evaluate_nodes": evaluated,
    }


@contextmanager
def blamed_on(part: str) -> Iterator[None]:
    """Turn whatever somebody's rule, model, strategy or data raises into an ExperimentError that names it."""
    try:
        yield
    except (*MISTAKES, OverBudget):
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
