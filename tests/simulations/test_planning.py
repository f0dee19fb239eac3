"""A plan's figures are the planner's, its largest batch is the largest, and its table fits a terminal."""

import io
import json
from dataclasses import replace

import numpy as np
import pytest
from fedforward.algorithms import MODELS, RULES, ApproxBackprop, Backprop, Baffle, ForwardForward, Network
from fedforward.client.budget import PROFILES, Device
from fedforward.client.memory import PARTS
from fedforward.client.plan import Planner
from fedforward.simulations.datasets import load
from fedforward.simulations.planning.picture import draw_plan
from fedforward.simulations.planning.rooms import MOST, Room, devices_in, largest_batch
from fedforward.simulations.planning.rows import outlook
from fedforward.simulations.planning.shapes import KNOWN
from fedforward.simulations.planning.table import plan_text
from PIL import Image

SMALL = ["plan", "--shape", "4", "--classes", "3", "--set", "model.hidden=[5]", "--batch-size", "2"]


def network(model="mlp", shape=(4,), classes=3, **options):
    return Network(lambda: MODELS[model](shape, classes, **options), shape, classes)


def looked(net, rules, batch, **options):
    return outlook(net, rules, batch, model="it", data="there", **options)


def device(budget, name="own"):
    return Device(name, budget, 1.0, 1.0, 1.0, 0.0)


# ---- rows ------------------------------------------------------------------------------------------------------------


def test_every_row_is_the_planners():
    net = network("lenet", (1, 12, 12), 10)
    rules = {name: kind() for name, kind in RULES.items()}
    found, planner = looked(net, rules, 6, micro_batch=2), Planner(net)
    assert [row.name for row in found.rows] == ["inference", *RULES, "backprop, parts of 2"]
    assert found.rows[0].plan == planner.forward(6)
    dense = {"counter-current", "knowledge-accumulation", "projection", "neuron-swarm"}
    taken = {name: rule for name, rule in rules.items() if name not in dense}  # which are for dense networks
    assert {row.name for row in found.rows if row.plan is None} == rules.keys() - taken.keys()
    assert [row.plan for row in found.rows[1:-1] if row.plan] == [planner.step(rule, 6) for rule in taken.values()]
    assert found.rows[-1].plan == planner.step(Backprop(), 6, 2)
    assert found.parameters == sum(p.numel() for p in net.init(0).values())


def test_json_holds_exact_numbers_that_a_hand_can_compute(cli):
    answer = cli(*SMALL, "--rules", "backprop", "--json")
    said = json.loads(answer.out)
    inference, backprop, parts = said["rows"]
    params, batch, hidden, scores = 4 * (4 * 5 + 5 + 5 * 3 + 3), 2 * (4 * 4 + 8 + 4), 2 * 5 * 4, 2 * 3 * 4
    assert inference["peak_bytes"] == params + batch + hidden + scores == 292
    assert inference["flops"] == 2 * 2 * (4 * 5 + 5 * 3) and inference["flops_per_sample"] == 70
    assert backprop["flops"] == 2 * 2 * (2 * 4 * 5 + 3 * 5 * 3)  # forward, weights, and the error through one layer
    plan = Planner(network(hidden=[5])).step(Backprop(), 2)
    for key, value in {"peak_bytes": plan.peak, "bytes_down": plan.bytes_down, "bytes_up": plan.bytes_up}.items():
        assert backprop[key] == value and type(backprop[key]) is int
    assert backprop["parts"] == plan.parts and sum(plan.parts.values()) == plan.peak and set(plan.parts) == set(PARTS)
    assert backprop["times_inference"] == plan.peak / 292 and backprop["times_backprop"] == 1
    assert parts["rule"] == "backprop, parts of 1" and parts["parts"]["gradients"] == params
    assert (said["batch_size"], said["shape"], said["classes"], said["parameters"]) == (2, [4], 3, 43)
    assert answer.out.count("\n") == 1 and answer.err == "" and said["picture"] is None


