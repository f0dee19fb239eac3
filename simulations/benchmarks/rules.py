"""Every rule on every engine: clients a second on the workload's MLP, and whether `auto` chooses the fastest.

A rule that wants two hidden layers gets them, and one that compares losses takes few directions. Rules have their own
learning rates. `auto` is not timed: what it chooses for a long run is looked up among the others.
"""

from __future__ import annotations

import statistics
from functools import partial
from typing import Any

from ...algorithms import RULES, ScalarRule
from ...server.rounds import RunFailed
from ..experiment import Experiment
from ..parts import MISTAKES
from ..world import build
from . import bare, workload
from .settings import Row, Settings, in_turns

DIRECTIONS = 4  # K
DEPTHS = ([200], [200, 200])
LEFT_OUT = ("pool(1)", "auto")


def measure(settings: Settings) -> list[Row]:
    """Return a row for each rule, in clients a second."""
    rows = [_row(rule, settings) for rule in RULES]
    best = max((row["best"] for row in rows if row["best"]), default=None)
    return [row | {"of_fastest_rule": row["best"] / best if row["best"] else None} for row in rows]


def _row(rule: str, settings: Settings) -> Row:
    engines = {name: where for name, where in workload.engines(settings.device).items() if name not in LEFT_OUT}
    row: Row = {"rule": rule, "hidden": None, **dict.fromkeys(engines), "fastest": None, "auto": None, "best": None}
    try:
        asked = asked_of(rule, settings)
        row["hidden"] = "-".join(map(str, asked.set["model"]["hidden"]))
        found = in_turns({name: partial(_pace, asked.replace(**where), settings) for name, where in engines.items()},
                         settings, rule)  # fmt: skip
        choice = workload.choice_for(build(asked.replace(**workload.engines(settings.device)["auto"])))
    except (*MISTAKES, RunFailed) as failure:
        return row | {"reason": " ".join(str(failure).split())}
    return row | verdict({name: statistics.median(paces) for name, paces in found.items()}, *choice[:2])


def verdict(paces: dict[str, float], engine: str, devices: tuple[str, ...]) -> Row:
    """Return the figures of a rule's paces on engines, and what `auto` reaches of the fastest of them."""
    fastest = max(paces, key=paces.get)
    chosen = f"{engine}({len(devices)})" if engine == "pool" or len(devices) > 1 else engine
    reached = paces[chosen] / paces[fastest] if chosen in paces else None
    return {**paces, "fastest": fastest, "auto": chosen, "auto_of_fastest": reached, "best": paces[fastest]}


def asked_of(rule: str, settings: Settings) -> Experiment:
    """Return the workload for a rule, with as many hidden layers as it wants.

    Raises:
        ExperimentError, RuleError: if it can train neither network.
    """
    options: dict[str, Any] = {"directions": DIRECTIONS} if issubclass(RULES[rule], ScalarRule) else {}
    for hidden in DEPTHS:
        parts = {"model": {"hidden": hidden}, "rule": options}
        asked = workload.experiment(settings, rule=rule, lr=None, model="mlp", set=parts)
        try:
            build(asked)
            break
        except MISTAKES:
            if hidden is DEPTHS[-1]:
                raise
    return asked


def _pace(asked: Experiment, settings: Settings) -> float:
    """Return clients a second."""
    return bare.SAMPLED * workload.time_run(asked, settings).rounds_per_s
