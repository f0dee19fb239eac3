"""What is asked of a plan: from the words of the command line to rows."""

from __future__ import annotations

from collections.abc import Iterable

from ...algorithms import Rule
from ..comparison.settings import chosen_rules
from ..experiment import Experiment, ExperimentError, choose, parse_options
from ..parts import build_network, build_rule
from .rooms import devices_in
from .rows import Outlook, outlook
from .shapes import find_shape

PARTS = ("rule", "model", "data")  # whose options matter to a plan


def plan_for(
    *,
    model: str,
    data: str | None,
    shape: str | None,
    classes: int | None,
    batch_size: int,
    micro_batch: int,
    rules: str,
    fleet: str,
    options: Iterable[str],
    granule: int,
    timeline: bool,
) -> Outlook:
    """Return what every rule asked for would need.

    Args:
        model: built-in name or module:object.
        data: a data set's name; None for the experiment's own, or where there is a shape.
        shape: of a sample, as `1x28x28`, instead of data; `classes` comes with it.
        classes: number of classes.
        batch_size: samples in a step.
        micro_batch: samples in a part, for backpropagation that takes its batch in parts.
        rules: `all`, or names with commas between.
        fleet: devices for which the largest batch is found; may be empty.
        options: assignments `part.key=value`.
        granule: bytes that every storage is rounded up to a multiple of.
        timeline: keep the bytes after every operation.

    Raises:
        ExperimentError, DataError, DeviceError, NetworkError: one line each, naming the remedy.
    """
    for key, number in {"micro-batch": micro_batch, "granule": granule}.items():
        if number < 1:
            raise ExperimentError(f"{key} must be at least 1, not {number}")
    if micro_batch >= max(batch_size, 2):
        raise ExperimentError(f"micro-batch must be below batch-size ({batch_size}), not {micro_batch}")
    if shape and data:
        raise ExperimentError(f"--shape stands for data: drop it, or --data {data}")
    chosen = parse_options(options)
    for part in chosen:
        choose("part in set", part, PARTS)
    experiment = Experiment(model=model, data=data or shape or Experiment.data, batch_size=batch_size, set=chosen)
    seen = find_shape(experiment, shape, classes)
    net = build_network(experiment, seen)
    return outlook(
        net, rules_of(experiment, chosen_rules(rules)), batch_size, model=model, data=seen.name,
        micro_batch=micro_batch, fleet=devices_in(fleet), granule=granule, timeline=timeline,
    )  # fmt: skip


def rules_of(experiment: Experiment, names: Iterable[str]) -> dict[str, Rule]:
    """Return the rules of some names, with the options that the experiment gives to one.

    Raises:
        ExperimentError: if several rules would have to share options.
    """
    names, options = list(names), experiment.set.get("rule", {})
    if options and len(names) > 1:
        raise ExperimentError(f"--set rule.{next(iter(options))} is an option of one rule: name that with --rules NAME")
    return {name: build_rule(experiment.replace(rule=name)) for name in names}
