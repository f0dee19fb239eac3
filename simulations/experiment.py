"""One typed description of a run; TOML, flags and Flower's run-config all become it.

Names are the same everywhere, with dashes: `clients-per-round` in TOML and in `[tool.flwr.app.config]`, and
`--clients-per-round` on the command line. Options of a part go under `set`: `[set.rule] momentum = 0.9` in TOML,
`--set rule.momentum=0.9` as a flag, `set = "rule.momentum=0.9 model.hidden=[64,64]"` in a run-config.
"""

from __future__ import annotations

import dataclasses
import shlex
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

import tomli_w

from ..server.job import SCHEDULES
from .refusal import closest

PARTS = ("rule", "model", "strategy", "data")
ENGINES = ("auto", "inline", "cohort", "pool", "flower")
ADAPTS = ("none", "rule")
EVALUATED = 1000  # clients that judge a new model, unless the experiment says how many


class ExperimentError(ValueError):
    """An experiment cannot be run as described; one line that names the remedy."""


@dataclass(frozen=True)
class Experiment:
    """What to run. Every field has a default; the defaults are the demo."""

    name: str = ""  # of the run's folder; chosen from rule and data if empty
    rule: str = "mono-forward"  # built-in name or module:object, as are model, strategy and data
    data: str = "digits"  # built-in, a folder, a .npz, or a hub data set
    model: str = "mlp"
    init: str = ""  # the folder of a run whose last model to begin with; empty: a model drawn from the seed
    partition: str = "iid"
    clients: int = 20
    clients_per_round: int = 0  # 0: all
    clients_per_evaluation: int = 0  # clients that judge the new model; 0: all up to 1000, of more 1000 that are drawn
    resample: bool = False  # clients draw their own samples, so there may be more clients than samples
    samples_per_client: int = 0  # with resample; 0: 100, or all there are if they are fewer
    rounds: int = 30
    epochs: int = 2  # local epochs a round
    local_steps: int = 0  # steps of these epochs that a client takes, at most; 0: all
    batch_size: int = 10
    lr: float | None = None  # None: the rule's own
    lr_schedule: str = "constant"  # over rounds
    strategy: str = "auto"  # fedavg, or fedscalar for a rule that sends scalars
    fleet: str = ""  # devices of the clients, as in mcu-1m:0.6,phone:0.4; empty: without limits
    adapt: str = "none"  # what a client may change beside batch parts and slices to fit its device: none or rule
    micro_batch: int = 0  # samples in a part of a batch, at most; 0: whole where memory allows
    audit: float = 0.0  # part of the client rounds whose memory is measured and compared with the plan
    holdout: float = 0.1  # part of a client's samples kept for its own evaluation
    evaluate_every: int = 1  # rounds between evaluations, on the server and on clients
    diagnose_every: int = 0  # rounds between diagnoses of the model's blocks, on the server; 0: none
    seed: int = 0
    engine: str = "auto"  # where clients run: inline, cohort, pool or flower; auto picks the fastest
    devices: str = ""  # cpu:2 for two worker processes, cuda:0,cuda:1 for one on each GPU; empty: what there is
    timeout: float = 0.0  # seconds to wait for a round's replies; 0: for all of them
    threads: int = 1  # PyTorch threads; part of the experiment, since sums depend on it
    set: dict[str, dict[str, Any]] = field(default_factory=dict)  # options by part

    def __post_init__(self) -> None:
        for key, kind in FIELDS.items():
            object.__setattr__(self, key, _typed(key, getattr(self, key), kind))
        self._check()

    def _check(self) -> None:
        for key in ("clients", "rounds", "epochs", "batch_size", "evaluate_every", "threads"):
            if getattr(self, key) < 1:
                raise ExperimentError(f"{_dashed(key)} must be at least 1, not {getattr(self, key)}")
        for key, meaning in (("clients_per_round", "all"), ("clients_per_evaluation", f"all, or {EVALUATED} of more")):
            if not 0 <= getattr(self, key) <= self.clients:
                raise ExperimentError(
                    f"{_dashed(key)} must be between 1 and clients ({self.clients}), or 0 for {meaning};"
                    f" it is {getattr(self, key)}"
                )
        for key in ("samples_per_client", "local_steps", "micro_batch", "diagnose_every"):
            if getattr(self, key) < 0:
                raise ExperimentError(f"{_dashed(key)} must be at least 0, not {getattr(self, key)}")
        if self.samples_per_client and not self.resample:
            raise ExperimentError(
                "samples-per-client is how many samples a client draws of its own: add --resample, or leave it out"
            )
        if not 0 <= self.audit <= 1:
            raise ExperimentError(f"audit must be between 0 and 1, not {self.audit:g}")
        if not 0 <= self.holdout < 1:
            raise ExperimentError(f"holdout must be at least 0 and less than 1, not {self.holdout:g}")
        if not 0 <= self.seed < 2**63:
            raise ExperimentError(f"seed must be between 0 and 2^63 − 1, not {self.seed}")
        if self.lr is not None and not 0 < self.lr < float("inf"):
            raise ExperimentError(f"lr must be positive and finite, not {self.lr:g}")
        choose("lr-schedule", self.lr_schedule, SCHEDULES)
        choose("engine", self.engine, ENGINES)
        choose("adapt", self.adapt, ADAPTS)
        if "/" in self.name or self.name.startswith(".") or not self.name.isprintable():
            raise ExperimentError(f"name must be a plain folder name that does not begin with a dot, not {self.name!r}")
        for part in self.set:
            choose("part in set", part, PARTS)

    def sampled(self) -> int:
        """Return the number of clients in a round."""
        return self.clients_per_round or self.clients

    def evaluated(self) -> int:
        """Return the number of clients that evaluate a new model."""
        return self.clients_per_evaluation or min(self.clients, EVALUATED)

    def replace(self, **changes: Any) -> Experiment:
        """Return a copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    def to_toml(self) -> str:
        """Return the experiment as TOML, every field written out."""
        flat = {_dashed(key): getattr(self, key) for key in FIELDS}
        return tomli_w.dumps({key: value for key, value in flat.items() if value is not None and value != {}})

    def to_run_config(self) -> dict[str, Any]:
        """Return the experiment as a Flower run-config: flat, with options packed into one string."""
        config = {_dashed(key): getattr(self, key) for key in FIELDS if key != "set"}
        config = {key: value for key, value in config.items() if value is not None}
        options = [
            shlex.quote(f"{part}.{key}={tomli_w.dumps({'v': value}).partition('=')[2].strip()}")
            for part, table in self.set.items()
            for key, value in table.items()
        ]
        return config | {"set": " ".join(options)}


FIELDS = get_type_hints(Experiment)


def from_mapping(values: Mapping[str, Any]) -> Experiment:
    """Return the experiment of dashed names, as read from TOML.

    Raises:
        ExperimentError: for an unknown name, with the near ones, or a value of the wrong type.
    """
    known = {_dashed(key): key for key in FIELDS}
    fields = {}
    for key, value in values.items():
        choose("setting", key, known)
        fields[known[key]] = value
    if "set" in fields:
        fields["set"] = _tables(fields["set"])
    return Experiment(**fields)


def from_toml(path: Path | None, flags: Mapping[str, Any] | None = None, options: Iterable[str] = ()) -> Experiment:
    """Return the experiment of a file (None: the defaults) with flags and options laid over it.

    Args:
        path: the experiment file.
        flags: values by dashed name.
        options: assignments `part.key=value`.

    Raises:
        ExperimentError: if the file is missing or not TOML, or all together describe no experiment.
    """
    values = _read(path) if path else {}
    merged = _tables(values.get("set", {}))
    for part, table in parse_options(options).items():
        merged.setdefault(part, {}).update(table)
    return from_mapping(values | dict(flags or {}) | {"set": merged})


def from_run_config(config: Mapping[str, Any]) -> Experiment:
    """Return the experiment of a Flower run-config; lr 0 stands for the rule's own, since Flower knows no null."""
    values = {key: value for key, value in config.items() if key != "runs-dir"}
    if not values.get("lr"):
        values.pop("lr", None)
    return from_mapping(values)


