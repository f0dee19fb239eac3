"""A run survives its process: killed at any moment, it goes on to the same rows and the same model."""

import multiprocessing
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from textwrap import dedent

import pytest
from fedforward.server.records import Records, read_run
from fedforward.simulations.experiment import ExperimentError
from fedforward.simulations.run import execute, reopen, start
from small_runs import FLAGS, rows, small

# Two rules that are slow, so that a signal meets a round, and that wait in the middle of round HOLD for as long as it
# takes: when the second client of that round is about to take its second step.
HELD = dedent("""
    import os
    import time
    from dataclasses import dataclass
    from pathlib import Path

    from fedforward.algorithms import Baffle, MonoForward

    SEEN = set()

    def hold(place):
        if place.client >= 0:
            time.sleep(0.004)
            SEEN.add((place.round, place.client))
            if os.environ.get("HOLD") == str(place.round) and place.step == 1:
                if sum(server_round == place.round for server_round, _ in SEEN) == 2:
                    Path(f"held-{place.round}").touch()
                    time.sleep(100)

    @dataclass(frozen=True)
    class Held(MonoForward):
        def draw(self, place, batch_size, classes):
            hold(place)
            return super().draw(place, batch_size, classes)

    @dataclass(frozen=True)
    class HeldScalar(Baffle):
        directions: int = 2

        def draw(self, place, batch_size, classes):
            hold(place)
            return super().draw(place, batch_size, classes)
""")
ROUNDS = 7
CASES = {
    "fedadam": ["--rule", "held:Held", "--strategy", "fedadam", "--clients-per-round", "3"],
    "fedavgm": ["--rule", "held:Held", "--strategy", "fedavgm", "--set", "strategy.server_momentum=0.9"],
    "baffle": ["--rule", "held.py:HeldScalar", "--clients-per-round", "3"],
}


def undisturbed(case, folder):
    """Run a case in peace; return its words and its rows."""
    folder.mkdir()
    (folder / "held.py").write_text(HELD)
    words = ["run", *FLAGS, *CASES[case], f"--rounds={ROUNDS}", "--name=it", "--engine=inline"]
    begin(words, folder).join()
    return words, rows(folder / "runs" / "it")


