"""Clients on devices: who is admitted, adapted and refused, and that none ever needs more than it has."""

import json
import re

import numpy as np
import pytest
from fedforward import protocol
from fedforward.algorithms import RuleError
from fedforward.server.records import Records, read_run
from fedforward.simulations.run import execute, reopen, start
from fedforward.simulations.summary import summarise
from small_runs import rows, simulate, small, small_world

LENET = {"data": {"limit": 160}, "model": {"channels": [4, 6]}}
BASE = {"rule": "backprop", "model": "lenet", "clients": 8, "set": LENET}
MIX = "whole.toml:0.25,parts.toml:0.25,other.toml:0.25,none.toml:0.25"


@pytest.fixture(scope="module")
def peaks():
    """Return what steps of the small LeNet need."""
    world = small_world(**BASE)
    plan, rule = world.trainer.planner, world.trainer.rule
    return {
        "whole": plan.step(rule, 16).peak,
        "parts": plan.step(rule, 16, 5).peak,
        "smallest": plan.step(rule, 16, 1).peak,
        "inference": plan.inference(rule, 1).peak,
    }


@pytest.fixture(scope="module")
def budgets(peaks):
    """Return the budgets of four devices, on each of which the same step meets another fate; each to the byte."""
    return {
        "whole": peaks["whole"],
        "parts": peaks["parts"],
        "other": peaks["smallest"] - 1,  # another rule
        "none": peaks["inference"],  # can infer, but not train
    }


def board(folder, name, budget):
    """Describe a device in a file."""
    rest = "flops-per-second = 1e8\nuplink = 1e5\ndownlink = 2e5\nlatency = 0.1"
    (folder / f"{name}.toml").write_text(f"memory-bytes = {budget}\n{rest}\n")


@pytest.fixture
def boards(tmp_path, monkeypatch, budgets):
    """Describe the devices in the current folder, an empty one."""
    monkeypatch.chdir(tmp_path)
    for name, budget in budgets.items():
        board(tmp_path, name, budget)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory, budgets):
    """Return a run on all four devices, of which every client round was audited."""
    folder = tmp_path_factory.mktemp("mixed")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("fedforward.simulations.run.write_report", lambda folders: None)
        for name, budget in budgets.items():
            board(folder, name, budget)
        return run(folder, fleet=MIX, adapt="rule", audit=1.0)


def run(folder, **changes):
    """Run a small LeNet on devices and return what it left."""
    world, path = start(small(**BASE | changes), folder)
    execute(world, path)
    return read_run(path)


# ---- admitted, adapted, refused --------------------------------------------------------------------------------------


def test_every_client_is_admitted_adapted_or_refused_and_none_exceeds_its_budget(mixed, budgets):
    clients = mixed.clients
    assert clients.groupby("device")["client"].nunique().to_dict() == dict.fromkeys(budgets, 2)
    assert (clients["budget_bytes"] == clients["device"].map(budgets)).all()

    ok, refused = clients[clients["status"] == "ok"], clients[clients["status"] != "ok"]
    assert set(refused["device"]) == {"none"} and set(refused["status"]) == {"over budget"}
    (reason,) = set(refused["reason"])
    needed, budget = re.fullmatch(r"needs ([\d,]+) B, has ([\d,]+) B \(at aten\.\S+\)", reason).groups()
    assert int(needed.replace(",", "")) > int(budget.replace(",", "")) == budgets["none"]
    assert refused["peak_bytes"].isna().all() and (refused["bytes_up"] == 0).all() and refused["fit"].isna().all()

    fits = {device: set(group["fit"]) for device, group in ok.groupby("device")}
    assert fits["whole"] == {"as asked"} and fits["parts"] == {"parts of 5"}
    assert all(fit.startswith("rule ") for fit in fits["other"])
    assert (ok["rule"] == "backprop").tolist() == (ok["device"] != "other").tolist()

    assert (ok["audited"] == 1).all() and (refused["audited"] == 0).all()
    assert (ok["peak_bytes"] <= ok["budget_bytes"]).all()
    assert set(ok[ok["device"] == "whole"]["peak_bytes"]) == {budgets["whole"]}
    parts = ["parameters", "state", "optimizer", "gradients", "batch", "activations"]
    assert (ok[[f"{part}_bytes" for part in parts]].sum(axis=1) == ok["peak_bytes"]).all()


