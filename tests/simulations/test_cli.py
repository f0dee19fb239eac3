"""The command line: results on standard output, the rest on standard error, a mistake in one line and exit code 2."""

import json
import math
import os
import re
import sqlite3
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import numpy as np
import pytest
from fedforward.server.records import Records, read_run
from small_runs import FLAGS, rows

COMMAND = [sys.executable, "-m", "fedforward"]


@pytest.fixture
def finished(cli, no_report, tmp_path):
    """Run a small experiment and return its folder."""
    assert cli("run", *FLAGS, "--name", "it").code == 0
    return tmp_path / "runs" / "it"


def one_line(answer, *words):
    """Check that an answer is a mistake, told in one line, and that nothing was begun."""
    assert answer.code == 2 and answer.out == ""
    assert answer.err.startswith("error: ") and answer.err.count("\n") == 1 and answer.err.endswith("\n")
    assert all(word in answer.err for word in words), answer.err


# ---- what is printed -------------------------------------------------------------------------------------------------


def test_a_run_prints_a_line_a_round_and_a_table(cli, tmp_path):
    code, out, err = cli("run", *FLAGS, "--name", "it")
    assert code == 0 and "test accuracy" in out and out.endswith("report: runs/it/report.html\n")
    lines = err.splitlines()
    assert lines[0] == "mono-forward on digits (iid), 5 clients, 2 rounds, seed 0" and len(lines) == 5
    assert all(len(line) <= 80 for line in lines) and "\x1b" not in err
    assert lines[1] == "engine cohort on cpu: its clients are small and need no graph of the network"
    assert [line.split()[0] for line in lines[2:]] == ["round", "1/2", "2/2"]
    assert (tmp_path / "runs" / "it" / "report.html").is_file()


def test_json_is_one_object_and_nothing_else(cli, no_report):
    code, out, err = cli("run", *FLAGS, "--name", "it", "--json", "--holdout", "0")
    result = json.loads(out)
    assert code == 0 and out.count("\n") == 1 and "2/2" in err
    keys = {
        "accuracy", "loss", "rounds", "client_rounds", "peak_bytes_max", "bytes_up_total", "bytes_down_total",
        "seconds", "model_sha256", "path",
    }  # fmt: skip
    assert keys <= set(result) and all(result[key] is not None for key in keys)
    assert result["status"] == "finished" and "error" not in result
    assert (result["rounds"], result["client_rounds"], result["path"]) == (2, 10, "runs/it")
    assert result["client_accuracy"] is None and "NaN" not in out
    run = read_run(Path("runs/it"))
    assert result["model_sha256"] == run.rounds["model_sha256"].iloc[-1]
    assert result["bytes_up_total"] == run.clients["bytes_up"].sum()


def test_json_knows_no_nan(cli, no_report, monkeypatch):
    monkeypatch.setattr("fedforward.simulations.world.World.evaluate", lambda *_: (math.inf, math.nan))
    result = json.loads(cli("run", *FLAGS, "--json").out, parse_constant=lambda name: pytest.fail(name))
    assert result["loss"] is None and result["accuracy"] is None


def test_rules(cli, monkeypatch):
    from fedforward.algorithms import RULES

    listed = json.loads(cli("rules", "--json").out)["rules"]
    assert {rule["name"]: rule["family"] for rule in listed} == {rule.name: rule.family for rule in RULES.values()}
    monkeypatch.setenv("COLUMNS", "80")
    lines = cli("rules").out.splitlines()
    assert max(len(line.rstrip()) for line in lines) <= 80
    assert all(any(line.startswith(f"{name} ") for line in lines) for name in RULES)


@pytest.mark.parametrize("name", ["dfa", "fedforward.algorithms.feedback.dfa:DFA"])
def test_rules_describes_one_with_its_equations_and_every_option(cli, name):
    said = cli("rules", "--describe", name).out
    assert "da_l = e B_l" in said and "Stores during a step" in said and "arXiv 1609.01596" in said
    for option, default in (("rule.scale=", "1.0"), ("rule.feedback=", "uniform"), ("--lr", "0.05")):
        assert any(option in line and line.endswith(default) for line in said.splitlines())
    told = json.loads(cli("rules", "--describe", name, "--json").out)
    assert told["options"]["momentum"] == 0.9
    assert told["inherited"]["momentum"].startswith("heavy-ball") and "scale" not in told["inherited"]
    assert "    weight_decay: L2 penalty, added to the gradient." in said.splitlines()


