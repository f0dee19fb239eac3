"""Who the clients are: which of them is which device, and what becomes of them there.

A fleet is a weighted mix, `mcu-1m:0.6,pi-zero:0.3,phone:0.1`, of built-in profiles and of TOML files that describe a
device. Shares are exact to a client; who is what is a function of the run seed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..algorithms.seeds import Purpose, generator
from ..client.budget import PROFILES, Device, DeviceError, read_device
from ..client.fitting import Fit
from .formats import format_bytes
from .refusal import closest

AS_ASKED = "as asked"  # how a client trains that changes nothing to fit its device


class Devices(Sequence[Device]):
    """The device of every client, a byte each.

    Args:
        kinds: the devices of a fleet.
        counts: how many clients have each.
        seed: run seed; decides which.
    """

    def __init__(self, kinds: Sequence[Device], counts: Sequence[int], seed: int) -> None:
        self.kinds = tuple(kinds)
        self.codes = np.repeat(np.arange(len(kinds), dtype=np.min_scalar_type(len(kinds))), counts)
        generator(seed, Purpose.FLEET).shuffle(self.codes)
        self.counts = Counter()
        for kind, count in zip(kinds, counts, strict=True):
            self.counts[kind] += count
        self.counts = +self.counts  # without those that nobody has

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, client: int) -> Device:
        return self.kinds[self.codes[client]]


def devices_of(fleet: str, clients: int, seed: int) -> Sequence[Device]:
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
    return Devices([device for device, _ in mix], counts, seed)


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
    """What becomes of clients that have as many samples and the same device."""

    clients: int
    device: Device
    fit: Fit | None  # None: over budget
    words: str  # how they train, or why they do not


def describe(admissions: Sequence[Admission]) -> list[str]:
    """Return a line a device, the one with least memory first: how many clients it has, and how they train."""
    lines = []
    for device in sorted({admission.device for admission in admissions}, key=lambda device: device.budget):
        counted: Counter[str] = Counter()
        for admission in admissions:
            if admission.device == device:
                counted[admission.words] += admission.clients
        said = "; ".join(f"{count} {words}" for words, count in counted.most_common())
        count = counted.total()
        clients = f"{count} client{'s' * (count > 1)}"
        lines.append(f"{device.name} ({format_bytes(device.budget)} for tensors), {clients}: {said}")
    return lines
