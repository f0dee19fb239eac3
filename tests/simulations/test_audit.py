"""A rule that uses other memory than it planned is caught, and everything that was true stays on disk."""

import json
from textwrap import dedent

import pytest
from fedforward.server.records import read_run
from fedforward.simulations.report import write_report
from small_runs import FLAGS, rows

# The same rule, told by LIES what to do beside learning: allocate in one client only, allocate where data are not
# zeros (a plan's are), allocate when it infers, or raise in place of it.
LIAR = dedent("""
    import os
    from dataclasses import dataclass

    import torch
    from fedforward.algorithms import Backprop

    @dataclass(frozen=True)
    class Liar(Backprop):
        def draw(self, place, batch_size, classes):
            return place.client

        def step(self, net, state, batch, lr):
            lies = os.environ.get("LIES", "")
            if batch.draws == 3 and lies == "raise":
                raise ValueError("not today")
            extra = torch.zeros(100_000 if batch.draws == 3 and lies == "client 3" else 0)
            if lies == "data":
                extra = torch.zeros(int(batch.x.sum() > 0) * 100_000)
            return super().step(net, state, batch, lr)

        def logits(self, net, state, x):
            if os.environ.get("LIES") == "inference" and len(x) < 9:
                return super().logits(net, state, x) + torch.zeros(int(x.sum() > 0) * 300_000)[:1].sum()
            return super().logits(net, state, x)
""")


@pytest.fixture
def run(cli, no_report, tmp_path, monkeypatch):
    """Return a function that runs the liar, `lies` being about what, and reads its one object and its last line."""
    (tmp_path / "liar.py").write_text(LIAR)

    def call(lies, *words, resume=False):
        monkeypatch.setenv("LIES", lies)
        what = ["--resume", "runs/it"] if resume else ["--rule", "liar.py:Liar", "--name", "it", *FLAGS, *words]
        answer = cli("run", *what, "--json")
        assert "Traceback" not in answer.err and answer.out.count("\n") == 1
        return answer.code, json.loads(answer.out), answer.err.splitlines()[-1]

    return call


def hashes(folder):
    return [row["model_sha256"] for row in rows(folder)["rounds"]]


def test_one_client_that_lies_stops_the_run_after_its_round(run, tmp_path):
    code, told, error = run("client 3", "--audit", "1")
    assert code == 2 and error.startswith("error: audit of round 1: client 3 with rule liar.py:Liar planned "), error
    assert error.endswith(": mend the rule, whose memory must follow from shapes alone, and go on with --resume")
    assert (told["status"], told["error"]) == ("failed", error.removeprefix("error: "))
    assert (told["rounds"], told["client_rounds"], told["failed"], told["over_budget"]) == (1, 4, 1, 0)
    assert (told["audited"], told["audit_mismatches"]) == (5, 1)

    folder = tmp_path / "runs" / "it"
    left = read_run(folder)
    assert left.info["status"] == "failed" and left.rounds["round"].tolist() == [0, 1]
    assert (left.rounds["clients"].tolist(), left.rounds["failed"].tolist()) == ([0, 4], [0, 1])
    (liar,) = left.clients[left.clients["status"] == "audit failed"].to_dict("records")
    assert (liar["client"], liar["audited"], liar["bytes_up"]) == (3, 1, 0) and liar["bytes_down"] > 0
    assert "planned " in liar["reason"] and " and used " in liar["reason"] and "aten." in liar["reason"]
    assert hashes(folder)[1] == told["model_sha256"]


def test_the_update_of_a_liar_is_in_no_model(run, tmp_path):
    run("client 3", "--audit", "1")
    lied = hashes(tmp_path / "runs" / "it")
    (tmp_path / "runs" / "it").rename(tmp_path / "lied")
    run("raise", "--rounds", "1")  # the same clients but for client 3, who says so itself
    assert hashes(tmp_path / "runs" / "it") == lied


def test_a_mended_rule_goes_on(run, tmp_path):
    run("client 3", "--audit", "1")
    code, told, _ = run("client 3", resume=True)  # not mended: the next round stops it
    assert (code, told["rounds"], told["audited"], told["audit_mismatches"]) == (2, 2, 10, 2)
    code, told, _ = run("", resume=True)
    assert (code, told["status"], told["rounds"], told["audit_mismatches"]) == (0, "finished", 2, 2)


def test_a_run_goes_on_from_the_round_that_a_liar_stopped(run, tmp_path):
    run("client 3", "--audit", "1", "--rounds", "3")
    code, told, _ = run("", resume=True)
    assert (code, told["status"], told["rounds"]) == (0, "finished", 3)
    assert (told["client_rounds"], told["audited"], told["audit_mismatches"]) == (14, 15, 1)


def test_without_an_audit_nobody_notices(run, tmp_path):
    code, told, _ = run("client 3")
    assert (code, told["status"], told["audited"], told["audit_mismatches"]) == (0, "finished", 0, 0)
    (tmp_path / "runs" / "it").rename(tmp_path / "lied")
    code, honest, _ = run("", "--audit", "1")
    assert (code, honest["audited"], honest["audit_mismatches"]) == (0, 10, 0)
    assert hashes(tmp_path / "lied") == hashes(tmp_path / "runs" / "it")


def test_a_sampled_audit_catches_it_in_the_round_it_looks(run):
    code, told, error = run("client 3", "--audit", "0.3", "--rounds", "20", "--clients-per-round", "3")
    assert code == 2 and told["audit_mismatches"] == 1 and 0 < told["audited"] < told["rounds"] * 3
    assert error.startswith(f"error: audit of round {told['rounds']}: client 3 ")


def test_when_every_client_lies_in_the_first_round_no_round_is_committed(run, tmp_path):
    code, told, error = run("data", "--audit", "1")
    assert code == 2 and error.startswith("error: audit of round 1: client 0 with rule liar.py:Liar planned ")
    assert " (and 4 more clients failed it)" in error
    assert (told["rounds"], told["client_rounds"], told["failed"], told["audit_mismatches"]) == (0, 0, 5, 5)
    folder = tmp_path / "runs" / "it"
    left = read_run(folder)
    assert left.rounds["round"].tolist() == [0] and left.clients["status"].tolist() == ["audit failed"] * 5
    assert "audit failed" in write_report([folder]).read_text()
    code, told, _ = run("", resume=True)
    assert (code, told["client_rounds"], told["audited"], told["audit_mismatches"]) == (0, 10, 10, 0)


def test_a_lie_beyond_the_budget_names_the_budget(run, tmp_path):
    device = "flops-per-second = 1e8\nuplink = 1e5\ndownlink = 2e5\nlatency = 0.1\n"
    (tmp_path / "small.toml").write_text(f"memory-bytes = 200_000\n{device}")
    code, told, error = run("data", "--audit", "1", "--fleet", "small.toml")
    assert code == 2 and ", over its budget of 200,000 B (and 4 more" in error
    assert told["audit_mismatches"] == 5


def test_a_lie_when_it_infers_is_one_too(run):
    code, told, error = run("inference", "--audit", "1")
    assert code == 2 and told["audit_mismatches"] == 5 and "client 0 with rule liar.py:Liar planned " in error
