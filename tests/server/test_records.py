"""The run database: what is on disk when a process dies, who may write, and what is not a run."""

import multiprocessing
import sqlite3
import time

import pytest
from fedforward.server.records import NotARun, Records, RunInUse, read_run


def commit(records, server_round, clients=2, checkpoint=b"model"):
    rows = [{"client": c, "status": "ok", "samples": 10} for c in range(clients)]
    found = [{"block": 0, "angle": 90.0, "hoyer": None, "separation": None}] * (clients > 0)
    parts = {"clients": rows, "evaluations": rows, "diagnoses": found}
    records.commit_round({"round": server_round, "clients": clients}, parts, lambda file: file.write(checkpoint))


@pytest.fixture
def records(tmp_path):
    records = Records(tmp_path / "run")
    records.start("run", 'rule = "dfa"', "0.1", {"torch": "2"})
    yield records
    records.close()


def test_a_round_is_read_as_it_was_written(records):
    commit(records, 0, clients=0)
    commit(records, 1)
    run = read_run(records.folder)
    assert run.info["status"] == "running" and run.info["experiment"] == 'rule = "dfa"'
    assert run.rounds["round"].tolist() == [0, 1] and records.last_round() == 1
    assert run.clients[["round", "client", "samples"]].values.tolist() == [[1, 0, 10], [1, 1, 10]]
    assert len(run.evaluations) == 2
    assert run.diagnoses[["round", "block", "angle"]].values.tolist() == [[1, 0, 90]]


def test_a_run_from_before_there_were_diagnoses_is_read(records):
    commit(records, 1)
    records.db.execute("DROP TABLE diagnoses")
    run = read_run(records.folder)
    assert len(run.clients) == 2 and not len(run.diagnoses) and "angle" in run.diagnoses


def test_only_the_last_checkpoint_is_kept(records):
    for server_round in range(3):
        commit(records, server_round, checkpoint=f"model {server_round}".encode())
    (path,) = (records.folder / "checkpoints").iterdir()
    assert path == records.checkpoint_path(2) and path.read_bytes() == b"model 2"


def test_a_round_that_fails_half_way_leaves_no_row(records):
    commit(records, 0)
    with pytest.raises(sqlite3.OperationalError):
        rows = {"clients": [{"client": 0}, {"no such column": 1}]}
        records.commit_round({"round": 1}, rows, lambda file: file.write(b"newer"))
    run = read_run(records.folder)
    assert run.rounds["round"].tolist() == [0] and set(run.clients["round"]) == {0}
    assert records.checkpoint_path(0).read_bytes() == b"model"  # what the database says is there
    commit(records, 1)
    assert [path.name for path in (records.folder / "checkpoints").iterdir()] == ["round-000001.pkl"]


def test_a_finished_database_is_one_file(records):
    commit(records, 0)
    records.finish()
    records.close()
    read_run(records.folder)
    assert [path.name for path in records.folder.glob("run.sqlite*")] == ["run.sqlite"]


def test_a_second_writer_is_refused_until_the_first_lets_go(records):
    with pytest.raises(RunInUse, match=r"run is in use by another process: wait"):
        Records(records.folder)
    read_run(records.folder)  # readers are welcome
    records.close()
    Records(records.folder).close()


def _hold(folder, ready):
    records = Records(folder)
    ready.set()
    while records:
        time.sleep(1)


def test_the_lock_dies_with_its_process(tmp_path):
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    holder = context.Process(target=_hold, args=(tmp_path / "run", ready), daemon=True)
    holder.start()
    assert ready.wait(20)
    with pytest.raises(RunInUse):
        Records(tmp_path / "run")
    holder.kill()
    holder.join()
    Records(tmp_path / "run").close()


def test_what_is_not_a_run_is_told_and_left_as_it_was(tmp_path):
    with pytest.raises(NotARun, match=r"holds no run \(no run.sqlite in it\)"):
        read_run(tmp_path)
    foreign = sqlite3.connect(tmp_path / "run.sqlite")
    foreign.execute("CREATE TABLE runs (id INTEGER)")
    foreign.commit()
    foreign.close()
    before = (tmp_path / "run.sqlite").read_bytes()
    with pytest.raises(NotARun, match="another's, or broken"):
        read_run(tmp_path)
    assert (tmp_path / "run.sqlite").read_bytes() == before
    (tmp_path / "run.sqlite").write_text("not a database at all, but text that is long enough" * 20)
    with pytest.raises(NotARun, match="another's, or broken"):
        read_run(tmp_path)


def test_folders_of_any_name_are_read(tmp_path):
    folder = tmp_path / "50% of a? #1 run"
    records = Records(folder)
    commit(records, 0)
    records.close()
    assert read_run(folder).rounds["round"].tolist() == [0]


def test_fast_rounds_wait_for_each_other_but_not_for_long(tmp_path):
    records = Records(tmp_path / "run", delay=0.2)
    records.start("run", "", "0.1", {})
    for server_round in range(4):
        commit(records, server_round)
    assert records.last_round() == 0  # the first is written at once
    ends = time.monotonic() + 20
    while records.last_round() < 3:
        assert time.monotonic() < ends
        time.sleep(0.01)
    assert records.checkpoint_path(3).is_file()
    commit(records, 4)
    records.flush()
    assert records.last_round() == 4
    records.close()


def test_what_the_timer_cannot_write_is_raised_at_the_next_round(tmp_path):
    records = Records(tmp_path / "run", delay=0.05)
    commit(records, 0)
    records.commit_round({"round": 1, "nonsense": 1}, {}, lambda file: None)
    while records._failure is None:
        time.sleep(0.01)
    with pytest.raises(sqlite3.OperationalError, match="nonsense"):
        commit(records, 2)
    records.close()
