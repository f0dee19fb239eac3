"""Who is which device: exact shares, the same for the same seed, and a mistake in one line."""

from collections import Counter
from textwrap import dedent

import pytest
from fedforward.algorithms.seeds import Purpose, generator
from fedforward.client.budget import PROFILES, DeviceError
from fedforward.simulations.population import Admission, describe, devices_of, find_device
from fedforward.simulations.refusal import closest

BOARD = {
    "memory-bytes": 300_000, "flops-per-second": 1e7, "uplink": 1e5, "downlink": 2e5, "latency": 0.01,
}  # fmt: skip


def counts(fleet, clients, seed=0):
    return Counter(device.name for device in devices_of(fleet, clients, seed))


def board(path, **changes):
    """Write a device file; a change to None leaves the key out."""
    values = BOARD | {key.replace("_", "-"): value for key, value in changes.items()}
    path.write_text("".join(f"{key} = {value}\n" for key, value in values.items() if value is not None))
    return str(path)


def test_no_fleet_is_no_device():
    assert devices_of("", 5, 0) == []


@pytest.mark.parametrize(
    ("fleet", "clients", "shares"),
    [
        ("phone", 3, {"phone": 3}),
        ("mcu-1m:0.6,pi-zero:0.3,phone:0.1", 20, {"mcu-1m": 12, "pi-zero": 6, "phone": 2}),
        (" mcu-1m : 60, pi-zero:30,phone:10 ", 20, {"mcu-1m": 12, "pi-zero": 6, "phone": 2}),
        ("mcu-1m,phone", 5, {"mcu-1m": 3, "phone": 2}),  # equal remainders: the first named
        ("mcu-1m:0.5,pi-4:0.3,phone:0.2", 4, {"mcu-1m": 2, "pi-4": 1, "phone": 1}),  # 2, 1.2 and 0.8
        ("mcu-1m:0.999,phone:0.001", 3, {"mcu-1m": 3}),
        ("phone:1,phone:2", 3, {"phone": 3}),
    ],
)
def test_shares_are_exact_to_a_client(fleet, clients, shares):
    for seed in range(3):
        assert counts(fleet, clients, seed) == shares


@pytest.mark.parametrize("clients", [1, 2, 7, 999])
def test_every_client_is_one_device_and_no_share_is_a_client_off(clients):
    weights = {"mcu-256k": 0.35, "mcu-1m": 0.33, "pi-4": 0.21, "phone": 0.11}
    found = counts(",".join(f"{name}:{weight}" for name, weight in weights.items()), clients)
    assert found.total() == clients
    assert all(abs(found[name] - weight * clients) < 1 for name, weight in weights.items())


def test_who_is_what_is_of_the_seed_alone():
    fleet = "mcu-1m:0.5,phone:0.5"
    assert list(devices_of(fleet, 100, 7)) == list(devices_of(fleet, 100, 7)) != list(devices_of(fleet, 100, 8))
    names = [device.name for device in devices_of(fleet, 100, 7)]
    assert names[:50].count("phone") not in (0, 50)  # shuffled, not in the order of the mix


@pytest.mark.parametrize("clients", [1, 10, 999, 20_000])
def test_devices_are_dealt_as_a_permutation_deals_them(clients):
    found = devices_of("mcu-1m:0.5,phone:0.3,mcu-1m:0.2", clients, 5)
    assert found.codes.nbytes == clients == found.counts.total() and found.counts == Counter(found)
    dealt = [found.kinds[code] for code in sorted(found.codes)]
    assert list(found) == [dealt[i] for i in generator(5, Purpose.FLEET).permutation(clients)]
    assert len(found) == clients and found[-1] == found[clients - 1]


@pytest.mark.parametrize(
    ("fleet", "told"),
    [
        ("mcu-1:1", "unknown device 'mcu-1': did you mean mcu-1m"),
        ("Phone", "did you mean phone"),
        ("toaster", "known: mcu-256k, mcu-1m, pi-zero, pi-4, jetson-nano, phone, or a file that ends in .toml"),
        ("phone:0", "--fleet wants device:weight with weights above 0"),
        ("phone:-1", "not 'phone:-1'"),
        ("phone:nan", "weights above 0"),
        ("phone:inf", "weights above 0"),
        ("phone:half", "as in mcu-1m:0.6,phone:0.4, not 'phone:half'"),
        ("phone:0.5;mcu-1m:0.5", "--fleet wants device:weight"),
        ("none.toml", "cannot read the device file none.toml: No such file or directory"),
    ],
)
def test_a_mistake_is_one_line_that_helps(fleet, told):
    with pytest.raises(DeviceError) as error:
        devices_of(fleet, 10, 0)
    assert told in str(error.value) and "\n" not in str(error.value)


