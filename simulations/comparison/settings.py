"""Which rules are compared, and with which experiment each: the common one, but for settings of its own.

What defines the task is common to all: data, partition, clients, fleet, held-out part, seeds. The rest a rule may have
otherwise, by `--for RULE.key=value`; a comparison names what it has otherwise wherever it shows the rule's numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ...algorithms import RULES
from ..experiment import FIELDS, PARTS, Experiment, ExperimentError, choose, parse_options
from ..naming import named

COMMON = (
    "name", "rule", "seed", "data", "partition", "clients", "resample", "samples_per_client", "fleet", "holdout",
    "engine", "threads",
)  # fmt: skip
OWN = {key.replace("_", "-"): key for key in FIELDS if key not in (*COMMON, "set")}
OWN_PARTS = tuple(part for part in PARTS if part != "data")

Settings = dict[str, Any]  # a rule's own: values by dashed name or part.option


def chosen_rules(text: str) -> list[str]:
    """Return the rules of a list `a,b,c`, or all that are built in for `all`.

    Raises:
        ExperimentError: for a rule that there is not, with the near ones.
    """
    rules = list(RULES) if text.strip() == "all" else list(dict.fromkeys(filter(None, map(str.strip, text.split(",")))))
    if not rules:
        raise ExperimentError("--rules wants names with commas between, as in backprop,dfa, or all")
    for rule in rules:
        named("rule", rule, RULES)
    return rules


def own_settings(assignments: Iterable[str], rules: Sequence[str]) -> dict[str, Settings]:
    """Return the settings that each rule has for itself, from assignments `RULE.key=value`.

    Raises:
        ExperimentError: for a rule that is not compared, or a key that is none or is common to all rules.
    """
    own: dict[str, Settings] = {rule: {} for rule in rules}
    for assignment in assignments:
        place, equals, text = assignment.partition("=")
        place = place.strip()
        rule = max((rule for rule in rules if place.startswith(f"{rule}.")), key=len, default=None)
        if rule is None and equals:
            choose("rule in --for", place.partition(".")[0], rules)
        if rule is None or not equals:
            raise ExperimentError(f"--for wants RULE.key=value, as in baffle.lr=0.3, not '{assignment}'")
        key = _checked(place.removeprefix(f"{rule}."))
        own[rule][key] = parse_options([f"set.value={text}"])["set"]["value"]
    return own


def experiment_of(common: Experiment, rule: str, own: Mapping[str, Any]) -> Experiment:
    """Return the experiment of a rule: the common one with the rule's own settings over it.

    Raises:
        ExperimentError: if its own settings are none.
    """
    options = {part: dict(table) for part, table in common.set.items()}
    fields = {"rule": rule, "set": options}
    for key, value in own.items():
        part, dot, option = key.partition(".")
        if dot:
            options.setdefault(part, {})[option.replace("-", "_")] = value
        else:
            fields[OWN[key]] = value
    try:
        return common.replace(**fields)
    except ExperimentError as error:
        raise ExperimentError(f"--for {rule}: {error}") from None


def written(own: Mapping[str, Any]) -> str:
    """Return settings in words."""
    return ", ".join(f"{key} {value}" for key, value in own.items())


def _checked(key: str) -> str:
    """Return the key of a setting that a rule may have for itself, with dashes."""
    part, dot, option = key.partition(".")
    fields = {field.replace("_", "-") for field in COMMON}
    if part in fields and part != "rule":
        raise ExperimentError(f"--for cannot change {part}, which is the same for every rule: use --{part}")
    if dot and option:
        choose("part in --for", part, OWN_PARTS)
        return key
    key = key.replace("_", "-")
    choose("setting in --for", key, (*OWN, *(f"{part}.OPTION" for part in OWN_PARTS)))
    return key
