"""What a device has room for: the largest batch that a rule takes there, found on plans."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isqrt

from ...algorithms import Rule
from ...client.budget import Device
from ...client.fitting import OverBudget, fit
from ...client.plan import Planner
from ..population import devices_of, find_device

MOST = 65_536  # samples in the largest batch that is looked for
LINES = 4  # guesses along a line before a search halves every other time


@dataclass(frozen=True)
class Room:
    """What a device has room for.

    Attributes:
        device: the device.
        largest: samples of the largest batch that it takes in one piece, at most `MOST`; 0 for none.
        in_parts: the batch that was asked for does not fit in one piece, but does in parts.
    """

    device: Device
    largest: int
    in_parts: bool


def devices_in(fleet: str) -> tuple[Device, ...]:
    """Return every device that a fleet names, once; how many there are of each is not asked.

    Raises:
        DeviceError: for an unknown device, a file that describes none, or a weight that is none.
    """
    devices_of(fleet, 1, 0)  # refuses what is no fleet
    names = [part.strip().partition(":")[0] for part in fleet.split(",") if part.strip()]
    return tuple(dict.fromkeys(find_device(name) for name in names))


def rooms_of(
    fleet: Sequence[Device],
    peak_of: Callable[[int], int],
    batch: int,
    peak: int,
    held: int,
    splits: Callable[[int], bool],
) -> tuple[Room, ...]:
    """Return what each device has room for.

    Args:
        fleet: the devices.
        peak_of: peak in bytes of a batch.
        batch: the batch that was asked for.
        peak: its peak in bytes.
        held: bytes before a step, without the batch.
        splits: says whether the batch fits a number of bytes in parts.
    """
    known, rooms = {0: held, batch: peak}, []  # what one device's search finds shortens the next
    for device in fleet:
        largest = largest_batch(peak_of, device.budget, known)
        rooms.append(Room(device, largest, peak > device.budget and splits(device.budget)))
    return tuple(rooms)


def largest_batch(peak_of: Callable[[int], int], budget: int, known: dict[int, int]) -> int:
    """Return the largest batch up to `MOST` whose peak is within the budget, 0 for none; peaks grow with the batch.

    A peak is nearly a line in the batch, so a few plans end most searches: one looks where the line through two known
    peaks meets the budget, until the next batch is known to be too large. If that takes long, every other look halves
    what is left, on a scale of ratios.

    Args:
        peak_of: peak in bytes of a batch.
        budget: in bytes.
        known: peaks by batch, and at 0 what is held before a step; what is found is added to it.
    """
    for tries in range(LINES + 2 * MOST.bit_length()):
        low = max((b for b in known if known[b] <= budget), default=0)
        high = min([MOST + 1, *(b for b in known if b and known[b] > budget)])
        if high - low <= 1:
            break
        halve = tries >= LINES and tries % 2 == 0
        guess = isqrt(max(low, 1) * high) if halve else _meeting(known, budget, low, high)
        guess = min(max(guess, low + 1), high - 1)
        known[guess] = peak_of(guess)
    return min(low, MOST)


def fits_in_parts(planner: Planner, rule: Rule, batch: int, budget: int) -> bool:
    """Return whether a run could take the batch within the budget, if need be in parts of one sample."""
    try:
        fit(planner, rule, batch, budget, micro_batch=1)
    except OverBudget:
        return False
    return True


def _meeting(known: dict[int, int], budget: int, low: int, high: int) -> int:
    """Return where a line meets the budget: through the peaks on both sides of it, or the nearest two on one side."""
    below, above = (sorted(b for b in known if b and (b <= low) is side) for side in (True, False))
    near = [below[-1], above[0]] if below and above else below[-2:] + above[:2]
    left, right = near if len(near) == 2 else (0, *near)
    rise = known[right] - known[left]
    return left + (budget - known[left]) * (right - left) // rise if rise > 0 else (MOST if below else low)