def test_a_step_fits_the_devices_whose_budget_holds_it():
    (_, row) = looked(network(hidden=[300, 300], shape=(64,)), {"backprop": Backprop()}, 1).rows
    by_budget = sorted(PROFILES.values(), key=lambda device: device.budget)
    assert list(row.fits) == [device.name for device in by_budget if device.budget >= row.plan.peak]
    assert "mcu-256k" not in row.fits and row.fits[0] == "mcu-1m"
    tight = [device(row.plan.peak - 1, "below"), device(row.plan.peak, "exact")]
    assert looked(network(hidden=[300, 300], shape=(64,)), {"it": Backprop()}, 1, fleet=tight).rows[1].fits == (
        "exact",
    )


def test_one_sample_has_no_parts_and_a_granule_rounds_up():
    rows = looked(network(), {"backprop": Backprop()}, 1, granule=512).rows
    assert len(rows) == 2 and all(row.plan.peak % 512 == 0 for row in rows)


def test_a_rule_that_cannot_train_the_network_says_why(cli, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    words = ["plan", "--shape", "4", "--classes", "3", "--set", "model.hidden=[]", "--rules", "mono-forward,backprop"]
    lines = cli(*words).out.splitlines()
    told = "mono-forward          trains hidden blocks, and this model has none"
    assert lines.count(told) == 2 and sum(line.startswith("backprop ") for line in lines) == 2
    row = json.loads(cli(*words, "--json").out)["rows"][1]
    assert set(row) == {"rule", "reason"} and row["reason"].endswith("add a layer before the output")


# ---- the largest batch -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "granule"),
    [(Backprop(), 1), (ApproxBackprop(), 1), (ApproxBackprop(), 512), (ForwardForward(), 1), (Baffle(), 1)],
    ids=lambda item: getattr(item, "name", item),
)
def test_the_largest_batch_fits_and_one_more_does_not(rule, granule):
    net, budgets = network("lenet", (1, 8, 8), 10), (300_000, 2_000_000)
    found = looked(net, {"it": rule}, 8, granule=granule, fleet=[device(budget) for budget in budgets])
    planner, sizes = Planner(net, granule), [room.largest for room in found.rows[1].rooms]
    for size, budget in zip(sizes, budgets, strict=True):
        assert size == 0 or planner.step(rule, size).peak <= budget
        assert planner.step(rule, size + 1).peak > budget
    assert sizes[0] < sizes[1] < MOST
    size = found.rows[0].rooms[1].largest
    assert planner.forward(size).peak <= budgets[1] < planner.forward(size + 1).peak