def test_what_is_no_rule_is_not_described(cli):
    assert "did you mean dfa?" in cli("rules", "--describe", "dfaa").err
    assert "not a fedforward.algorithms.Rule" in cli("rules", "--describe", "json:loads").err


def test_report_of_one_run_and_of_two(cli, finished, tmp_path):
    assert cli("report", "runs/it").out == "runs/it/report.html\n"
    assert json.loads(cli("report", "runs/it", "--output", "there", "--json").out) == {"path": "there/report.html"}
    assert (tmp_path / "there" / "report.html").is_file()


@pytest.mark.parametrize("words", [["--help"], ["run", "--help"], ["rules", "--help"], ["report", "-h"], ["--version"]])
def test_help(cli, monkeypatch, words):
    monkeypatch.setenv("COLUMNS", "80")
    code, out, err = cli(*words)
    assert code == 0 and err == "" and out and max(map(len, out.splitlines())) <= 80


def test_flags_override_the_file(cli, no_report, tmp_path):
    (tmp_path / "a.toml").write_text('clients = 3\nrounds = 1\nepochs = 1\nname = "file"\n[set.data]\nlimit = 90\n')
    assert cli("run", "a.toml", "--name", "flag", "--clients", "40", "--clients-per-round", "2").code == 0
    text = (tmp_path / "runs" / "flag" / "experiment.toml").read_text()
    assert "clients = 40" in text and "clients-per-round = 2" in text and "limit = 90" in text
    assert cli("run", "runs/flag/experiment.toml", "--name", "again").code == 0
    assert rows(tmp_path / "runs" / "again") == rows(tmp_path / "runs" / "flag")


# ---- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--rule", "bafle"], "did you mean baffle?"),
        (["--model", "lenett"], "did you mean lenet or resnet?"),
        (["--strategy", "fedprx"], "did you mean fedprox"),
        (["--partition", "idd"], "did you mean iid"),
        (["--data", "digit"], "did you mean digits"),
        (["--data", "/no/such/folder"], "no data at /no/such/folder"),
        (["--data", "./unlabelled"], "label"),
        (["--clients", "10000"], "more clients (10000) than training samples"),
        (["--clients", "10000"], "lower --clients or add --resample"),
        (["--samples-per-client", "9"], "add --resample, or leave it out"),
        (["--resample", "--partition", "linear"], "take one of iid, dirichlet, pathological with --resample, or leave"),
        (["--clients-per-evaluation", "21"], "or 0 for all, or 1000 of more; it is 21"),
        (["--batch-size", "0"], "batch-size must be at least 1"),
        (["--rounds", "-1"], "rounds must be at least 1"),
        (["--lr", "0"], "lr must be positive"),
        (["--lr", "-1"], "lr must be positive"),
        (["--lr", "nan"], "lr must be positive and finite, not nan"),
        (["--set", "rule.lr=-1"], "lr must be positive"),
        (["--set", "rule.momntum=0.9"], "did you mean momentum?"),
        (["--set", "rules.momentum=0.9"], "did you mean rule?"),
        (["--set", "momentum=0.9"], "--set wants part.key=value"),
        (["--set", "rule.momentum"], "--set wants part.key=value"),
        (["--name", "../escape"], "plain folder name"),
        (["--runs-dir", "unlabelled/part.csv"], "choose another --runs-dir"),
        (["--runs-dir", "/proc/runs"], "choose another --runs-dir"),
        (["no.toml"], "cannot read the experiment file no.toml: No such file or directory"),
        (["bad.toml"], "bad.toml is not TOML"),
        (["odd.toml"], "unknown setting 'roundes': did you mean rounds?"),
        (["--rule", "forward-forward", "--set", "model.hidden=[9]"], "forward-forward"),
        (["--rule", "mono-forward", "--set", "model.hidden=[]"], "add a layer before the output"),
        (["--data", "vectors.npz", "--model", "cnn"], "convolutions need images"),
        (["--rule", "baffle", "--strategy", "fedavg"], "use --strategy fedscalar"),
        (["--strategy", "fedscalar"], "use --strategy fedavg"),
        (["--rule", "nowhere:Rule"], "cannot import nowhere"),
        (["--rule", "json:JsonDecoder"], "did you mean JSONDecoder"),
        (["--resume", "runs/none"], "holds no run (no run.sqlite in it): name a folder under runs/"),
        (["--resume", "unlabelled", "--seed", "3"], "drop --seed"),
        (["--resume", "unlabelled", "--set", "rule.lr=1"], "drop --set"),
        (["--resume", "unlabelled", "odd.toml"], "drop odd.toml"),
    ],
    ids=lambda item: " ".join(item) if isinstance(item, list) else "",
)
def test_a_mistake_is_one_line_and_nothing_is_written(cli, tmp_path, monkeypatch, words, told):
    monkeypatch.setenv("COLUMNS", "40")
    (tmp_path / "unlabelled").mkdir()
    (tmp_path / "unlabelled" / "part.csv").write_text("a,b\n0.5,1.5\n2.5,0.1\n")
    np.savez(tmp_path / "vectors.npz", x=np.zeros((90, 7), np.float32), y=np.arange(90) % 5)
    (tmp_path / "bad.toml").write_text("rounds = = 3")
    (tmp_path / "odd.toml").write_text("roundes = 3")
    before = sorted(tmp_path.rglob("*"))
    one_line(cli("run", *words), told)
    assert [path for path in sorted(tmp_path.rglob("*")) if path not in before] == []


