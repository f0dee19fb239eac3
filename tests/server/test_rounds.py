"""The round loop: the same rows for the same seed, after any crash, with any client failing."""

import math

import pytest
from fedforward.client.fitting import OverBudget
from fedforward.client.trainer import Trainer, TrainingFailed
from fedforward.server.job import SCHEDULES, Plan
from fedforward.server.records import Records, read_run
from fedforward.server.rounds import AllClientsFailed, RunFailed, model_hash
from flwr.serverapp.strategy import FedAvg
from small_runs import rows, simulate, small_world

STATEFUL = {"strategy": "fedadam", "clients_per_round": 3, "rounds": 4}
SCALARS = {"rule": "baffle", "clients_per_round": 3, "rounds": 4, "set": {"rule": {"directions": 2}}}
POOL = SCALARS | {
    "set": {
        "rule": {"directions": 2, "own": True, "pool": 16, "momentum": 0.9, "rebase": 3},
        "strategy": {"ema": 0.5, "normalize": True},
    }
}
SLOTS = SCALARS | {"rule": "zo-adam"}


@pytest.fixture(scope="module", params=[STATEFUL, SCALARS, POOL, SLOTS], ids=["fedadam", "baffle", "pool", "zo-adam"])
def undisturbed(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    simulate(small_world(**request.param), folder)
    return request.param, rows(folder)


def crash(monkeypatch, server_round, when):
    """Let the process die in the commit of a round: the checkpoint is on disk, the rows are or are not."""
    commit = Records.commit_round

    def dying(self, row, parts, checkpoint):
        if row["round"] == server_round and when == "before":
            monkeypatch.setattr(Records, "_transaction", lambda self: die())
        commit(self, row, parts, checkpoint)
        if row["round"] == server_round:
            die()

    def die():
        monkeypatch.undo()
        raise SystemExit("killed")

    monkeypatch.setattr(Records, "commit_round", dying)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("server_round", [0, 2])
def test_a_crash_in_the_commit_leaves_no_trace(tmp_path, monkeypatch, undisturbed, server_round, when):
    experiment, expected = undisturbed
    crash(monkeypatch, server_round, when)
    with pytest.raises(SystemExit, match="killed"):
        simulate(small_world(**experiment), tmp_path)
    assert read_run(tmp_path).rounds["round"].tolist() == list(range(server_round + (when == "after")))
    assert (tmp_path / "checkpoints" / f"round-{server_round:06d}.pkl").is_file()
    simulate(small_world(**experiment), tmp_path)
    assert rows(tmp_path) == expected


def test_two_resumes_and_the_rests_of_a_killed_process(tmp_path, monkeypatch, undisturbed):
    experiment, expected = undisturbed
    for server_round in (1, 3):
        crash(monkeypatch, server_round, "after")
        with pytest.raises(SystemExit, match="killed"):
            simulate(small_world(**experiment), tmp_path)
        (tmp_path / "checkpoints" / f"round-{server_round + 1:06d}.pkl").write_bytes(b"newer")
        (tmp_path / "checkpoints" / f"round-{server_round + 1:06d}.pkl.tmp").write_bytes(b"half")
    simulate(small_world(**experiment), tmp_path)
    assert rows(tmp_path) == expected
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["round-000004.pkl"]


def test_same_seed_same_rows_and_another_seed_others(tmp_path, undisturbed):
    experiment, expected = undisturbed
    simulate(small_world(**experiment), tmp_path / "same")
    assert rows(tmp_path / "same") == expected
    simulate(small_world(**experiment, seed=1), tmp_path / "other")
    other = rows(tmp_path / "other")
    for a, b in zip(other["rounds"], expected["rounds"], strict=True):
        assert a["model_sha256"] != b["model_sha256"]


def test_sampling_is_of_the_seed_and_the_round(undisturbed):
    _, expected = undisturbed
    sampled = [[row["client"] for row in expected["clients"] if row["round"] == t] for t in (1, 2, 3, 4)]
    assert all(len(set(clients)) == 3 for clients in sampled) and len(set(map(tuple, sampled))) > 1


def fail(monkeypatch, failing):
    """Let some clients fail: `failing(client, round)` returns what they raise, or None."""
    fit = Trainer.fit

    def failing_fit(self, params, train, test, client, todo, budget=None):
        if error := failing(client, todo.round):
            raise error
        return fit(self, params, train, test, client, todo, budget)

    monkeypatch.setattr(Trainer, "fit", failing_fit)


@pytest.mark.parametrize("strategy", ["fedavg", "fedadam", "krum", "fedtrimmedavg", "fedscalar"])
def test_the_round_goes_on_without_a_client_that_fails(tmp_path, monkeypatch, strategy):
    rule = {"rule": "baffle", "set": {"rule": {"directions": 2}}} if strategy == "fedscalar" else {}
    fail(monkeypatch, lambda client, t: TrainingFailed("loss is not finite") if (client, t) == (1, 1) else None)
    simulate(small_world(strategy=strategy, **rule), tmp_path)
    run = read_run(tmp_path)
    assert run.rounds["failed"].tolist() == [0, 1, 0] and run.rounds["clients"].tolist() == [0, 4, 5]
    (failed,) = run.clients[run.clients["status"] != "ok"].to_dict("records")
    assert (failed["client"], failed["status"], failed["reason"]) == (1, "failed", "loss is not finite")
    assert failed["bytes_up"] == 0 and failed["bytes_down"] > 0 and math.isnan(failed["peak_bytes"])


def test_an_exception_in_a_client_is_recorded_with_it(tmp_path, monkeypatch):
    fail(monkeypatch, lambda client, t: TypeError("two\n  lines") if client == 0 else None)
    simulate(small_world(), tmp_path)
    failed = read_run(tmp_path).clients.query("status == 'failed'")
    assert failed["client"].tolist() == [0, 0] and set(failed["reason"]) == {"TypeError: two lines"}


@pytest.mark.parametrize("strategy", ["fedavgm", "fedadam", "fedmedian", "fedtrimmedavg", "krum"])
def test_all_clients_failing_stops_the_run_and_it_can_go_on(tmp_path, monkeypatch, strategy):
    simulate(small_world(strategy=strategy), tmp_path / "undisturbed")
    fail(monkeypatch, lambda client, t: ValueError("no") if t == 2 else None)
    with pytest.raises(AllClientsFailed, match="every client of round 2 failed: ValueError: no"):
        simulate(small_world(strategy=strategy), tmp_path / "run")
    run = read_run(tmp_path / "run")
    assert run.rounds["round"].tolist() == [0, 1]
    assert run.clients.query("round == 2")["reason"].tolist() == ["ValueError: no"] * 5
    monkeypatch.undo()
    simulate(small_world(strategy=strategy), tmp_path / "run")
    assert rows(tmp_path / "run") == rows(tmp_path / "undisturbed")


def test_the_reason_of_a_failed_round_is_that_of_a_client_that_was_admitted(tmp_path, monkeypatch):
    fail(monkeypatch, lambda client, t: OverBudget("needs 9 B, has 8 B") if client == 0 else TrainingFailed("no"))
    with pytest.raises(AllClientsFailed, match=r"^every client of round 1 failed: no$"):
        simulate(small_world(), tmp_path)
    assert read_run(tmp_path).clients["status"].tolist() == ["over budget"] + ["failed"] * 4


def test_when_every_client_there_is_is_over_budget_the_run_stops(tmp_path, monkeypatch):
    fail(monkeypatch, lambda client, t: OverBudget("needs 9 B, has 8 B"))
    with pytest.raises(AllClientsFailed, match="every client of round 1 failed: over budget: needs 9 B, has 8 B"):
        simulate(small_world(), tmp_path)


class Broken(FedAvg):
    def aggregate_train(self, server_round, replies):
        if server_round == 2:
            raise KeyError("no such\nthing")
        return super().aggregate_train(server_round, replies)


def test_what_a_strategy_raises_is_one_line(tmp_path):
    with pytest.raises(RunFailed, match=r"^strategy Broken failed: KeyError: 'no such\\nthing'$"):
        simulate(small_world(), tmp_path, strategy=Broken(min_train_nodes=5))
    assert read_run(tmp_path).rounds["round"].tolist() == [0, 1]


def test_what_is_not_finite_is_null(tmp_path, monkeypatch):
    world = small_world(rounds=1)
    monkeypatch.setattr(type(world), "evaluate", lambda self, arrays: (math.inf, math.nan))
    simulate(world, tmp_path)
    assert [(row["loss"], row["accuracy"]) for row in rows(tmp_path)["rounds"]] == [(None, None)] * 2


def test_evaluation_every_few_rounds_and_in_the_last(tmp_path):
    simulate(small_world(rounds=5, evaluate_every=3), tmp_path)
    run = read_run(tmp_path)
    assert run.rounds["accuracy"].notna().tolist() == [True, False, False, True, False, True]
    assert sorted(set(run.evaluations["round"])) == [3, 5]
    assert set(run.clients.query("accuracy_before.notna()")["round"]) == {3, 5}


def test_diagnoses_on_request_and_of_the_last_model(tmp_path):
    plain = simulate(small_world(rounds=3), tmp_path / "plain")
    found = simulate(small_world(rounds=3, diagnose_every=2), tmp_path / "diagnosed")
    assert model_hash(plain) == model_hash(found), "to look changes nothing"
    assert not len(read_run(tmp_path / "plain").diagnoses)
    told = read_run(tmp_path / "diagnosed").diagnoses
    assert told[["round", "block"]].values.tolist() == [[t, i] for t in (0, 2, 3) for i in range(3)]
    assert told[told["block"] == 0][["angle", "hoyer"]].notna().all(axis=None)


def test_clients_without_held_out_data_have_no_say(tmp_path):
    simulate(small_world(holdout=0.0, rounds=1), tmp_path)
    run = read_run(tmp_path)
    assert run.evaluations["accuracy"].isna().all() and run.rounds["client_accuracy"].isna().all()
    assert run.rounds["accuracy"].notna().all()


def test_sums_of_a_round_are_those_of_its_clients(tmp_path):
    simulate(small_world(partition="dirichlet:0.5"), tmp_path)
    run = read_run(tmp_path)
    for column in ("bytes_up", "bytes_down", "wire_up", "wire_down", "flops"):
        by_round = run.clients.groupby("round")[column].sum()
        assert run.rounds.set_index("round")[column].loc[[1, 2]].tolist() == by_round.tolist()


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        ("constant", [1, 1, 1, 1]),
        ("cosine", [1, 0.5 * (1 + math.sqrt(0.5)), 0.5, 0.5 * (1 - math.sqrt(0.5))]),
        ("linear", [1, 0.75, 0.5, 0.25]),
        ("half-linear", [1, 1, 1, 0.5]),
    ],
)
def test_learning_rates(schedule, rates):
    plan = Plan("dfa", 0, rounds=4, clients=1, epochs=1, batch_size=1, lr=2.0, lr_schedule=schedule)
    assert [plan.learning_rate(t) / 2 for t in (1, 2, 3, 4)] == pytest.approx(rates)
    assert set(SCHEDULES) == {"constant", "cosine", "linear", "half-linear"}
