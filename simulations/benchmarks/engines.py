"""Rounds a second of the hand-written loops and of our whole stack on every engine, in one run.

The workload is that of `bare`: 100 clients of 60 images, 10 a round, one epoch of batches of 20, on an MLP and a CNN.
`alone` is the loop of `bare` around a rule's own step: the arithmetic that an engine cannot do without.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ...algorithms import Batch
from ..world import build
from . import bare, workload
from .settings import Row, Settings, Timing, in_turns, ratio, timing

RULES = {"mlp": ("backprop", "backprop-fused", "mono-forward", "dfa"), "cnn": ("backprop",)}
PLAIN = "plain"
Loop = Callable[[Tensor, Tensor, int], tuple[float, bare.Weights]]


def measure(settings: Settings) -> list[Row]:
    """Return a row for each runner of each model."""
    return [row for model in workload.MODELS for row in rows(model, runners(model, settings), settings)]


def measure_flower(settings: Settings) -> list[Row]:
    """Return the same for Flower's Ray simulation, beside the plain loop."""
    rows_ = []
    for model, options in workload.MODELS.items():
        asked = workload.experiment(settings, **options, engine="flower", devices="cpu:2")
        both = {PLAIN: bare_runners(model, settings)[PLAIN], "backprop flower": _ours(asked, settings)}
        rows_ += rows(model, both, settings)
    return rows_


def rows(model: str, those: dict[str, Callable[[], Timing]], settings: Settings) -> list[Row]:
    """Time runners in turns and return their rows: medians, and the pace beside the plain loop's of the same turn."""
    found = in_turns(those, settings, model)
    paces = {name: [each.rounds_per_s for each in timings] for name, timings in found.items()}
    return [
        {
            "model": model,
            "runner": name,
            "ours": name not in BARE[model],
            "rounds_per_s": statistics.median(paces[name]),
            "of_plain": ratio(paces[name], paces[PLAIN]),
            "start_s": statistics.median(each.start_s for each in timings),
            "each": paces[name],
        }
        for name, timings in found.items()
    ]


def runners(model: str, settings: Settings) -> dict[str, Callable[[], Timing]]:
    """Return all that is timed on a model, by name."""
    found = bare_runners(model, settings)
    for rule in RULES[model]:
        found[f"{rule} alone"] = partial(_time_loop, alone(model, rule, settings), settings)
        for engine, where in workload.engines(settings.device).items():
            asked = workload.experiment(settings, rule=rule, **workload.MODELS[model], **where)
            found[f"{rule} {engine}"] = _ours(asked, settings)
    return found


BARE: dict[str, dict[str, Loop]] = {
    "mlp": {
        PLAIN: bare.plain,
        "by hand": bare.by_hand,
        "two workers": bare.two_workers,
        "bmm": bare.bmm,
        "vmap": bare.vmap,
    },
    "cnn": {
        PLAIN: partial(bare.plain, model=bare.cnn),
        "cpu aware": bare.cpu_aware,
        "two workers": partial(bare.two_workers, model=bare.cnn),
        "vmap": partial(bare.vmap, model=bare.cnn),
    },
}


def bare_runners(model: str, settings: Settings) -> dict[str, Callable[[], Timing]]:
    """Return the hand-written loops over a model, those that can run on the device."""
    loops = {name: loop for name, loop in BARE[model].items() if settings.device == "cpu" or name != "two workers"}
    return {name: partial(_time_loop, loop, settings) for name, loop in loops.items()}


def alone(model: str, rule: str, settings: Settings) -> Loop:
    """Return the loop of `bare` around a rule's own step: no client, no message, no records."""

    def loop(x: Tensor, y: Tensor, rounds: int) -> tuple[float, bare.Weights]:
        world = build(workload.experiment(settings, rule=rule, **workload.MODELS[model]))
        trainer = world.trainer.to(settings.device)
        params = {key: p.to(x.device) for key, p in trainer.initial_params().items()}
        state, weight = trainer.state(trainer.rule, params), torch.ones(bare.BATCH, device=x.device)

        def step(local: bare.Weights, x: Tensor, y: Tensor) -> None:
            trainer.rule.step(trainer.net, state, Batch(x, y, weight), bare.LR)

        local = list(params.values())
        return bare.fed_avg(step, x, y, rounds, [p.clone() for p in local], local)

    return loop


def _ours(asked, settings: Settings) -> Callable[[], Timing]:
    return partial(workload.time_run, asked, settings)


def _time_loop(loop: Loop, settings: Settings) -> Timing:
    data = workload.synthetic().train
    x, y = data.x.to(settings.device), data.y.to(settings.device)
    began = time.perf_counter()
    steady, _ = loop(x, y, settings.rounds)
    return timing(time.perf_counter() - began, steady, settings)
