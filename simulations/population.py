"""Who the clients are: which of them is which device, and what becomes of them there.

A fleet is a weighted mix, `mcu-1m:0.6,pi-zero:0.3,phone:0.1`, of built-in profiles and of TOML files that describe a
device. Shares are exact to a client; who is what is a function of the run seed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ..algorithms.seeds import Purpose, generator
from ..client.budget import PROFILES, Device, DeviceError, read_device
from ..client.fitting import Fit
from .formats import format_bytes
from .refusal import closest

AS_ASKED = "as asked"  # how a client trains that changes nothing to fit its device


def devices_of(fleet: str, clients: int, seed: int) -> list[Device]:
    """Return the device of every client, or nothing for an empty fleet.

    Raises:
        DeviceError: for an unknown device (with the near ones), a file that describes none, or a weight that is none.
    """
    mix = [_entry(part) for part in fleet.split(",") if part.strip()]
    if not mix:
        return []
    total = sum(weight for _, weight in mix)
    shares = [clients * weight / total for _, weight in mix]
    counts = [int(share) for share in shares]
    by_remainder = sorted(range(len(mix)), key=lambda i: counts[i] - shares[i])  # the largest remainders first
    for i in by_remainder[: clients - sum(counts)]:
        counts[i] += 1
    devices = [device for (device, _), count in zip(mix, counts, strict=True) for _ in range(count)]
    return [devices[i] for i in generator(seed, Purpose.FLEET).permutation(clients)]


def find_device(name: str) -> Device:
    """Return a built-in device, or the one that a TOML file describes.

    Raises:
        DeviceError: if there is none.
    """
    if name.endswith(".toml"):
        return read_device(Path(name))
    if name not in PROFILES:
        near = closest(name, PROFILES)
        hint = f"did you mean {near}? " if near else ""
        raise DeviceError(f"unknown device '{name}': {hint}known: {', '.join(PROFILES)}, or a file that ends in .toml")
    return PROFILES[name]


def _entry(text: str) -> tuple[Device, float]:
    name, _, weight = text.strip().partition(":")
    try:
        share = float(weight or 1)
    except ValueError:
        share = 0.0
    if not 0 < share < float("inf"):
        raise DeviceError(f"--fleet wants device:weight with weights above 0, as in mcu-1m:0.6,phone:0.4, not '{text}'")
    return find_device(name.strip()), share


class Admission(NamedTuple):
    """What becomes of a client on its device."""

    client: int
    device: Device
    fit: Fit | None  # None: over budget
    words: str  # how it trains, or why it does not


def describe(admissions: Sequence[Admission]) -> list[str]:
    """Return a line a device, the one with least memory first: how many clients it has, and how they train."""
    lines = []
    for device in sorted({admission.device for admission in admissions}, key=lambda device: device.budget):
        counted = Counter(admission.words for admission in admissions if admission.device == device)
        said = "; ".join(f"{count} {words}" for words, count in counted.most_common())
        count = counted.total()
        clients = f"{count} client{'s' * (count > 1)}"
        lines.append(f"{device.name} ({format_bytes(device.budget)} for tensors), {clients}: {said}")
    return lines