def test_a_device_of_ones_own(tmp_path):
    device = find_device(board(tmp_path / "board.toml", floor_bytes=100_000))
    assert (device.name, device.memory_bytes, device.budget) == ("board", 300_000, 200_000)
    assert device.seconds(flops=2e7, bytes_down=1e5, bytes_up=2e5) == pytest.approx(2 + 0.5 + 2 + 0.02)
    assert find_device(board(tmp_path / "whole.toml", memory_bytes=3e5)).memory_bytes == 300_000
    assert counts(f"{tmp_path}/board.toml:0.5,phone:0.5", 4) == {"board": 2, "phone": 2}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"latency": None}, "has no latency: a device says memory-bytes, flops-per-second, uplink, downlink, latency"),
        ({"uplink": None, "downlink": None}, "has no uplink, downlink"),
        ({"memory": 5}, "has unknown memory"),
        ({"latency": None, "latencey": 1}, "has no latency and has unknown latencey"),
        ({"memory_bytes": '"1 MiB"'}, "memory-bytes must be a number, not '1 MiB'"),
        ({"uplink": "true"}, "uplink must be a number, not True"),
        ({"memory_bytes": 1.5}, "memory-bytes must be a whole number of bytes, not 1.5"),
        ({"memory_bytes": "nan"}, "memory-bytes must be a whole number of bytes, not nan"),
        ({"memory_bytes": "inf"}, "memory-bytes must be a whole number of bytes, not inf"),
        ({"memory_bytes": 0}, "memory-bytes must be above 0, not 0"),
        ({"flops_per_second": -1}, "flops-per-second must be above 0"),
        ({"uplink": 0}, "uplink must be above 0"),
        ({"downlink": "nan"}, "downlink must be above 0, not nan"),
        ({"latency": -1}, "latency must be at least 0"),
        ({"latency": "nan"}, "latency must be at least 0"),
        ({"floor_bytes": 300_000}, "floor-bytes below memory-bytes"),
        ({"floor_bytes": -1}, "floor-bytes below memory-bytes"),
    ],
)
def test_a_file_that_describes_no_device_is_told_by_name(tmp_path, changes, told):
    file = board(tmp_path / "board.toml", **changes)
    with pytest.raises(DeviceError) as error:
        find_device(file)
    assert told in str(error.value) and "board" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"memory-bytes = = 3", b"\xff\xfe"])
def test_a_file_that_is_no_toml(tmp_path, content):
    (tmp_path / "board.toml").write_bytes(content)
    with pytest.raises(DeviceError, match=r"board\.toml is not TOML"):
        find_device(str(tmp_path / "board.toml"))
    with pytest.raises(DeviceError, match="cannot read the device file"):
        (tmp_path / "folder.toml").mkdir()
        find_device(str(tmp_path / "folder.toml"))


def test_every_profile_can_be_named_and_has_room_for_tensors():
    for name, device in PROFILES.items():
        assert find_device(name) is device and device.name == name and 0 < device.budget <= device.memory_bytes
    assert closest("mcu", PROFILES)


def test_admissions_are_a_line_a_device():
    small, large = PROFILES["mcu-256k"], PROFILES["phone"]
    refused = "over budget: needs 300,000 B, has 262,144 B (at aten.mm.default)"
    admissions = [Admission(1, large, None, "as asked"), Admission(1, small, None, refused)]
    admissions += [Admission(2, small, None, "parts of 4"), Admission(3, small, None, refused)]
    assert "\n".join(describe(admissions)) == dedent("""\
        mcu-256k (256.0 KiB for tensors), 6 clients: 4 over budget: needs 300,000 B, has 262,144 B (at aten.mm.default); 2 parts of 4
        phone (769.4 MiB for tensors), 1 client: 1 as asked""")  # noqa: E501
    assert describe([]) == []
