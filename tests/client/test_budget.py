"""Devices: what they are, what they cost in time, and files that describe them."""

import pytest
from fedforward.client.budget import PROFILES, Device, DeviceError, read_device

BOARD = """
memory-bytes = 1_000_000
flops-per-second = 1e6
uplink = 1000
downlink = 2000
latency = 0.5
floor-bytes = 400_000
"""


def test_profiles_are_ordered_by_what_is_left_for_tensors():
    budgets = [device.budget for device in PROFILES.values()]
    assert list(PROFILES) == ["mcu-256k", "mcu-1m", "pi-zero", "pi-4", "jetson-nano", "phone"]
    assert budgets[:2] == [262_144, 1_048_576]  # tensor budgets: no runtime lives there
    assert 32 * 2**20 <= PROFILES["pi-zero"].budget <= 128 * 2**20
    assert all(2**29 <= PROFILES[name].budget <= 2**31 for name in ("pi-4", "jetson-nano", "phone"))
    assert all(name == device.name for name, device in PROFILES.items())


def test_a_round_takes_receiving_computing_and_sending():
    device = Device("d", 100, flops_per_second=50, uplink=10, downlink=20, latency=0.25)
    assert device.seconds(flops=100, bytes_down=60, bytes_up=40) == 2 + 3 + 4 + 0.5


def test_a_file_describes_a_device(tmp_path):
    path = tmp_path / "board.toml"
    path.write_text(BOARD)
    device = read_device(path)
    assert device == Device("board", 1_000_000, 1e6, 1000.0, 2000.0, 0.5, 400_000)
    assert device.budget == 600_000


@pytest.mark.parametrize(
    "old, new, words",
    [
        ("uplink = 1000\n", "", "has no uplink: a device says memory-bytes, flops-per-second, uplink"),
        ("uplink", "up-link", "has no uplink and has unknown up-link"),
        ("1_000_000", "'1 MB'", "memory-bytes must be a number, not '1 MB'"),
        ("1_000_000", "1000.5", "memory-bytes must be a whole number of bytes, not 1000.5"),
        ("400_000", "1_000_000", "floor-bytes below memory-bytes"),
        ("1e6", "0", "flops-per-second must be above 0, not 0"),
        ("latency = 0.5", "latency = -1", "latency must be at least 0"),
        ("latency = 0.5", "latency = ", "is not TOML"),
    ],
)
def test_a_file_that_describes_none_is_refused_in_one_line(tmp_path, old, new, words):
    path = tmp_path / "board.toml"
    path.write_text(BOARD.replace(old, new, 1))
    with pytest.raises(DeviceError, match=words) as error:
        read_device(path)
    assert "\n" not in str(error.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DeviceError, match=r"cannot read the device file .*none\.toml: No such file"):
        read_device(tmp_path / "none.toml")
