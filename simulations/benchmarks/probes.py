"""Directions probed one after another, in place, and several abreast, as one batched program: seconds and memory.

The step of a rule of scalars along K directions, on an MLP and on a LeNet. The peak is the plan's.
"""

from __future__ import annotations

import statistics
from functools import partial

from ...algorithms import MODELS, RULES, Network
from ...client import Trainer
from . import bare
from .flops import seconds_of, step_on_one_batch
from .settings import Row, Settings, in_turns, ratio

COUNT = {"cpu": 64, "cuda": 512}
ABREAST = (1, 4, 16, 64, 512)
PROBED = ("baffle", "forward-gradient")
NETWORKS = {"mlp": (bare.SHAPE, {"hidden": [200]}), "lenet": ((1, 28, 28), {})}
MOST = 2 * 2**30  # bytes of a plan that is tried


def measure(settings: Settings) -> list[Row]:
    """Return a row for each network, rule and number of directions abreast that fits into two gigabytes."""
    return [row for model in NETWORKS for rule in PROBED for row in _rows(model, rule, settings)]


def _rows(model: str, rule: str, settings: Settings) -> list[Row]:
    shape, options = NETWORKS[model]
    net = Network(lambda: MODELS[model](shape, bare.CLASSES, **options), shape, bare.CLASSES)
    count, works, peaks = COUNT[settings.device.partition(":")[0]], {}, {}
    for abreast in (number for number in ABREAST if number <= count):
        trainer = Trainer(RULES[rule](directions=count, abreast=abreast), net, 0)
        peaks[abreast] = trainer.planner.step(trainer.rule, bare.BATCH).peak
        if peaks[abreast] <= MOST:
            works[abreast] = step_on_one_batch(trainer.to(settings.device), bare.BATCH)
    runners = {abreast: partial(seconds_of, work, settings.device) for abreast, work in works.items()}
    seconds = in_turns(runners, settings, f"{model} {rule}, abreast")
    return [
        {"network": model, "rule": rule, "abreast": abreast, "direction_ms": 1000 * statistics.median(each) / count,
         "peak_bytes": peaks[abreast], "pace_of_alone": ratio(seconds[1], each)}
        for abreast, each in seconds.items()
    ]  # fmt: skip
