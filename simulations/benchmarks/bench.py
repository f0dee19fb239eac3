"""`fedforward bench`: which parts there are, and one run of those that are asked for.

    engines     the hand-written loops and our whole stack on every engine
    overhead    of these: what an engine costs beside the bare arithmetic
    scaling     clients that exist up to a million, clients of a round up to a thousand: seconds and memory
    flops       how much of the device every rule's step uses
    metering    what plans and audits cost
    probes      directions one after another, and abreast                              slow
    compile     what torch.compile makes of a rule's step                              slow: wants a C++ compiler
    rules       every rule on every engine                                             slow: minutes a rule
    flower      the workload of `engines` on Flower's Ray simulation                   slow, and wants Ray
    peers       the workload of `engines` on other simulators, which are installed     slow, and wants a network

Only ratios within one run mean anything: a machine that does something else slows all of them down, most of the time
alike.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..engines.choice import cores
from ..experiment import ExperimentError, choose
from . import compiled, engines, flops, metering, overhead, peers, probes, rules, scaling
from .picture import draw_bench
from .settings import Row, Settings

Results = dict[str, list[Row]]


class Part(NamedTuple):
    """A part of the benchmark: what measures it, given the parts before it, and whether it must be asked for."""

    measure: Callable[[Settings, Results], list[Row]]
    slow: bool = False


PARTS = {
    "engines": Part(lambda settings, before: engines.measure(settings)),
    "overhead": Part(lambda settings, before: overhead.measure(settings, before.get("engines", ()))),
    "scaling": Part(lambda settings, before: scaling.measure(settings)),
    "flops": Part(lambda settings, before: flops.measure(settings)),
    "metering": Part(lambda settings, before: metering.measure(settings)),
    "probes": Part(lambda settings, before: probes.measure(settings), slow=True),
    "compile": Part(lambda settings, before: compiled.measure(settings), slow=True),
    "rules": Part(lambda settings, before: rules.measure(settings), slow=True),
    "flower": Part(lambda settings, before: engines.measure_flower(settings), slow=True),
    "peers": Part(lambda settings, before: peers.measure(settings), slow=True),
}
ON_CPU = ("metering", "flower", "peers")


def bench(only: str, settings: Settings, picture: Path | None = None) -> dict[str, Any]:
    """Measure some parts, draw them if a picture is named, and return {"machine": …, part: rows, …}.

    Args:
        only: names of parts with commas between; empty for all that are not slow.
        settings: how much, and where.
        picture: a PNG file.

    Raises:
        ExperimentError: for an unknown part, a device that is not there, or another kind of picture.
    """
    if picture and picture.suffix.lower() != ".png":
        raise ExperimentError(f"--picture writes a PNG: name a file that ends in .png, not {picture}")
    if picture and not picture.parent.is_dir():  # found now, not after minutes
        raise ExperimentError(f"cannot write {picture}: there is no folder {picture.parent}")
    parts = parts_named(only, settings.device)
    torch.set_num_threads(1)
    settings.tell(f"measuring {', '.join(parts)} on {settings.device}; other parts: {', '.join(_others(parts))}")
    results: Results = {}
    before = machine(settings)
    for name in parts:
        results[name] = PARTS[name].measure(settings, results)
    found = {"machine": before | {"load_after": _load()}, **results}
    if picture:
        _write(picture, found)
    return found


def parts_named(only: str, device: str) -> list[str]:
    """Return the parts that are asked for, in the order of PARTS."""
    _check_device(device)
    asked = [word.strip() for word in only.split(",") if word.strip()]
    for name in asked:
        choose("part of the benchmark", name, PARTS)
    asked = asked or [name for name, part in PARTS.items() if not part.slow]
    if device != "cpu" and (wrong := [name for name in asked if name in ON_CPU and only]):
        raise ExperimentError(f"{', '.join(wrong)} is measured on the CPU: drop --device {device}, or that part")
    return [name for name in PARTS if name in asked and not (device != "cpu" and name in ON_CPU)]


def _check_device(device: str) -> None:
    kind, _, number = device.partition(":")
    if device != "cpu" and (kind != "cuda" or not (number or "0").isdigit()):
        raise ExperimentError(f"bench measures on one device, cpu or cuda:GPU, not on '{device}'")
    if kind == "cuda" and int(number or 0) >= torch.cuda.device_count():
        raise ExperimentError(f"--device {device}: PyTorch sees no such GPU here")


def machine(settings: Settings) -> Row:
    """Return what the figures depend on beside the code."""
    gpu = torch.cuda.get_device_name(settings.device) if settings.device != "cpu" else None
    return {
        "device": gpu or f"{platform.machine()}, {cores()} cores", "torch": torch.__version__,
        "python": platform.python_version(), "load_before": _load(),
        "repeats": settings.repeats, "rounds": settings.rounds, "warm_up": settings.warm_up,
    }  # fmt: skip


def _load() -> float | None:
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def _others(parts: list[str]) -> list[str]:
    return [name for name in PARTS if name not in parts] or ["none"]


def _write(picture: Path, results: dict[str, Any]) -> None:
    """Draw the picture.

    Raises:
        ExperimentError: if the file cannot be written.
    """
    try:
        picture.write_bytes(draw_bench(results))
    except OSError as error:
        raise ExperimentError(f"cannot write {picture} ({error.strerror}): choose another --picture") from None