def test_the_summary_counts_them(mixed):
    ended, summary = mixed, summarise(mixed)
    assert (summary["client_rounds"], summary["over_budget"], summary["failed"]) == (12, 4, 0)
    assert (summary["adapted"], summary["audited"], summary["audit_mismatches"]) == (8, 12, 0)
    assert ended.rounds["over_budget"].tolist() == [0, 2, 2] and ended.rounds["failed"].tolist() == [0, 0, 0]
    ok = ended.clients[ended.clients["status"] == "ok"]
    seconds = ok["flops"] / 1e8 + ok["bytes_down"] / 2e5 + ok["bytes_up"] / 1e5 + 0.2
    assert ok["simulated_seconds"].to_list() == pytest.approx(seconds.to_list())
    slowest = [seconds[ok["round"] == t].max() for t in (1, 2)]
    assert summary["simulated_seconds"] == pytest.approx(sum(slowest))


def test_an_audit_changes_nothing_but_the_column_that_tells_of_it(tmp_path, no_report, boards, mixed):
    every = rows(mixed.folder)
    assert sum(row.pop("audited") for row in every["clients"]) == 12
    for audit in (0.5, 0.0):
        some = rows(run(tmp_path, fleet=MIX, adapt="rule", audit=audit, name=f"{audit}").folder)
        told = sum(row.pop("audited") for row in some["clients"])
        assert told == 0 if audit == 0 else 0 < told < 12
        assert some == every


def test_without_adapt_nobody_changes_its_rule(tmp_path, no_report, boards):
    clients = run(tmp_path, fleet=MIX).clients
    assert set(clients[clients["status"] == "ok"]["device"]) == {"whole", "parts"}
    assert set(clients["rule"]) == {"backprop"}


def test_a_device_that_cannot_even_infer_does_not_evaluate(tmp_path, no_report, boards, peaks):
    board(tmp_path, "none", peaks["inference"] - 1)
    ended = run(tmp_path, fleet=MIX, rounds=1)
    refused = set(ended.clients[ended.clients["device"] == "none"]["client"])
    told = ended.evaluations[ended.evaluations["status"] != "ok"]
    assert set(told["client"]) == refused and set(told["status"]) == {"over budget"}
    assert ended.rounds["client_accuracy"].notna().tolist() == [False, True]


# ---- what a run makes of it ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["fedavg", "fedadam", "fedavgm", "fedmedian", "krum", "fedscalar"])
def test_a_round_of_refused_clients_keeps_the_model_and_the_run_goes_on(tmp_path, no_report, boards, strategy):
    rule = {"rule": "baffle", "set": LENET | {"rule": {"directions": 2}}} if strategy == "fedscalar" else {}
    fleet = "none.toml:0.75,phone:0.25"
    if strategy == "fedscalar":
        board(tmp_path, "none", 1)  # baffle needs no more than inference
    ended = run(tmp_path, **rule, fleet=fleet, strategy=strategy, clients_per_round=2, rounds=6, evaluate_every=6)
    hashes, trained = ended.rounds["model_sha256"].tolist(), ended.rounds["clients"].tolist()
    assert 0 in trained[1:-1] and any(trained) and ended.info["status"] == "finished"
    for before, after, clients in zip(hashes, hashes[1:], trained[1:], strict=False):
        assert (before == after) == (clients == 0)
    if strategy == "fedscalar":
        assert ended.rounds["scalars"].notna().tolist() == [count > 0 for count in trained]


def test_nobody_fits_is_one_line_and_nothing_is_written(cli, boards, tmp_path):
    before = sorted(tmp_path.iterdir())
    words = ["--rule", "backprop", "--model", "lenet", "--clients", "4", "--set", "data.limit=160"]
    answer = cli("run", *words, "--set", "model.channels=[4,6]", "--batch-size", "16", "--fleet", "none.toml")
    assert answer.code == 2 and answer.out == "" and answer.err.count("\n") == 1
    assert answer.err.startswith("error: no client fits its device; the first, on none, is over budget: needs ")
    assert answer.err.endswith("choose a larger --fleet or a smaller --model or try --adapt rule\n")
    assert sorted(tmp_path.iterdir()) == before


