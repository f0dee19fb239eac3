"""What `torch.compile` makes of a rule's step on the workload: what it costs, and the rounds after which it pays.

There is no such option of a run: see the figures.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from ...algorithms import Batch
from ..world import build
from . import bare, engines, workload
from .flops import seconds_of
from .settings import Row, Settings, in_turns

STEPS = bare.SAMPLED * bare.SAMPLES // bare.BATCH  # of a round


def measure(settings: Settings) -> list[Row]:
    """Return a row for each rule and model."""
    return [_row(model, rule, settings) for model, rules in engines.RULES.items() for rule in rules]


def _row(model: str, rule: str, settings: Settings) -> Row:
    row: Row = {"model": model, "rule": rule, "time_of_eager": None}
    step, arguments = step_of(model, rule, settings)
    faster, began = torch.compile(step), time.perf_counter()
    with torch.no_grad():
        try:
            for _ in range(2):
                faster(*arguments)
        except Exception as failure:  # of the compiler: of many kinds, and long
            return row | {"reason": " ".join(str(failure).split())[:100]}
        finally:
            spent = time.perf_counter() - began
        both = {"eager": step, "compiled": faster}
        timed = {name: lambda f=f: seconds_of(lambda: f(*arguments), settings.device) for name, f in both.items()}
        found = in_turns(timed, settings, f"{model} {rule}")
    return row | figures(spent, *(statistics.median(found[name]) for name in both))


def step_of(model: str, rule: str, settings: Settings) -> tuple[Callable[..., Any], tuple]:
    """Return a rule's step as a function of tensors alone, which changes next to nothing, and its arguments."""
    world = build(workload.experiment(settings, rule=rule, **workload.MODELS[model]))
    trainer, data = world.trainer.to(settings.device), workload.synthetic().train
    state = trainer.state(trainer.rule, {key: p.to(settings.device) for key, p in trainer.initial_params().items()})

    def step(params, x, y, weight):
        return tuple(trainer.rule.step(trainer.net, state._replace(params=params), Batch(x, y, weight), 1e-9))

    batch = (data.x[: bare.BATCH], data.y[: bare.BATCH], torch.ones(bare.BATCH))
    return step, (state.params, *(part.to(settings.device) for part in batch))


def figures(compile_s: float, eager_s: float, compiled_s: float) -> Row:
    """Return the figures of a step; the rounds after which compiling pays are missing where it never does."""
    saved = eager_s - compiled_s
    return {
        "compile_s": compile_s,
        "eager_ms": 1000 * eager_s,
        "compiled_ms": 1000 * compiled_s,
        "time_of_eager": compiled_s / eager_s,
        "pays_after_rounds": int(compile_s / saved / STEPS) + 1 if saved > 0 else None,
    }
