"""What every rule would need on a network and a batch: memory, arithmetic, traffic, and the devices that it fits.

Nothing runs and no data are read: every number is planned on tensors without values (`client/plan.py`), and is the
number that a run measures. Two rows stand beside the rules, so that each is compared with what is hard to beat: one
pass of the plain network over the same batch, and backpropagation that takes the batch in small parts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from ...algorithms import Backprop, Network, Rule, RuleError
from ...client.budget import PROFILES, Device
from ...client.plan import MemoryPlan, Planner
from ..parts import blamed_on
from .rooms import MOST, Room, fits_in_parts, rooms_of

INFERENCE = "inference"
HELD = ("parameters", "state", "optimizer", "gradients")  # the parts of a peak that are there before the batch


@dataclass(frozen=True)
class Row:
    """What one rule needs.

    Attributes:
        name: of the rule, as it was asked for.
        plan: of a step, or None if the rule cannot train the network.
        reason: why it cannot.
        fits: the devices that take a step of the whole batch, the smallest first.
        rooms: what the devices of the fleet have room for.
    """

    name: str
    plan: MemoryPlan | None
    reason: str = ""
    fits: tuple[str, ...] = ()
    rooms: tuple[Room, ...] = ()


@dataclass(frozen=True)
class Outlook:
    """Every row, and what they were planned for.

    Attributes:
        model: the network's name.
        data: the data's name, or their shape.
        shape: of one sample.
        classes: number of classes.
        parameters: numbers that the network holds.
        batch: samples in a step.
        naive: plan of plain backpropagation.
        rows: inference, the rules, and backpropagation in parts, unless the batch is one sample.
        fleet: the devices that were asked about; without any, `Row.fits` is of the built-in ones.
    """

    model: str
    data: str
    shape: tuple[int, ...]
    classes: int
    parameters: int
    batch: int
    naive: MemoryPlan
    rows: tuple[Row, ...]
    fleet: tuple[Device, ...]

    @property
    def inference(self) -> int:
        """Peak of one pass of the plain network, in bytes."""
        return self.rows[0].plan.peak

    def to_dict(self) -> dict[str, Any]:
        """Return all numbers by name; bytes and operations are exact."""
        return {
            "model": self.model,
            "data": self.data,
            "shape": list(self.shape),
            "classes": self.classes,
            "parameters": self.parameters,
            "batch_size": self.batch,
            "largest_batch_looked_for": MOST,
            "rows": [self._row(row) for row in self.rows],
        }

    def _row(self, row: Row) -> dict[str, Any]:
        if row.plan is None:
            return {"rule": row.name, "reason": row.reason}
        peak = row.plan.peak
        ratios = {
            "times_inference": peak / self.inference,
            "times_backprop": peak / self.naive.peak,
            "flops_per_sample": row.plan.flops / self.batch,
        }
        plan = {k: v for k, v in dataclasses.asdict(row.plan).items() if k not in ("peak", "timeline")}
        rooms = [
            {"device": room.device.name, "budget_bytes": room.device.budget}
            | {"largest_batch": room.largest, "in_parts": room.in_parts}
            for room in row.rooms
        ]
        return {"rule": row.name, "peak_bytes": peak} | ratios | plan | {"fits": list(row.fits), "rooms": rooms}


def outlook(
    net: Network,
    rules: Mapping[str, Rule],
    batch: int,
    *,
    model: str,
    data: str,
    micro_batch: int = 1,
    fleet: Sequence[Device] = (),
    granule: int = 1,
    timeline: bool = False,
) -> Outlook:
    """Return what every rule needs for a step of `batch` samples.

    Args:
        net: the network.
        rules: by the names that the rows take.
        batch: samples in a step.
        model: the network's name.
        data: the data's name, or their shape.
        micro_batch: samples in a part, in the row of backpropagation in parts.
        fleet: devices for which the largest batch is found.
        granule: bytes that every storage is rounded up to a multiple of.
        timeline: keep the bytes after every operation in the plans.
    """
    planner = Planner(net, granule)
    look = partial(_row, planner, batch=batch, fleet=fleet, timeline=timeline)
    rows = [_inference(planner, batch, fleet), *(look(name, rule) for name, rule in rules.items())]
    if batch > 1:
        rows.append(look(f"backprop, parts of {micro_batch}", Backprop(), size=micro_batch))
    return Outlook(
        model=model,
        data=data,
        shape=net.shape,
        classes=net.classes,
        parameters=sum(p.numel() for p in planner.params(Backprop()).values()),
        batch=batch,
        naive=planner.step(Backprop(), batch, timeline=timeline),
        rows=tuple(rows),
        fleet=tuple(fleet),
    )


def _inference(planner: Planner, batch: int, fleet: Sequence[Device]) -> Row:
    """Return the row of one pass of the plain network; nothing is sent for it."""
    plan, peak_of = planner.forward(batch), lambda samples: planner.forward(samples).peak
    rooms = rooms_of(fleet, peak_of, batch, plan.peak, _held(plan), lambda budget: False)
    return Row(INFERENCE, plan, "", _fitting(plan, fleet), rooms)


def _row(
    planner: Planner, name: str, rule: Rule, *, batch: int, fleet: Sequence[Device], timeline: bool, size: int = 0
) -> Row:
    """Return the row of a rule that takes its batch whole, or in parts of `size` samples."""
    try:
        with blamed_on(f"rule '{name}'"):
            rule.check(planner.net)
            plan = planner.step(rule, batch, size, timeline=timeline)
    except RuleError as error:
        return Row(name, None, str(error))
    peak_of = lambda samples: planner.step(rule, samples, size if size < samples else 0).peak  # noqa: E731
    splits = lambda budget: not size and fits_in_parts(planner, rule, batch, budget)  # noqa: E731
    rooms = rooms_of(fleet, peak_of, batch, plan.peak, _held(plan), splits)
    return Row(name, plan, "", _fitting(plan, fleet), rooms)


def _held(plan: MemoryPlan) -> int:
    return sum(plan.parts[part] for part in HELD)


def _fitting(plan: MemoryPlan, fleet: Sequence[Device]) -> tuple[str, ...]:
    devices = sorted(fleet or PROFILES.values(), key=lambda device: device.budget)
    return tuple(device.name for device in devices if plan.peak <= device.budget)
