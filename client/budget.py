"""What a device has: memory for tensors, speed, links. Named profiles with their sources, and TOML for one's own."""

from __future__ import annotations

import tomllib
from dataclasses import MISSING, dataclass, fields
from pathlib import Path

KIB, MIB, GIB = 2**10, 2**20, 2**30


class DeviceError(ValueError):
    """A device cannot be used as described; one line that names the remedy."""


@dataclass(frozen=True)
class Device:
    """A device that trains.

    Attributes:
        name: what it is called.
        memory_bytes: bytes of memory.
        flops_per_second: floating-point operations a second, sustained.
        uplink, downlink: bytes a second.
        latency: seconds from a message's sending to its arrival, besides its bytes.
        floor_bytes: bytes that the runtime and the system take there; the rest is for tensors.
    """

    name: str
    memory_bytes: int
    flops_per_second: float
    uplink: float
    downlink: float
    latency: float
    floor_bytes: int = 0

    def __post_init__(self) -> None:
        for key in ("memory_bytes", "flops_per_second", "uplink", "downlink"):
            if not getattr(self, key) > 0:
                raise DeviceError(f"device {self.name}: {_dashed(key)} must be above 0, not {getattr(self, key)}")
        if not (self.latency >= 0 and 0 <= self.floor_bytes < self.memory_bytes):
            raise DeviceError(f"device {self.name}: latency must be at least 0, and floor-bytes below memory-bytes")

    @property
    def budget(self) -> int:
        """Bytes for tensors: parameters, state, batch, activations."""
        return self.memory_bytes - self.floor_bytes

    def seconds(self, flops: float, bytes_down: float, bytes_up: float) -> float:
        """Return the simulated seconds of a round: receive, compute, send."""
        links = bytes_down / self.downlink + bytes_up / self.uplink + 2 * self.latency
        return flops / self.flops_per_second + links


# Orders of magnitude with their sources, not data sheets: FLOP/s are sustained and of different benchmarks, so a ratio
# of two devices is good to a factor of about five. Microcontrollers are budgets for tensors alone: PyTorch does not run
# there. Where it does, the floor is 267 MB of PyTorch and Flower (measured, x86-64) and what a small system takes.
PROFILES = {
    device.name: device
    for device in (
        # nRF52840, Cortex-M4F at 64 MHz. FLOP/s: POET's constant (arXiv 2207.07697); BLE 2M to a phone, 56.7 kB/s.
        Device("mcu-256k", 256 * KIB, 6.4e6, 5.7e4, 5.7e4, 0.03),
        # STM32H7, Cortex-M7. FLOP/s: 4.2 times an M4F (MECO 2022, Portenta H7 against Nano 33 BLE); a Wi-Fi module.
        Device("mcu-1m", 1 * MIB, 2.7e7, 2.5e6, 2.5e6, 0.0125),
        # ARM1176 at 1 GHz: HPL 0.267 GFLOP/s at 900 MHz; its Wi-Fi taken as 20 Mbit/s.
        Device("pi-zero", 512 * MIB, 2.7e8, 2.5e6, 2.5e6, 0.0125, 384 * MIB),
        # 4 × Cortex-A72: HPL 11.9 GFLOP/s at 1.8 GHz; the mean fixed line of Speedtest, September 2020.
        Device("pi-4", 2 * GIB, 1.2e10, 5.7e6, 1.07e7, 0.0105, 512 * MIB),
        # Its CPU: HPL 3.85 GFLOP/s in float64, twice that in float32; memory shared with the GPU and a desktop.
        Device("jetson-nano", 4 * GIB, 7.7e9, 5.7e6, 1.07e7, 0.0105, 2 * GIB),
        # Snapdragon 675: ResNet-18 in 86.5 ms (ncnn); 1 GiB is an app's share; the mean mobile line of Speedtest, 2020.
        Device("phone", 1 * GIB, 4.2e10, 1.4e6, 4.5e6, 0.02, 267 * 10**6),
    )
}


def read_device(path: Path) -> Device:
    """Return the device that a TOML file describes, named as the file is.

    Raises:
        DeviceError: if the file is missing, is not TOML, or does not describe a device.
    """
    try:
        values = tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise DeviceError(f"{path} is not TOML: {error}") from None
    except OSError as error:
        raise DeviceError(f"cannot read the device file {path}: {error.strerror}") from None
    known = {_dashed(field.name): field for field in fields(Device) if field.name != "name"}
    missing = [key for key, field in known.items() if field.default is MISSING and key not in values]
    unknown = [key for key in values if key not in known]
    if missing or unknown:
        said = [f"has no {', '.join(missing)}"] * bool(missing) + [f"has unknown {', '.join(unknown)}"] * bool(unknown)
        raise DeviceError(f"{path} {' and '.join(said)}: a device says {', '.join(known)}")
    for key, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise DeviceError(f"{path}: {key} must be a number, not {value!r}")
        if known[key].type == "int" and not float(value).is_integer():
            raise DeviceError(f"{path}: {key} must be a whole number of bytes, not {value!r}")
        values[key] = int(value) if known[key].type == "int" else float(value)
    return Device(path.stem, **{known[key].name: value for key, value in values.items()})


def _dashed(key: str) -> str:
    return key.replace("_", "-")