@pytest.mark.parametrize(
    ("peak_of", "most"),
    [
        (lambda b: 1000 + 7 * b, 5),
        (lambda b: max(1000 + 7 * b, 900 + 30 * b), 5),
        (lambda b: max(5000, 40 * b), 9),
        (lambda b: 1000 + 512 * -(-7 * b // 512), 16),
        (lambda b: 1000 + b + b * b // 9, 16),
        (lambda b: 1000 if b < 777 else 10**6, 30),
        (lambda b: 1000, 24),
        (lambda b: 10**7, 24),
    ],
    ids=["line", "convex", "flat first", "rounded", "square", "jump", "constant", "too much"],
)
@pytest.mark.parametrize("start", [1, 32, 100_000])
def test_a_search_ends_soon_and_right(peak_of, most, start):
    asked = []
    for budget in (999, 1007, 20_000, 100_000):
        known = {0: 900, start: peak_of(start)}
        found = largest_batch(lambda b: asked.append(b) or peak_of(b), budget, known)
        assert 0 <= found <= MOST and (found == 0 or peak_of(found) <= budget)
        assert found == MOST or peak_of(found + 1) > budget
        assert len(asked) <= most and len(set(asked)) == len(asked), asked
        asked.clear()


def test_a_batch_that_is_too_large_may_fit_in_parts():
    net = network("lenet", (1, 12, 12), 10)
    whole, single = Planner(net).step(Backprop(), 8).peak, Planner(net).step(Backprop(), 8, 1).peak
    fleet = [device(whole), device(whole - 1), device(single), device(single - 1)]
    rows = looked(net, {"backprop": Backprop(), "forward-forward": ForwardForward()}, 8, fleet=fleet).rows
    assert [room.in_parts for room in rows[1].rooms] == [False, True, True, False]
    assert [room.largest >= 8 for room in rows[1].rooms] == [True, False, False, False]
    assert not any(room.in_parts for row in (rows[0], rows[2], rows[3]) for room in row.rooms)
    assert [room.largest for room in rows[3].rooms] == [MOST, MOST, MOST, rows[3].rooms[3].largest]
    assert "(*: a batch of 8 fits in parts)" in plan_text(looked(net, {"it": Backprop()}, 8, fleet=fleet), 80)


def test_a_fleet_names_each_device_once(tmp_path):
    (tmp_path / "own.toml").write_text(
        "memory-bytes = 1000\nflops-per-second = 1\nuplink = 1\ndownlink = 1\nlatency = 0\n"
    )
    found = devices_in(f"phone:0.7, {tmp_path}/own.toml:0.2,phone:0.1,")
    assert [(each.name, each.budget) for each in found] == [("phone", PROFILES["phone"].budget), ("own", 1000)]
    assert devices_in("") == ()


# ---- the shape of data -----------------------------------------------------------------------------------------------


def test_known_shapes_are_right_and_not_read(cli, monkeypatch):
    digits = load("digits")
    assert KNOWN["digits"] == (digits.shape, digits.classes)
    monkeypatch.setattr("fedforward.simulations.planning.shapes.build_data", lambda *_: pytest.fail("data are read"))
    said = json.loads(cli("plan", "--data", "cifar100", "--rules", "baffle", "--json").out)
    assert (said["data"], said["shape"], said["classes"]) == ("cifar100", [3, 32, 32], 100)
    same = json.loads(cli("plan", "--shape", "3x32x32", "--classes", "100", "--rules", "baffle", "--json").out)
    assert said["rows"] == same["rows"] and same["data"] == "3x32x32"


def test_a_folder_or_file_or_option_wins_over_a_known_shape(cli, tmp_path):
    np.savez(tmp_path / "mnist.npz", x=np.zeros((90, 7), np.float32), y=np.arange(90) % 5)
    said = json.loads(cli("plan", "--data", "mnist.npz", "--rules", "baffle", "--json").out)
    assert (said["shape"], said["classes"]) == ([7], 5)
    said = json.loads(cli("plan", "--set", "data.negative=3", "--rules", "baffle", "--json").out)
    assert (said["shape"], said["classes"]) == ([1, 8, 8], 2)


# ---- the command -----------------------------------------------------------------------------------------------------


def test_the_tables_fit_the_terminal():
    found = looked(network(hidden=[9, 9], shape=(64,)), {name: kind() for name, kind in RULES.items()}, 8)
    fleet = tuple(PROFILES.values())
    rooms = tuple(Room(each, 9999, i == 0) for i, each in enumerate(fleet))
    found = replace(found, fleet=fleet, rows=tuple(replace(row, rooms=rooms) for row in found.rows))
    for width in (80, 100, 130):
        tables, _, meaning = plan_text(found, width).partition("\n\npeak: ")
        lines = tables.splitlines()
        assert max(map(len, [*lines, *meaning.splitlines()])) <= width and "…" not in tables
        assert all(sum(line.startswith(f"{name} ") for line in lines) == 3 for name in ["inference", *RULES])
        assert lines[2].split()[-1] == "activ." and lines[-len(found.rows) - 1].split() == [each.name for each in fleet]
        assert ("kept" if width == 80 else "optim.") in lines[2].split()


def test_what_is_printed(cli, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    code, out, err = cli("plan", "--rules", "baffle", "--fleet", "mcu-256k")
    assert code == 0 and err == "" and max(map(len, out.splitlines())) <= 80
    assert out.startswith("mlp on digits (1×8×8, 10 classes): 26,122 parameters, batches of 32\n\n")


def test_a_long_name_is_cut_and_not_wrapped():
    long = "path/to/the/rules/of/mine/and/yours.py:MyVeryOwnRuleOfLearning"
    lines = plan_text(looked(network(), {long: Backprop()}, 2), 80).splitlines()
    assert max(map(len, lines)) <= 80 and sum(line.startswith(long[:15]) for line in lines) == 2


def test_help(cli, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = cli("plan", "--help")
    assert code == 0 and max(map(len, out.splitlines())) <= 80 and "nothing is downloaded" in " ".join(out.split())


def test_options_of_one_rule_and_a_users_own(cli, tmp_path):
    (tmp_path / "mine.py").write_text(
        "from dataclasses import dataclass\nfrom fedforward.algorithms import Backprop\n\n"
        "@dataclass(frozen=True)\nclass Mine(Backprop):\n    name = 'mine'\n    twice: int = 1\n"
    )
    plain = json.loads(cli(*SMALL, "--rules", "mine.py:Mine", "--json").out)["rows"][1]
    words = ["--rules", "mine.py:Mine", "--set", "rule.momentum=0.9", "--json"]
    momentum = json.loads(cli(*SMALL, *words).out)["rows"][1]
    assert momentum["rule"] == "mine.py:Mine" and momentum["parts"]["optimizer"] == momentum["parts"]["parameters"]
    assert plain["times_backprop"] == 1 < momentum["times_backprop"]
    both = json.loads(cli(*SMALL, "--rules", "dfa, mine.py:Mine,dfa", "--json").out)["rows"]
    assert [row["rule"] for row in both] == ["inference", "dfa", "mine.py:Mine", "backprop, parts of 1"]


def test_the_picture_shows_every_rule(cli, tmp_path):
    fleet = [device(1000, "small"), device(10**9, "large")]
    found = looked(network(), {"backprop": Backprop(), "baffle": Baffle()}, 4, fleet=fleet, timeline=True)
    picture = Image.open(io.BytesIO(draw_plan(found)))
    assert picture.format == "PNG" and picture.width == 900
    pixels = np.asarray(picture.convert("RGB")).reshape(-1, 3)
    for colour in ((0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00), (0x00, 0x9E, 0x73)):  # a panel each, with backprop in parts
        assert (np.abs(pixels - np.array(colour)).sum(1) < 12).sum() > 100
    answer = cli(*SMALL, "--rules", "mono-forward", "--picture", "it.png")
    assert answer.code == 0 and answer.out.endswith("picture: it.png\n")
    assert Image.open(tmp_path / "it.png").format == "PNG"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--rules", "bafle"], "did you mean baffle?"),
        (["--rules", ","], "--rules wants names"),
        (["--model", "lenett"], "did you mean lenet or resnet?"),
        (["--data", "mnst"], "did you mean mnist"),
        (["--data", "./nowhere"], "no data at ./nowhere"),
        (["--fleet", "mcu-2m"], "did you mean mcu-1m"),
        (["--fleet", "phone:0"], "weights above 0"),
        (["--fleet", "no.toml"], "cannot read the device file no.toml"),
        (["--batch-size", "0"], "batch-size must be at least 1, not 0"),
        (["--micro-batch", "0"], "micro-batch must be at least 1, not 0"),
        (["--micro-batch", "32"], "micro-batch must be below batch-size (32), not 32"),
        (["--granule", "0"], "granule must be at least 1, not 0"),
        (["--shape", "1x28x"], "--shape wants sizes above 0, as in 1x28x28"),
        (["--shape", "0", "--classes", "2"], "--shape wants sizes above 0"),
        (["--shape", "1x28x28"], "--classes 10"),
        (["--shape", "4", "--classes", "1"], "at least 2"),
        (["--shape", "4", "--data", "mnist"], "drop it, or --data mnist"),
        (["--classes", "3"], "--classes goes with --shape"),
        (["--shape", "4", "--classes", "2", "--set", "data.limit=3"], "drop data.limit"),
        (["--shape", "4", "--classes", "2", "--model", "cnn"], "convolutions need images"),
        (["--set", "rule.momentum=0.9"], "name that with --rules NAME"),
        (["--set", "strategy.eta=1"], "unknown part in set 'strategy'"),
        (["--set", "rule.momntum=1", "--rules", "dfa"], "did you mean momentum?"),
        (["--picture", "it.svg"], "ends in .png"),
        (["--picture", "no/it.png", "--rules", "dfa"], "choose another --picture"),
    ],
    ids=lambda item: " ".join(item) if isinstance(item, list) else "",
)
def test_a_mistake_is_one_line(cli, tmp_path, words, told):
    code, out, err = cli("plan", *words)
    assert (code, out) == (2, "") and err.startswith("error: ") and err.count("\n") == 1 and told in err, err
    assert list(tmp_path.iterdir()) == []
