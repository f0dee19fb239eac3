"""What knowing the memory costs: client rounds with plans beside client rounds without, and audited ones.

Workload: one client's round of 60 steps on batches of 20 random 28×28 images, MLP 784-200-10 and LeNet. "Bare" is the
same training with planning, budget and audit taken out; "planned" is what an unaudited run does; "audited" watches
every operation. All three run in turns in this process, and the medians of their ratios are told. The first plan of a
step is paid once a run, and told apart.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from ...algorithms import MODELS, RULES, Network
from ...client import Trainer
from ...client.trainer import Assignment
from ..datasets import Samples
from .settings import Row, Settings

SHAPE, CLASSES, SAMPLES, BATCH, BUDGET = (1, 28, 28), 10, 1200, 20, 2**40
RULES_MEASURED, MODELS_MEASURED = ("backprop", "mono-forward"), ("mlp", "lenet")
ASKED = Assignment(round=1, lr=0.01, epochs=1, batch_size=BATCH, evaluate=False)


class Bare(Trainer):
    """A trainer that neither plans nor asks whether it is audited."""

    def __init__(self, *args, **options) -> None:
        super().__init__(*args, **options)
        self._fit = super().fit_to(SAMPLES, ASKED, None)

    def fit_to(self, samples, todo, budget):
        """Return what was known before."""
        return self._fit

    def audited(self, server_round, client):
        """Return False."""
        return False

    def flops(self, samples, todo, budget):
        """Return 0."""
        return 0


def measure(settings: Settings) -> list[Row]:
    """Return a row for each rule and model."""
    rows = []
    for rule in RULES_MEASURED:
        for model in MODELS_MEASURED:
            settings.tell(f"metering {rule}, {model}")
            rows.append(compare(rule, model, 3 * settings.repeats))  # a round takes little time
    return rows


def compare(rule: str, model: str, repeats: int) -> Row:
    """Return medians: ratios to the bare rounds, and the milliseconds of a first plan."""
    options = {"hidden": [200]} if model == "mlp" else {}
    net = Network(lambda: MODELS[model](SHAPE, CLASSES, **options), SHAPE, CLASSES)
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(SAMPLES, *SHAPE, generator=g), torch.randint(CLASSES, (SAMPLES,), generator=g)
    train = Samples(x, y, torch.arange(SAMPLES), 1.0)
    test = train.subset(torch.arange(0))
    bare, planned, audited = (kind(RULES[rule](), net, 0) for kind in (Bare, Trainer, Trainer))
    audited.audit = 1.0
    trainers = {"bare": bare, "planned": planned, "audited": audited}
    first = _seconds(lambda: planned.fit_to(SAMPLES, ASKED, BUDGET))
    rounds = [
        {
            name: _seconds(lambda t=trainer: t.fit(t.initial_params(), train, test, 0, ASKED, BUDGET))
            for name, trainer in trainers.items()
        }
        for _ in range(repeats + 1)
    ][1:]
    ratio = lambda name: statistics.median(each[name] / each["bare"] for each in rounds)  # noqa: E731
    return {
        "rule": rule, "model": model, "planned": ratio("planned"), "audited": ratio("audited"),
        "first_plan_ms": 1000 * first, "bare_ms": 1000 * statistics.median(each["bare"] for each in rounds),
    }  # fmt: skip


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