def parse_options(assignments: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Return `part.key=value` assignments as a table a part; values are TOML, or else plain strings.

    Raises:
        ExperimentError: if an assignment has another form.
    """
    options: dict[str, dict[str, Any]] = {}
    for assignment in assignments:
        place, equals, text = assignment.partition("=")
        part, dot, key = place.strip().partition(".")
        if not (equals and dot and part and key):
            raise ExperimentError(f"--set wants part.key=value, as in rule.momentum=0.9, not '{assignment}'")
        try:
            value = tomllib.loads(f"v = {text}")["v"]
        except tomllib.TOMLDecodeError:
            value = text.strip()
        options.setdefault(part, {})[key.replace("-", "_")] = value
    return options


def _read(path: Path) -> dict[str, Any]:
    """Return the values of an experiment file."""
    try:
        return tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ExperimentError(f"{path} is not TOML: {error}") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ExperimentError(f"cannot read the experiment file {path}: {reason}") from None


def _tables(options: Any) -> dict[str, dict[str, Any]]:
    """Return options as a table a part, from such tables or from one string of assignments."""
    if not isinstance(options, str):
        return _typed("set", options, FIELDS["set"])
    try:
        words = shlex.split(options)
    except ValueError as error:
        raise ExperimentError(f"set wants part.key=value words, as in rule.momentum=0.9: {error}") from None
    return parse_options(words)


def choose(what: str, name: str, known: Iterable[str]) -> None:
    """Raise ExperimentError if `name` is not known, naming the near ones and all there are."""
    known = list(known)
    if name not in known:
        names = closest(name, known)
        hint = f"did you mean {names}? " if names else ""
        raise ExperimentError(f"unknown {what} '{name}': {hint}known: {', '.join(known)}")


def _typed(key: str, value: Any, kind: Any) -> Any:
    """Return `value` as the field's type, or raise ExperimentError."""
    if kind == (float | None) and value is None:
        return None
    if kind in (float, float | None):
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        raise ExperimentError(f"{_dashed(key)} must be a number, not {value!r}")
    if kind in (bool, int, str):
        if isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
            return value
        wanted = {bool: "true or false", int: "a whole number", str: "a text"}[kind]
        raise ExperimentError(f"{_dashed(key)} must be {wanted}, not {value!r}")
    if not isinstance(value, dict) or not all(isinstance(table, dict) for table in value.values()):
        raise ExperimentError("set must hold a table for each part, as in [set.rule] momentum = 0.9")
    for part, table in value.items():
        for option, given in table.items():
            if isinstance(given, dict) or given != given:
                raise ExperimentError(f"option {part}.{option} must be a value or a list of values, not {given}")
    return {part: {k.replace("-", "_"): v for k, v in table.items()} for part, table in value.items()}


def _dashed(key: str) -> str:
    return key.replace("_", "-")
