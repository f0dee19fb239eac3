"""The flower engine gives what the inline engine gives, and leaves no process behind."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
from fedforward.server.rounds import AllClientsFailed, RunFailed
from fedforward.simulations.engines import flower
from fedforward.simulations.engines.choice import choose
from fedforward.simulations.experiment import ExperimentError
from fedforward.simulations.run import execute, reopen, start
from small_runs import FLAGS, rows, small, small_world

SLOW_RULE = """
import time
from dataclasses import dataclass
from fedforward.algorithms import MonoForward

@dataclass(frozen=True)
class Slow(MonoForward):
    name = "slow"

    def step(self, net, state, batch, lr):
        if len(batch.x) > 16:
            time.sleep(600)
        return super().step(net, state, batch, lr)
"""


@pytest.fixture
def ray():
    return pytest.importorskip("ray", reason="the flower engine needs the extra `ray`")


def of_ray():
    return [process for process in psutil.Process().children(recursive=True) if "ray" in words(process)]


def words(process):
    try:
        return " ".join(process.cmdline())
    except psutil.Error:  # it has ended
        return ""


def test_a_missing_ray_is_one_line_with_the_remedy(monkeypatch):
    monkeypatch.setattr(flower, "find_spec", lambda name: None)
    with pytest.raises(ExperimentError, match=r"pip install 'fedforward\[ray\]'"):
        choose(small_world(engine="flower"))


def test_what_it_cannot_do_is_said(monkeypatch):
    monkeypatch.setattr(flower, "find_spec", lambda name: "there")
    with pytest.raises(ExperimentError, match="trains on CPUs, not on cuda:0: use --engine pool"):
        flower.check(small(devices="cuda:0"), ("cuda:0",))
    with pytest.raises(ExperimentError, match=r"registers every client.*use --engine pool"):
        flower.check(small(clients=flower.MOST_CLIENTS + 1, resample=True), ())
    assert choose(small_world(engine="flower", devices="cpu:3")).devices == ("cpu",) * 3


@pytest.mark.slow
def test_ray_ends_in_the_same_model_and_rows_as_inline_and_goes_on(ray, tmp_path, no_report):
    """Sampled clients, unlike shares; the second round is run by a second Ray, after an error in the round loop."""
    changes = {"clients": 6, "clients_per_round": 3, "partition": "dirichlet:0.3", "set": {"data": {"limit": 400}}}
    results = {}
    for engine in ("inline", "flower"):
        world, folder = start(small(engine=engine, name=engine, **changes), tmp_path)
        if engine == "flower":
            with pytest.raises(ZeroDivisionError, match="of an observer"):
                execute(world, folder, observer=Faulty())
            assert not of_ray()
            world, folder = reopen(folder)
        seen = []
        execute(world, folder, on_reply=lambda seen=seen: seen.append(1))
        results[engine] = rows(folder)
        assert len(seen) == (3 + 6) * (2 if engine == "inline" else 1) + 6 * (engine == "flower")
    assert results["flower"] == results["inline"]
    assert not of_ray()


class Faulty:
    def round_started(self, server_round, clients):
        pass

    def round_done(self, row, clients):
        raise ZeroDivisionError("of an observer")


@pytest.mark.slow
def test_what_clients_raise_is_told_as_inline(ray, tmp_path, no_report, monkeypatch):
    (tmp_path / "broken.py").write_text(SLOW_RULE.replace("time.sleep(600)", "raise ValueError('two\\n lines')"))
    monkeypatch.chdir(tmp_path)
    told = {}
    for engine in ("inline", "flower"):
        changes = {"rule": "broken.py:Slow", "batch_size": 20, "clients": 2, "set": {"data": {"limit": 60}}}
        world, folder = start(small(engine=engine, name=engine, **changes), tmp_path)
        with pytest.raises(AllClientsFailed) as failure:
            execute(world, folder)
        told[engine] = str(failure.value)
    assert told["flower"] == told["inline"]
    assert told["flower"].endswith("ValueError: two lines")


def test_a_simulation_that_ends_by_itself_is_one_line(monkeypatch):
    def fails(*args, **kwargs):
        raise RuntimeError("Simulation Runtime crashed.") from ConnectionError("no Ray\n there")

    monkeypatch.setattr("flwr.simulation.run_simulation", fails)
    with (
        pytest.raises(RunFailed, match=r"^Flower's simulation ended: ConnectionError: no Ray there$"),
        flower.FlowerGrid(small(), 1),
    ):
        pass


@pytest.mark.slow
def test_ctrl_c_ends_all_processes_though_a_client_is_under_way(ray, tmp_path):
    (tmp_path / "slow.py").write_text(SLOW_RULE)
    command = [sys.executable, "-m", "fedforward", "run", *FLAGS, "--engine=flower", "--rule=slow.py:Slow"]
    command += ["--batch-size=20", "--name=stopped"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        family = _once_clients_run(process)
        os.killpg(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 130
    assert err.splitlines()[-1] == "interrupted; go on with: fedforward run --resume runs/stopped"
    _, alive = psutil.wait_procs(family, timeout=10)
    assert not alive


def _once_clients_run(process, seconds=120):
    """Return all descendants of a process as soon as two actors work."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        family = psutil.Process(process.pid).children(recursive=True)
        if sum("ClientAppActor.run" in words(each) for each in family) == 2:
            time.sleep(5)  # from the query to the training
            return family
        time.sleep(0.2)
    raise TimeoutError("no client runs")