def test_a_resumed_fleet_ends_as_an_undisturbed_one(tmp_path, no_report, boards, monkeypatch):
    settings = {"fleet": MIX, "adapt": "rule", "audit": 0.5, "rounds": 3, "clients_per_round": 5}
    run(tmp_path, **settings, name="undisturbed")
    commit = Records.commit_round

    def interrupted(self, row, *rest):
        commit(self, row, *rest)
        if row["round"] == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(Records, "commit_round", interrupted)
    world, folder = start(small(**BASE | settings, name="cut"), tmp_path)
    with pytest.raises(KeyboardInterrupt):
        execute(world, folder)
    monkeypatch.setattr(Records, "commit_round", commit)
    execute(*reopen(folder))
    assert rows(folder) == rows(tmp_path / "undisturbed")


# ---- batches in parts ------------------------------------------------------------------------------------------------


def params(world, folder):
    return {key: p.numpy() for key, p in protocol.decode_params(simulate(world, folder)).items()}


@pytest.mark.parametrize(
    ("rule", "split"),
    [(rule, {"micro_batch": 3}) for rule in ("backprop", "mono-forward", "dfa", "baffle")]
    + [(rule, {"fleet": "parts.toml"}) for rule in ("backprop", "mono-forward")],
)
def test_a_batch_in_parts_gives_the_model_of_the_whole_batch(tmp_path, boards, rule, split):
    few = {"rule": {"directions": 2}} if rule == "baffle" else {}
    settings = BASE | {"rule": rule, "rounds": 1, "set": LENET | few}
    if "fleet" in split:
        planner = (world := small_world(**settings)).trainer.planner
        board(tmp_path, "parts", planner.step(world.trainer.rule, 16, 5).peak)
    whole = params(small_world(**settings), tmp_path / "whole")
    parts = params(small_world(**settings, **split), tmp_path / "parts")
    micro = read_run(tmp_path / "parts").clients["micro_batch"]
    assert set(micro) == ({3} if "micro_batch" in split else {5})
    moved = params(small_world(**settings, lr=1e-9), tmp_path / "start")
    for key, p in whole.items():
        step = np.abs(p - moved[key]).max()
        near = 2e-2 if rule == "baffle" else 1e-3  # a difference of losses over σ magnifies their rounding
        np.testing.assert_allclose(parts[key], p, rtol=0, atol=max(near * step, 1e-6), err_msg=key)


def test_what_cannot_be_split_is_refused_with_the_reason(tmp_path, cli, boards):
    with pytest.raises(RuleError, match="forward-forward cannot split a batch: the peer term follows means"):
        small_world(rule="forward-forward", micro_batch=3)
    answer = cli("run", "--rule", "forward-forward", "--micro-batch", "3")
    assert answer.code == 2 and answer.err.count("\n") == 1 and not (tmp_path / "runs").exists()


def test_a_refused_rule_that_cannot_be_split_says_so(tmp_path, no_report, boards):
    whole = small_world(**BASE | {"rule": "forward-forward"}).trainer
    board(tmp_path, "less", whole.planner.step(whole.rule, 16).peak - 1)
    clients = run(tmp_path, rule="forward-forward", fleet="less.toml,phone").clients
    (reason,) = set(clients[clients["status"] == "over budget"]["reason"])
    assert "its batch cannot be split: the peer term" in reason


def test_json_tells_of_the_fleet(cli, no_report, boards):
    words = ["--rule", "backprop", "--model", "lenet", "--clients", "8", "--set", "data.limit=160", "--rounds", "1"]
    words += ["--set", "model.channels=[4,6]", "--batch-size", "16", "--epochs", "1", "--fleet", MIX, "--audit", "1"]
    answer = cli("run", *words, "--json")
    result = json.loads(answer.out)
    assert answer.code == 0 and result["status"] == "finished" and "error" not in result
    assert (result["over_budget"], result["adapted"], result["audited"], result["audit_mismatches"]) == (4, 2, 4, 0)
    assert result["simulated_seconds"] > 0
    assert answer.err.count("2 over budget: needs") == 2  # said once a device, before the first round
    table = cli("run", *words).out
    for words in ("refused, over budget", "adapted to their device", "audited (not as planned)", "simulated"):
        assert words in table