def begin(words, folder, hold=0):
    """Start `fedforward WORDS` in a process of its own, forked from one that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fedforward.simulations.cli", "fedforward.simulations.partitions"])
    process = context.Process(target=_fedforward, args=(words, str(folder), str(hold)), daemon=True)
    process.start()
    return process


def _fedforward(words, folder, hold):
    from fedforward.simulations import cli, run

    os.chdir(folder)
    os.environ["HOLD"] = hold
    sys.argv = ["fedforward", *words]
    run.write_report = lambda folders: None  # it takes longer than all the rest
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with open("err", "w") as sys.stderr, open(os.devnull, "w") as sys.stdout:
        cli.main()


def wait_for(condition, process):
    """Wait until the condition holds; the process must not end before."""
    ends = time.monotonic() + 100
    while not condition():
        assert time.monotonic() < ends, "it takes too long"
        assert alive(process), "it ended too early"
        time.sleep(0.005)


def alive(process):
    return process.poll() is None if isinstance(process, subprocess.Popen) else process.is_alive()


def committed(folder):
    """Return the last committed round as a bystander sees it, -1 before there is one."""
    try:
        with sqlite3.connect(f"file:{folder}/runs/it/run.sqlite?mode=ro", uri=True) as db:
            return db.execute("SELECT COALESCE(MAX(round), -1) FROM rounds").fetchone()[0]
    except sqlite3.OperationalError:
        return -1


def kill_three_times(begin_one, words, folder, seed):
    """Kill the run at two random moments and once in the middle of round 4; go on in between.

    Where the moment is random the run waits in a later round, so that it never ends before it is killed.
    """
    (folder / "held.py").write_text(HELD)
    draw = random.Random(seed)
    resume = ["run", "--resume", "runs/it"]

    process = begin_one(words, folder, hold=3)
    wait_for(lambda: committed(folder) >= 1, process)
    time.sleep(draw.uniform(0, 0.1))
    process.kill()
    wait_for_end(process)

    process = begin_one(resume, folder, hold=4)
    wait_for((folder / "held-4").exists, process)
    wait_for(lambda: committed(folder) == 3, process)
    process.kill()
    wait_for_end(process)

    process = begin_one(resume, folder, hold=ROUNDS)
    wait_for(lambda: committed(folder) >= 5, process)
    time.sleep(draw.uniform(0, 0.05))
    process.kill()
    wait_for_end(process)
    assert 5 <= committed(folder) < ROUNDS and read_run(folder / "runs" / "it").info["status"] == "running"
    return begin_one(resume, folder)


def wait_for_end(process):
    process.wait() if isinstance(process, subprocess.Popen) else process.join()


def test_killed_at_any_moment_it_ends_the_same(tmp_path):
    words, expected = undisturbed("fedadam", tmp_path / "undisturbed")
    wait_for_end(kill_three_times(begin, words, tmp_path, seed=1))
    assert rows(tmp_path / "runs" / "it") == expected and expected["status"] == "finished"


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_the_command_itself_killed_at_any_moment_ends_the_same(tmp_path, case):
    words, expected = undisturbed(case, tmp_path / "undisturbed")

    def begin_command(words, folder, hold=0):
        command = [sys.executable, "-m", "fedforward", *words, "--json"]
        with open(folder / "out", "w") as out, open(folder / "err", "w") as err:
            return subprocess.Popen(command, cwd=folder, env=os.environ | {"HOLD": str(hold)}, stdout=out, stderr=err)

    assert kill_three_times(begin_command, words, tmp_path, seed=2).wait() == 0
    assert rows(tmp_path / "runs" / "it") == expected
    assert expected["rounds"][-1]["model_sha256"] in (tmp_path / "out").read_text()
    assert (tmp_path / "runs" / "it" / "report.html").is_file()


def test_interrupted_it_says_how_to_go_on_and_meanwhile_is_in_use(tmp_path, cli):
    words, expected = undisturbed("baffle", tmp_path / "undisturbed")
    (tmp_path / "held.py").write_text(HELD)
    process = begin(words, tmp_path, hold=3)
    wait_for((tmp_path / "held-3").exists, process)
    code, out, err = cli("run", "--resume", "runs/it")
    assert (code, out) == (2, "")
    assert err == "error: runs/it is in use by another process: wait until it ends, or stop it\n"
    assert read_run(tmp_path / "runs" / "it").info["status"] == "running"  # to look on is free
    os.kill(process.pid, signal.SIGINT)
    process.join()
    assert process.exitcode == 130
    lines = (tmp_path / "err").read_text().splitlines()
    assert lines[-1] == "interrupted; go on with: fedforward run --resume runs/it" and "Traceback" not in str(lines)
    begin(["run", "--resume", "runs/it"], tmp_path).join()
    assert rows(tmp_path / "runs" / "it") == expected


# ---- what is no run, or not this one ---------------------------------------------------------------------------------


@pytest.fixture
def cut(tmp_path, no_report, monkeypatch):
    """Return the folder of a run that was interrupted after its first round."""
    commit = Records.commit_round

    def interrupted(self, row, *rest):
        commit(self, row, *rest)
        if row["round"] == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(Records, "commit_round", interrupted)
    world, folder = start(small(name="cut"), tmp_path / "runs")
    with pytest.raises(KeyboardInterrupt):
        execute(world, folder)
    monkeypatch.setattr(Records, "commit_round", commit)
    return folder


def test_a_run_starts_whole(tmp_path):
    _, folder = start(small(), tmp_path / "runs")
    assert folder == tmp_path / "runs" / "mono-forward-digits"
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoints", "experiment.toml", "lock", "run.sqlite"]
    assert start(small(), tmp_path / "runs")[1].name == "mono-forward-digits-2"
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == [folder.name, f"{folder.name}-2"]


def test_a_name_is_taken_once(tmp_path):
    start(small(name="a"), tmp_path)
    with pytest.raises(ExperimentError, match="a exists: choose another --name, or go on with it by"):
        start(small(name="a"), tmp_path)
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ExperimentError, match="dangling exists"):
        start(small(name="dangling"), tmp_path)


def test_where_nothing_can_be_written_nothing_is(tmp_path):
    (tmp_path / "file").write_text("")
    for runs in (tmp_path / "file", tmp_path / "file" / "deeper", Path("/proc/runs")):
        with pytest.raises(ExperimentError, match=r"cannot write .*: choose another --runs-dir or --name"):
            start(small(), runs)
    with pytest.raises(ExperimentError, match="File name too long"):
        start(small(name="n" * 300), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_what_fails_while_a_run_is_made_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(Records, "start", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        start(small(), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_unfinished_run_goes_on(cut):
    execute(*reopen(cut))
    assert read_run(cut).info["status"] == "finished"
    with pytest.raises(
        ExperimentError, match=r"is finished: to run it again, `fedforward run .*experiment.toml --name"
    ):
        reopen(cut)


def test_a_folder_that_moved_goes_on(cut):
    moved = cut.rename(cut.with_name("moved to #1"))
    execute(*reopen(moved))
    assert read_run(moved).info["status"] == "finished"


def test_an_experiment_that_was_edited_is_refused_and_one_that_was_lost_is_not(cut):
    file = cut / "experiment.toml"
    text = file.read_text()
    file.write_text(text.replace("rounds = 2", "rounds = 3"))
    with pytest.raises(ExperimentError, match="differs from the experiment this run began with: restore it"):
        reopen(cut)
    file.write_bytes(b"\xff")
    with pytest.raises(ExperimentError, match="differs from the experiment"):
        reopen(cut)
    file.unlink()
    reopen(cut)


@pytest.mark.parametrize("content", [b"", b"junk", None])
def test_a_broken_or_missing_checkpoint_is_told(cut, content):
    path = cut / "checkpoints" / "round-000001.pkl"
    path.write_bytes(content) if content is not None else path.unlink()
    with pytest.raises(ExperimentError, match=r"cannot go on: .*start anew"):
        reopen(cut)


def test_another_models_checkpoint_is_refused(cut, tmp_path):
    other, folder = start(small(name="other", seed=3), tmp_path / "runs")
    execute(other, folder)
    theirs = next((folder / "checkpoints").iterdir()).read_bytes()
    (cut / "checkpoints" / "round-000001.pkl").write_bytes(theirs)
    with pytest.raises(ExperimentError, match="is not the model that round 1 ended with"):
        reopen(cut)


def test_a_full_disk_is_one_line_and_the_run_goes_on(cut, monkeypatch):
    from fedforward.server.rounds import RunFailed

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(RunFailed, match=r"No space left on device.*go on with fedforward run --resume"):
            execute(*reopen(cut))
    execute(*reopen(cut))
    assert read_run(cut).info["status"] == "finished"
