"""How much of the device a rule's step uses: its planned FLOPs in its measured seconds, beside a matrix product's.

Two MLPs: the workload's, whose products are too small for any device, and a wide one on batches of 100. The product is
of two 2048×2048 matrices, in float32, on the same device and as many threads.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...algorithms import MODELS, RULES, Network, NetworkError, Rule, RuleError, ScalarRule
from ...algorithms.seeds import Place
from ...client import Trainer
from ...client.step import load_parts, take_step
from . import bare
from .rules import DIRECTIONS
from .settings import Row, Settings, in_turns

SIDE, PRODUCT = 2048, "matrix product"
NETWORKS = {"narrow": ([200, 200], bare.BATCH), "wide": ([1000, 1000], 100)}
ATLEAST = 0.05  # seconds of one measurement


def measure(settings: Settings) -> list[Row]:
    """Return a row for each rule and network."""
    return [row for name, (hidden, batch) in NETWORKS.items() for row in _rows(name, hidden, batch, settings)]


def _rows(name: str, hidden: list[int], batch: int, settings: Settings) -> list[Row]:
    works: dict[str, Callable[[], Any]] = {PRODUCT: _product(settings.device)}
    flops: dict[str, int] = {PRODUCT: 2 * SIDE**3}
    for rule in RULES:
        with_rule = _trainer(rule, hidden)
        if with_rule:
            works[rule] = step_on_one_batch(with_rule.to(settings.device), batch)
            flops[rule] = with_rule.planner.step(with_rule.rule, batch).flops
    seconds = in_turns({key: partial(seconds_of, work, settings.device) for key, work in works.items()}, settings, name)
    return figures(name, flops, {key: statistics.median(each) for key, each in seconds.items()})


def figures(name: str, flops: dict[str, int], seconds: dict[str, float]) -> list[Row]:
    """Return a row for each work: what it does a second, and as a part of the matrix product's."""
    paces = {key: flops[key] / seconds[key] for key in flops}
    return [
        {"network": name, "rule": key, "flops": flops[key], "step_ms": 1000 * seconds[key],
         "flops_per_s": pace, "of_product": pace / paces[PRODUCT]}
        for key, pace in paces.items()
    ]  # fmt: skip


def seconds_of(work: Callable[[], Any], device: str) -> float:
    """Return the seconds of one call of some work, called as often as takes ATLEAST, after a call that is not timed."""
    mark, calls = torch.empty(0, device=device), 1
    work()
    while True:
        began = bare.now(mark)
        for _ in range(calls):
            work()
        took = bare.now(mark) - began
        if took >= ATLEAST:
            return took / calls
        calls = max(2 * calls, int(calls * ATLEAST / max(took, 1e-6)))


def _trainer(name: str, hidden: list[int]) -> Trainer | None:
    """Return a trainer of a rule, or None if it cannot train this network."""
    kind: type[Rule] = RULES[name]
    rule = kind(directions=DIRECTIONS) if issubclass(kind, ScalarRule) else kind()
    net = Network(lambda: MODELS["mlp"](bare.SHAPE, bare.CLASSES, hidden=hidden), bare.SHAPE, bare.CLASSES)
    try:
        return Trainer(rule, net, 0)
    except (RuleError, NetworkError):
        return None


def step_on_one_batch(trainer: Trainer, batch: int) -> Callable[[], Any]:
    """Return a step on one batch that is there already, at a learning rate that leaves the weights where they are."""
    device, rule, data = trainer.device, trainer.rule, torch.Generator().manual_seed(0)
    x = torch.randn(batch, *trainer.net.shape, generator=data).to(device)
    y = torch.randint(bare.CLASSES, (batch,), generator=data).to(device)
    state = trainer.state(rule, {key: p.to(device) for key, p in trainer.initial_params().items()})
    draws = rule.draw(Place(0, 0, 0, 0), batch, bare.CLASSES)
    draws = draws.to(device) if isinstance(draws, Tensor) else draws

    def parts() -> Iterator:
        return load_parts(lambda rows: (x, y), range(batch), draws, 0)

    return lambda: take_step(rule, trainer.net, state, parts(), 1e-9)


def _product(device: str) -> Callable[[], Tensor]:
    a, b = (torch.randn(SIDE, SIDE, device=device) for _ in range(2))
    out = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=out)
