"""A report tells what the rows of the database say, in one file that needs nothing else."""

import base64
import io
import re
from html import escape

import numpy as np
import pytest
from fedforward.server.records import Records, read_run
from fedforward.simulations.report import _client_accuracies, format_bytes, format_percent, summarise, write_report
from PIL import Image

TOML = (
    'rule = "mono-forward"\ndata = "digits"\nmodel = "mlp"\nclients = 4\nrounds = {planned}\n\n[set.rule]\nlr = 0.25\n'
)


def client_row(server_round, client, failed=False):
    sizes = {"samples": 30, "steps": 3, "batch": 10, "bytes_down": 1000 + client, "wire_down": 1200}
    if failed:
        return {"client": client, "status": "failed", "reason": "needs <3 MiB>", **sizes}
    measured = {"loss": 0.5, "accuracy_before": 0.4, "accuracy_after": 0.5 + client / 100, "seconds": 0.1}
    peak = 500_000 * (client + 1) + server_round
    bytes_up = 2000 + 10 * client + server_round
    more = {"peak_bytes": peak, "base_bytes": 9, "flops": 10**6 + client, "bytes_up": bytes_up, "wire_up": 2222}
    return {"client": client, "status": "ok", "rule": "mono-forward", **sizes, **measured, **more}


def make_run(folder, *, name=None, rounds=3, clients=4, failing=(), status="finished", toml=None, evaluated=True):
    """Write a run and return all of its client rows."""
    records = Records(folder)
    planned = max(rounds, 5)
    records.start(name or folder.name, TOML.format(planned=planned) if toml is None else toml, "0.1.0", {"torch": "2"})
    all_rows = []
    for t in range(rounds + 1):
        rows = [client_row(t, c, failed=(t, c) in failing) for c in range(clients)] if t else []
        sums = {k: sum(row.get(k) or 0 for row in rows) for k in ("bytes_up", "bytes_down", "wire_up", "wire_down")}
        sums["flops"] = sum(row.get("flops") or 0 for row in rows)
        server = {"accuracy": 0.1 + 0.2 * t, "loss": 2.0 / (t + 1)} if evaluated and t % 2 == 0 else {}
        row = {"round": t, "clients": len(rows), "seconds": 1.5, "model_sha256": f"{t:02d}" * 32, **sums, **server}
        records.commit_round(row, rows, [], b"")
        all_rows += rows
    if status != "running":
        records.finish(status)
    records.close()
    return all_rows


def images(html):
    return [base64.b64decode(data) for data in re.findall(r'src="data:image/png;base64,([^"]+)"', html)]


def test_bytes_and_percent_are_written_for_humans():
    assert [format_bytes(n) for n in (0, 312, 1023.7, 1024, 1.5 * 2**20, 2**30 - 1)] == [
        "0 B",
        "312 B",
        "1.0 KiB",
        "1.0 KiB",
        "1.5 MiB",
        "1.0 GiB",
    ]
    assert [format_percent(x) for x in (0.973, 1, 0.0)] == ["97.3 %", "100.0 %", "0.0 %"]
    assert {format_bytes(None), format_percent(None), format_percent(float("nan"))} == {"–"}


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


def test_page_holds_the_numbers_and_stands_alone(tmp_path):
    rows = make_run(tmp_path / "a")
    page = write_report([tmp_path / "a"])
    assert page == tmp_path / "a" / "report.html"
    html = page.read_text()
    total = sum(row["bytes_up"] for row in rows) / 1024
    flops = sum(row["flops"] for row in rows) / 1e6
    for number in ("50.0 %", "0.6667", f"{total:.1f} KiB", f"{flops:.1f} MFLOP", "1.9 MiB", "12 / 0", "03" * 8):
        assert number in html, number
    assert "mono-forward (lr = 0.25)" in html
    assert escape(TOML.format(planned=5)) in html
    assert "fedforward run" in html and "a/experiment.toml" in html
    assert "running/interrupted" not in html
    assert not re.search(r"https?:|<script|<link|@import|url\(|src=\"(?!data:)", html)


def test_pictures_are_embedded_and_lie_beside_the_page(tmp_path):
    make_run(tmp_path / "a")
    embedded = images(write_report([tmp_path / "a"]).read_text())
    assert len(embedded) == 4
    assert sorted(embedded) == sorted(path.read_bytes() for path in (tmp_path / "a").glob("*.png"))
    for data in embedded:
        picture = Image.open(io.BytesIO(data))
        assert picture.format == "PNG" and picture.width > 600
        assert np.asarray(picture.convert("L")).std() > 5  # something is drawn


