"""The pool: the same bits as inline, and nothing lost but the client whose worker died."""

import os
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest
import torch
from fedforward import protocol
from fedforward.server.records import read_run
from fedforward.simulations.engines.arena import Arena
from fedforward.simulations.engines.pool import PoolFailed, PoolGrid
from flwr.app import ConfigRecord, Message, RecordDict
from small_runs import FLAGS, rows, simulate, small_world

CASES = {
    "mono-forward": {"partition": "dirichlet:0.5", "clients_per_round": 4},
    "momentum, median": {"rule": "dfa", "strategy": "fedmedian"},
    "scalars": {"rule": "baffle", "set": {"rule": {"directions": 3}}},
    "audited": {"rule": "backprop", "strategy": "fedadam", "audit": 1.0},
}


def pool(world, workers=2, **options):
    e = world.experiment
    params = world.trainer.initial_params()
    return PoolGrid(e.to_run_config(), ["cpu"] * workers, params, e.clients, work=world.work, **options)


@pytest.mark.parametrize("case", CASES)
def test_the_same_bits_as_inline_with_any_number_of_workers(tmp_path, case):
    world = small_world(**CASES[case])
    simulate(world, tmp_path / "inline")
    for workers in (1, 2) if case == "mono-forward" else (2,):
        with pool(world, workers) as grid:
            simulate(world, tmp_path / f"{workers}", grid=lambda *_, grid=grid, **__: grid)
        assert rows(tmp_path / f"{workers}") == rows(tmp_path / "inline")


def question(world, nodes, lr=0.1):
    config = protocol.train_config(server_round=1, lr=lr, epochs=1, batch_size=16, evaluate=False)
    content = RecordDict({"arrays": world.initial(), "config": config})
    return [Message(content, dst_node_id=node, message_type="train") for node in nodes]


def test_a_worker_that_dies_loses_its_client_and_another_takes_its_place():
    world = small_world()
    with pool(world) as grid:
        before = [worker.process.pid for worker in grid.workers]
        os.kill(before[0], signal.SIGSTOP)  # it will take a client, and never answer
        threading.Timer(1, os.kill, (before[0], signal.SIGKILL)).start()
        replies = grid.send_and_receive(question(world, range(1, 6)))
        lost = [reply for reply in replies if reply.has_error()]
        assert len(lost) == 1 and "its worker process ended (killed by signal 9)" in lost[0].error.reason
        assert [worker.process.pid for worker in grid.workers][1] == before[1]
        again = grid.send_and_receive(question(world, range(1, 6)))
        assert all(reply.has_content() for reply in again)
        pids = [worker.process.pid for worker in grid.workers]
    assert not any(map(psutil.pid_exists, [*before, *pids]))


def test_a_worker_that_dies_with_several_clients_loses_none(tmp_path):
    """Which of them it was is not known: they are asked again, one by one, and the sum has the same bits."""
    world = small_world(rounds=1)
    simulate(world, tmp_path / "inline")
    with pool(world) as grid:
        assert [len(group) for group in grid.in_groups(question(world, range(1, 6)))] == [2, 3]
        pid = grid.workers[0].process.pid
        os.kill(pid, signal.SIGSTOP)
        threading.Timer(1, os.kill, (pid, signal.SIGKILL)).start()
        simulate(world, tmp_path / "pool", grid=lambda *_, **__: grid)
        assert grid.workers[0].process.pid != pid
    assert rows(tmp_path / "pool") == rows(tmp_path / "inline")


def test_out_of_memory_in_a_worker_is_the_clients_fault(monkeypatch):
    """The kernel's killer is the case above; what PyTorch cannot allocate is an error of the client alone."""
    world = small_world(rule="rules_for_pool:Hungry")
    with pool(world) as grid:
        replies = grid.send_and_receive(question(world, range(1, 6)))
        assert all("memory" in reply.error.reason for reply in replies)
        assert all(worker.process.is_alive() for worker in grid.workers)


def test_workers_that_cannot_begin_say_why():
    world = small_world()
    config = world.experiment.to_run_config() | {"rule": "no-such-rule"}
    with pytest.raises(PoolFailed, match="a worker process cannot begin: ExperimentError: unknown rule"):
        PoolGrid(config, ["cpu"], world.trainer.initial_params(), 5).__enter__()


def test_messages_may_hold_what_they_like():
    """Several models at once, or a content that the shared memory cannot hold, go through the pipe."""
    world = small_world()
    with pool(world) as grid:
        messages = [*question(world, [1, 2], lr=0.1), *question(world, [3], lr=0.2)]
        same = grid.send_and_receive(question(world, [3], lr=0.2))[0].content["arrays"]
        mixed = grid.send_and_receive(messages)[2].content["arrays"]
        assert all((mixed[key].numpy() == same[key].numpy()).all() for key in same)
        odd = Message(RecordDict({"config": ConfigRecord({})}), dst_node_id=1, message_type="query")
        assert grid.send_and_receive([odd])[0].content["metrics"]["partition-id"] == 0


def test_a_reader_that_turns_away_leaves_no_answers_behind():
    world = small_world()
    with pool(world) as grid:
        stream = grid.stream(question(world, range(1, 6)))
        next(stream)
        stream.close()
        replies = grid.send_and_receive(question(world, [2, 1]))
        assert [reply.metadata.src_node_id for reply in replies] == [2, 1]


def test_an_arena_holds_models_where_they_do_not_touch():
    arena = Arena({"a": torch.zeros(3, 5), "b": torch.zeros(7), "c": torch.zeros(())}, 3)
    models = [arena.model(place) for place in range(3)]
    for number, model in enumerate(models):
        for p in model.values():
            p.fill_(number)
            assert p.data_ptr() % 64 == 0 and p.untyped_storage().nbytes() == 4 * p.numel()
    assert [[float(p.mean()) for p in model.values()] for model in models] == [[0] * 3, [1] * 3, [2] * 3]
    assert float(arena.model(1)["b"].sum()) == 7
    arena.close()


def wait_for(condition, seconds=90):
    ends = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ends, "it takes too long"
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_interrupted_or_killed_it_leaves_no_process_and_a_run_that_goes_on(tmp_path, how):
    flags = [*FLAGS, "--engine=pool", "--devices=cpu:2", "--rounds=100000", "--name=it"]
    command = [sys.executable, "-m", "fedforward", "run", *flags]
    with open(tmp_path / "err", "w") as err:
        process = subprocess.Popen(command, cwd=tmp_path, stderr=err, stdout=err)
    folder = tmp_path / "runs" / "it"
    wait_for(
        lambda: (folder / "run.sqlite").exists() and "100000" in (tmp_path / "err").read_text().partition("loss")[2]
    )
    workers = psutil.Process(process.pid).children(recursive=True)
    assert len(workers) >= 2
    process.send_signal(how)
    process.wait(60)
    wait_for(lambda: not any(worker.is_running() and worker.status() != "zombie" for worker in workers), 20)
    if how == signal.SIGINT:
        assert (
            process.returncode == 130 and f"--resume {folder.relative_to(tmp_path)}" in (tmp_path / "err").read_text()
        )
    done = read_run(folder).rounds["round"].max()
    world = small_world(rounds=int(done) + 2)
    simulate(world, folder)
    simulate(world, tmp_path / "undisturbed")
    assert rows(folder)["rounds"] == rows(tmp_path / "undisturbed")["rounds"]