@pytest.mark.parametrize("words", [["run", "--clients", "two"], ["run", "--nonsense"], ["rnu"], ["report"]])
def test_usage_errors(cli, tmp_path, words):
    code, out, err = cli(*words)
    assert code == 2 and out == "" and "Traceback" not in err and err
    assert list(tmp_path.iterdir()) == []


def test_a_finished_run_and_a_taken_name(cli, finished):
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    one_line(cli("run", "--resume", "runs/it"), "is finished", "--name NEW-NAME")
    one_line(cli("run", *FLAGS, "--name", "it"), "runs/it exists: choose another --name")
    assert before == {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    assert [path.name for path in finished.parent.iterdir()] == ["it"]


@pytest.mark.parametrize("command", ["run --resume", "report"])
def test_somebody_elses_database(cli, tmp_path, command):
    with sqlite3.connect(tmp_path / "run.sqlite") as db:
        db.execute("CREATE TABLE rounds (round INTEGER)")
    before = (tmp_path / "run.sqlite").read_bytes()
    one_line(cli(*command.split(), "."), "another's, or broken")
    assert (tmp_path / "run.sqlite").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["run.sqlite"]


def test_a_report_that_cannot_be_written(cli, finished, tmp_path):
    (tmp_path / "file").write_text("")
    one_line(cli("report", "runs/it", "--output", "file"), "cannot write the report", "choose another --output")
    one_line(cli("report", "runs"), "holds no run", "name a folder under runs/")


# ---- clients that fail -----------------------------------------------------------------------------------------------

FAULTS = dedent("""
    import numpy as np
    import torch
    from fedforward.algorithms import MonoForward
    from fedforward.simulations.datasets import DataSet, Samples

    def data(bad=1):
        rng = np.random.default_rng(0)
        x = torch.from_numpy(rng.standard_normal((100, 16), dtype=np.float32))
        owner = np.arange(100) % 5
        x[torch.from_numpy(owner < bad)] = float("inf")
        train = Samples(x, torch.from_numpy(rng.integers(0, 3, 100)), torch.arange(100), 1.0)
        clean = train.subset(torch.from_numpy(np.flatnonzero(owner == 4)))
        return DataSet("faulty", train, clean, 3, (16,), {"owner": owner})

    class Fragile(MonoForward):
        def step(self, net, state, batch, lr):
            if batch.y[0] >= 0:
                raise TypeError("a bug [of\\nmine]")
            return super().step(net, state, batch, lr)
""")


@pytest.fixture
def faults(tmp_path):
    (tmp_path / "faults.py").write_text(FAULTS)
    words = [
        "--data",
        "faults.py:data",
        "--partition",
        "natural:owner",
        "--clients",
        "5",
        "--rounds",
        "2",
        "--name",
        "it",
    ]
    return ["run", *words, "--set", "model.hidden=[8,8]"]


def test_one_client_that_diverges_is_left_out(cli, no_report, faults, tmp_path):
    code, out, err = cli(*faults)
    assert code == 0 and "8 (2)" in out
    assert len(re.findall(r"^  client \d failed: loss is not finite at step 1 .*: lower --lr$", err, re.M)) == 2
    run = read_run(tmp_path / "runs" / "it")
    failed = run.clients[run.clients["status"] == "failed"]
    assert failed["client"].nunique() == 1 and failed["round"].tolist() == [1, 2]
    assert (run.rounds["failed"].tolist(), run.rounds["clients"].tolist()) == ([0, 1, 1], [0, 4, 4])
    assert run.rounds["accuracy"].notna().all() and run.info["status"] == "finished"


def test_all_clients_diverging_stops_the_run(cli, faults, tmp_path):
    code, out, err = cli(*faults, "--set", "data.bad=5", "--json")
    assert code == 2 and "Traceback" not in err
    assert err.splitlines()[-1].startswith("error: every client of round 1 failed: loss is not finite at step 1 (lr ")
    result = json.loads(out)
    assert (result["status"], result["error"]) == ("failed", err.splitlines()[-1].removeprefix("error: "))
    assert (result["rounds"], result["client_rounds"], result["failed"]) == (0, 0, 5) and result["path"] == "runs/it"
    run = read_run(tmp_path / "runs" / "it")
    assert run.info["status"] == "failed" and run.rounds["round"].tolist() == [0]
    assert run.clients["reason"].str.contains("not finite").tolist() == [True] * 5
    assert "not finite" in (tmp_path / "runs" / "it" / "report.html").read_text()
    assert cli("run", "--resume", "runs/it").code == 2  # it may be tried again, and fails again
    assert len(read_run(tmp_path / "runs" / "it").clients) == 5


def test_a_bug_in_a_users_rule_is_recorded_with_the_client(cli, no_report, faults, tmp_path):
    code, _, err = cli(*faults, "--rule", "faults.py:Fragile")
    assert code == 2 and err.endswith("error: every client of round 1 failed: TypeError: a bug [of mine]\n")
    assert set(read_run(tmp_path / "runs" / "it").clients["reason"]) == {"TypeError: a bug [of mine]"}


# ---- the process -----------------------------------------------------------------------------------------------------


def test_interrupted_before_anything_is_written(cli, tmp_path, monkeypatch):
    monkeypatch.setattr("fedforward.simulations.cli.start", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    code, out, err = cli("run", *FLAGS)
    assert (code, out, err) == (130, "", "interrupted\n")


def test_interrupted_in_a_round(cli, no_report, tmp_path, monkeypatch):
    commit = Records.commit_round

    def interrupted(self, row, *rest):
        if row["round"] == 2:
            raise KeyboardInterrupt
        commit(self, row, *rest)

    monkeypatch.setattr(Records, "commit_round", interrupted)
    code, out, err = cli("run", *FLAGS, "--name", "it", "--json")
    assert (code, out) == (130, "") and err.endswith("interrupted; go on with: fedforward run --resume runs/it\n")
    monkeypatch.setattr(Records, "commit_round", commit)
    code, out, err = cli("run", "--resume", "runs/it", "--json")
    assert code == 0 and json.loads(out)["rounds"] == 2
    assert [line.split()[0] for line in err.splitlines()[3:]] == ["2/2"]


def test_interrupted_in_the_report(cli, monkeypatch):
    def interrupted(folders):
        raise KeyboardInterrupt

    monkeypatch.setattr("fedforward.simulations.run.write_report", interrupted)
    code, _, err = cli("run", *FLAGS, "--name", "it")
    assert code == 130 and err.endswith("interrupted; go on with: fedforward report runs/it\n")


def test_a_reader_that_leaves_early_is_no_traceback(tmp_path):
    """`fedforward rules | head -0`, printed at once or only when the process ends."""
    read, write = os.pipe()
    os.close(read)
    environment = os.environ | {"PYTHONUNBUFFERED": ""}
    command = subprocess.Popen(
        [*COMMAND, "rules", "--json"], stdout=write, stderr=subprocess.PIPE, env=environment, cwd=tmp_path, text=True
    )
    os.close(write)
    assert command.communicate()[1] == "" and command.returncode == 1


@pytest.mark.slow
def test_a_run_whose_lines_nobody_reads_can_be_resumed(tmp_path):
    read, write = os.pipe()
    command = subprocess.Popen(
        [*COMMAND, "run", *FLAGS, "--rounds=50", "--name=it"], stdout=write, stderr=write, cwd=tmp_path
    )
    os.close(write)
    seen = b""
    while b" 1/50 " not in seen:
        seen += os.read(read, 80)
    os.close(read)
    assert command.wait() != 0
    run = read_run(tmp_path / "runs" / "it")
    assert run.info["status"] == "running" and 0 <= run.rounds["round"].max() < 50
    done = subprocess.run(
        [*COMMAND, "run", "--resume", "runs/it"],
        cwd=tmp_path,
        capture_output=True,
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
    )
    assert done.returncode == 0 and b"Traceback" not in done.stderr
    assert read_run(tmp_path / "runs" / "it").info["status"] == "finished"