def test_overlay_shows_both_runs(tmp_path):
    make_run(tmp_path / "a")
    make_run(tmp_path / "b", rounds=1, clients=1)
    page = write_report([tmp_path / "a", tmp_path / "b"])
    assert page == tmp_path / "report-a-vs-b" / "report.html"
    html = page.read_text()
    assert "<h1>a vs b</h1>" in html
    assert "a/experiment.toml" in html and "b/experiment.toml" in html
    assert "12 / 0" in html and "1 / 0" in html
    assert len(images(html)) == 4
    assert write_report([tmp_path / "a"], tmp_path / "else") == tmp_path / "else" / "report.html"


def test_two_runs_of_one_name_are_both_shown(tmp_path):
    make_run(tmp_path / "x" / "same")
    make_run(tmp_path / "y" / "same", evaluated=False)
    html = write_report([tmp_path / "x" / "same", tmp_path / "y" / "same"]).read_text()
    assert "same vs same (2)" in html
    assert "No data yet: same (2)." in html  # the second one has no accuracy by round


def test_what_a_user_wrote_is_escaped(tmp_path):
    name = "<script>alert('x')</script> $a_1$ & _" + "long-" * 60
    make_run(tmp_path / "a", name=name, failing={(1, 1)}, toml='rule = "</pre><img src=x>"')
    html = write_report([tmp_path / "a"]).read_text()
    assert escape(name) in html and "needs &lt;3 MiB&gt;" in html
    assert not re.search(r"<script|<img src=x|<3 MiB", html)


@pytest.mark.parametrize(("status", "word"), [("running", "running/interrupted"), ("failed", "failed")])
def test_unfinished_run_is_flagged(tmp_path, status, word):
    make_run(tmp_path / "a", rounds=2, status=status)
    assert f"a: {word} after round 2 of 5." in write_report([tmp_path / "a"]).read_text()


def test_failures_are_listed_with_their_reasons(tmp_path):
    make_run(tmp_path / "a", failing={(1, 0), (2, 0), (3, 0), (2, 3)})
    html = write_report([tmp_path / "a"]).read_text()
    assert "Failed client-rounds (4)" in html
    assert html.count("needs &lt;3 MiB&gt;") == 4


def test_picture_without_data_says_so(tmp_path):
    make_run(tmp_path / "a")
    write_report([tmp_path / "a"], tmp_path / "out")
    make_run(tmp_path / "b", rounds=0, status="running", toml="")
    html = write_report([tmp_path / "b"], tmp_path / "out").read_text()
    assert len(images(html)) == 1  # the initial model's accuracy
    assert html.count("No data yet") == 3
    assert [path.name for path in (tmp_path / "out").glob("*.png")] == ["accuracy.png"]  # none is left of run a


def test_run_of_which_nothing_is_committed(tmp_path):
    Records(tmp_path / "a").close()
    html = write_report([tmp_path / "a"]).read_text()
    assert "running/interrupted before its first round" in html
    assert summarise(read_run(tmp_path / "a"))["rounds"] is None


@pytest.mark.parametrize("clients", [1, 1000])
def test_one_and_a_thousand_clients_all_of_which_may_fail(tmp_path, clients):
    make_run(tmp_path / "a", rounds=1, clients=clients, evaluated=False)
    make_run(tmp_path / "b", rounds=1, clients=clients, failing={(1, client) for client in range(clients)})
    assert len(images(write_report([tmp_path / "a"]).read_text())) == 2  # memory and accuracy of clients
    html = write_report([tmp_path / "a", tmp_path / "b"]).read_text()
    assert "No data yet: b." in html


def test_last_federated_evaluation_is_preferred(tmp_path):
    records = Records(tmp_path / "a")
    records.start("a", "", "0.1.0", {})
    for t in (1, 2):
        rows = [{"client": c, "status": "ok", "accuracy": 0.2 * t + c / 100} for c in range(3)]
        records.commit_round({"round": t}, [client_row(t, 0)], rows if t == 1 else rows[:2], b"")
    records.close()
    values, source = _client_accuracies(read_run(tmp_path / "a"))
    assert values.tolist() == pytest.approx([0.40, 0.41]) and source == "of the global model of round 2"
    assert source in write_report([tmp_path / "a"]).read_text()


def test_without_federated_evaluation_each_clients_last_training_counts(tmp_path):
    make_run(tmp_path / "a", failing={(3, 1), (1, 2), (2, 2), (3, 2)})  # client 1 last answered in round 2, 2 never
    values, source = _client_accuracies(read_run(tmp_path / "a"))
    assert sorted(values) == pytest.approx([0.50, 0.51, 0.53]) and "last training" in source


def test_no_run_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="at least one run"):
        write_report([])
    with pytest.raises(FileNotFoundError, match=re.escape("run.sqlite")):
        write_report([tmp_path])
