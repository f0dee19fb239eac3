"""A summary says what the rows of the database say."""

import numpy as np
import pytest
from fedforward.server.records import Records, read_run
from fedforward.simulations.pictures import PICTURES, draw
from fedforward.simulations.summary import Shown, accuracies_of_clients, summarise
from made_runs import client_row, make_run


def test_summary_equals_the_inserted_rows(tmp_path):
    rows = make_run(tmp_path / "a", failing={(1, 0), (2, 3)})
    summary = summarise(read_run(tmp_path / "a"))
    ok = [row for row in rows if row["status"] == "ok"]
    assert (summary["client_rounds"], summary["failed"], summary["rounds"]) == (10, 2, 3)
    for name in ("bytes_up", "bytes_down", "wire_up", "wire_down", "flops"):
        assert summary[f"{name}_total"] == sum(row.get(name) or 0 for row in rows)
    for name in ("bytes_up", "bytes_down"):
        assert summary[f"{name}_client"] == pytest.approx(np.mean([row[name] for row in ok]))
    peaks = [max(row["peak_bytes"] for row in ok if row["client"] == client) for client in range(4)]
    assert (summary["peak_bytes_median"], summary["peak_bytes_max"]) == (np.median(peaks), max(peaks))
    assert summary["accuracy"] == pytest.approx(0.5)  # round 2: round 3 was not evaluated
    assert summary["loss"] == pytest.approx(2 / 3)
    assert summary["client_accuracy"] is None
    assert summary["seconds"] == pytest.approx(6.0)
    assert summary["model_sha256"] == "03" * 32
    assert summary["path"] == str(tmp_path / "a")
    assert all(value is None or type(value) in (int, float, str) for value in summary.values())


def test_every_client_round_is_ok_over_budget_or_failed(tmp_path):
    make_run(tmp_path / "a", clients=8, fleet=True, failing={(1, 0), (2, 6)})
    summary = summarise(read_run(tmp_path / "a"))
    assert (summary["client_rounds"], summary["over_budget"], summary["failed"]) == (16, 6, 2)
    assert (summary["adapted"], summary["audited"], summary["audit_mismatches"]) == (6, 3, 0)
    assert summary["simulated_seconds"] == pytest.approx(3 * 67.0)  # client 7 is the slowest of every round
    make_run(tmp_path / "b")
    summary = summarise(read_run(tmp_path / "b"))
    assert (summary["over_budget"], summary["adapted"], summary["simulated_seconds"]) == (0, 0, None)


def test_last_federated_evaluation_is_preferred(tmp_path):
    records = Records(tmp_path / "a")
    records.start("a", "", "0.1.0", {})
    for t in (1, 2):
        rows = [{"client": c, "status": "ok", "accuracy": 0.2 * t + c / 100} for c in range(3)]
        parts = {"clients": [client_row(t, 0)], "evaluations": rows if t == 1 else rows[:2]}
        records.commit_round({"round": t}, parts, lambda file: None)
    records.close()
    values, source = accuracies_of_clients(read_run(tmp_path / "a"))
    assert values.tolist() == pytest.approx([0.40, 0.41]) and source == "of the global model of round 2"
    assert source in draw(PICTURES["clients"], [Shown.read(tmp_path / "a", 0, set())])[1]


def test_without_federated_evaluation_each_clients_last_training_counts(tmp_path):
    make_run(tmp_path / "a", failing={(3, 1), (1, 2), (2, 2), (3, 2)})  # client 1 last answered in round 2, 2 never
    values, source = accuracies_of_clients(read_run(tmp_path / "a"))
    assert sorted(values) == pytest.approx([0.50, 0.51, 0.53]) and "last training" in source
