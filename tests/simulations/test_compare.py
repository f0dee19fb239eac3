"""A comparison of rules: its cells are recorded runs that are run once, and its rows say what the runs measured."""

import json
import math
import re
import shlex
import tomllib

import pandas as pd
import pytest
from fedforward.algorithms import RULES
from fedforward.server.records import Records, read_run
from fedforward.simulations.comparison.cells import cells_of, finished
from fedforward.simulations.comparison.labels import Label, place_labels
from fedforward.simulations.comparison.picture import draw_comparison
from fedforward.simulations.comparison.rows import Measured, Outcome, accuracies_at, mean_curve, on_front, rows_of
from fedforward.simulations.comparison.settings import chosen_rules, experiment_of, own_settings
from fedforward.simulations.experiment import ExperimentError
from fedforward.simulations.summary import summarise
from matplotlib.figure import Figure
from small_runs import FLAGS, rows, small

WORDS = ["compare", *FLAGS, "--name=it", "--rules=backprop,dfa", "--seeds=2"]
CELLS = ["backprop-seed0", "backprop-seed1", "dfa-seed0", "dfa-seed1"]


def files(folder):
    """Return when every file below was written, and what it holds."""
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*") if path.is_file()}


def one_line(answer, *words):
    assert answer.code == 2 and answer.out == ""
    assert answer.err.startswith("error: ") and answer.err.count("\n") == 1
    assert all(word in answer.err for word in words), answer.err


# ---- the command -----------------------------------------------------------------------------------------------------


def test_it_prints_one_table_and_a_line_a_cell(cli, no_report, monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "80")
    code, out, err = cli(*WORDS)
    assert code == 0 and out.endswith("report: runs/it/compare.html\n")
    assert [line.split(":")[0] for line in err.splitlines()] == [
        f"[{number}/4] {rule}, seed {seed}"
        for number, (rule, seed) in enumerate([("backprop", 0), ("backprop", 1), ("dfa", 0), ("dfa", 1)], 1)
    ]
    assert "accuracy" in err and "KiB" in err and "\x1b" not in out + err
    lines = out.splitlines()
    assert max(map(len, lines)) <= 80
    assert all(
        any(re.match(rf"[● ] {rule} .*\d\d\.\d ± \d+\.\d ", line) for line in lines) for rule in ("backprop", "dfa")
    )
    folder = tmp_path / "runs" / "it"
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        [*CELLS, "compare.csv", "compare.html", "compare.png"]
    )
    assert pd.read_csv(folder / "compare.csv")["rule"].tolist() == ["backprop", "dfa"]
    html = (folder / "compare.html").read_text()
    assert "data:image/png;base64," in html and not re.search(r"https?:|<script|<link|src=\"(?!data:)", html)
    assert "fedforward compare --clients=5" in html and "seeds 0 to 1" in html


def test_json_is_one_object_with_what_the_runs_say(cli, no_report, tmp_path):
    code, out, _ = cli(*WORDS, "--json")
    assert code == 0 and out.count("\n") == 1
    result = json.loads(out, parse_constant=lambda name: pytest.fail(name))
    assert (result["name"], result["path"], result["report"]) == ("it", "runs/it", "runs/it/compare.html")
    assert result["seeds"] == [0, 1] and [row["rule"] for row in result["rules"]] == ["backprop", "dfa"]
    runs = [summarise(read_run(tmp_path / "runs" / "it" / cell)) for cell in CELLS]
    for row, (one, two) in zip(result["rules"], (runs[:2], runs[2:]), strict=True):
        assert row["seeds"] == 2 and row["reason"] is None and row["settings"] is None
        assert row["accuracy"] == pytest.approx((one["accuracy"] + two["accuracy"]) / 2)
        assert row["accuracy_sd"] == pytest.approx(abs(one["accuracy"] - two["accuracy"]) / math.sqrt(2))
        assert row["peak_bytes"] == max(one["peak_bytes_max"], two["peak_bytes_max"])
        assert row["bytes_up_total"] == (one["bytes_up_total"] + two["bytes_up_total"]) / 2
        assert row["flops_client"] == (one["flops_total"] + two["flops_total"]) / 2 / 5
        assert row["lr"] == RULES[row["rule"]].lr
    assert result["rules"][0]["peak_to_backprop"] == 1
    assert result["equal_flops"] == min(row["flops_client"] for row in result["rules"])


def test_interrupted_the_same_command_goes_on_and_runs_nothing_twice(cli, no_report, tmp_path, monkeypatch):
    assert cli(*WORDS).code == 0
    undisturbed = (tmp_path / "runs").rename(tmp_path / "undisturbed")
    commit = Records.commit_round

    def interrupted(self, row, *rest):
        if self.folder.name == "dfa-seed0" and row["round"] == 2:
            raise KeyboardInterrupt
        commit(self, row, *rest)

    monkeypatch.setattr(Records, "commit_round", interrupted)
    code, out, err = cli(*WORDS)
    assert (code, out) == (130, "")
    assert err.endswith(f"interrupted; go on with: {shlex.join(['fedforward', *WORDS])}\n")
    monkeypatch.setattr(Records, "commit_round", commit)
    before = {cell: files(tmp_path / "runs" / "it" / cell) for cell in CELLS[:2]}
    code, _, err = cli(*WORDS)
    assert code == 0 and [line.endswith("(recorded before)") for line in err.splitlines()] == [True, True, False, False]
    assert before == {cell: files(tmp_path / "runs" / "it" / cell) for cell in CELLS[:2]}
    for cell in CELLS:
        assert rows(tmp_path / "runs" / "it" / cell) == rows(undisturbed / "it" / cell)
    before = {cell: files(tmp_path / "runs" / "it" / cell) for cell in CELLS}
    assert cli(*WORDS, "--rules", "dfa,backprop").err.count("(recorded before)") == 4
    assert before == {cell: files(tmp_path / "runs" / "it" / cell) for cell in CELLS}
    one_line(
        cli(*WORDS, "--rounds=3"), "runs/it/backprop-seed0 holds a run with other settings (rounds is 2 there, not 3)"
    )
    one_line(cli(*WORDS, "--name=it/dfa-seed0"), "plain folder name")
    one_line(
        cli(*WORDS, "--runs-dir=runs/it", "--name=dfa-seed0"), "holds a run, not a comparison: choose another --name"
    )
    assert before == {cell: files(tmp_path / "runs" / "it" / cell) for cell in CELLS}


def test_settings_of_one_rule_reach_its_runs_and_are_told(cli, no_report, tmp_path):
    own = ["--for", "dfa.epochs=2", "--for", "dfa.rule.scale=0.5", "--for=dfa.lr=0.07", "--for=dfa.evaluate-every=2"]
    code, out, _ = cli(*WORDS, "--seeds=1", "--seed=3", *own)
    assert code == 0
    told = "¹ dfa: its own settings: epochs 2, rule.scale 0.5, lr 0.07, evaluate-every 2"
    assert told in " ".join(out.split()) and "but for the noted settings of dfa" in " ".join(out.split())
    assert told in (tmp_path / "runs" / "it" / "compare.html").read_text()
    experiments = {
        rule: tomllib.loads((tmp_path / "runs" / "it" / f"{rule}-seed3" / "experiment.toml").read_text())
        for rule in ("dfa", "backprop")
    }
    changed = {"epochs": 2, "lr": 0.07, "evaluate-every": 2, "rule": "dfa", "name": "dfa-seed3", "engine": "cohort"}
    common = experiments["backprop"]
    assert experiments["dfa"] == common | changed | {"set": common["set"] | {"rule": {"scale": 0.5}}}


def test_what_cannot_be_trained_or_diverges_is_a_row_with_its_reason(cli, no_report, tmp_path):
    words = [*WORDS, "--rules=forward-forward,backprop,dfa,baffle", "--seeds=1", "--set=model.hidden=[12]"]
    code, out, err = cli(*words, "--for=dfa.lr=1e30", "--for=baffle.rule.directions=4", "--json")
    found = {row["rule"]: row for row in json.loads(out)["rules"]}
    assert code == 0 and err.count("\n") == 4
    assert "two hidden blocks or more" in found["forward-forward"]["reason"]
    assert (
        "loss is not finite" in found["dfa"]["reason"]
        and read_run(tmp_path / "runs/it/dfa-seed0").info["status"] == "failed"
    )
    for rule in ("forward-forward", "dfa"):
        assert found[rule]["accuracy"] is None and found[rule]["seeds"] == 0 and not found[rule]["front"]
    assert found["baffle"]["seeds"] == found["backprop"]["seeds"] == 1
    assert 0 < found["baffle"]["bytes_up_client"] < found["backprop"]["bytes_up_client"]
    assert (tmp_path / "runs" / "it" / "compare.png").is_file()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--rules=bafle"], "did you mean baffle?"),
        (["--rules=,"], "--rules wants names with commas between"),
        (["--for=bafle.lr=1"], "unknown rule in --for 'bafle': known: backprop, dfa"),
        (["--for=dfaa.lr=1"], "did you mean dfa?"),
        (["--for=dfa.epoch=1"], "did you mean epochs?"),
        (["--for=dfa.rules.scale=1"], "did you mean rule?"),
        (["--for=dfa.rule.scal=1"], "did you mean scale?"),
        (["--for=dfa.model.hiden=[3]"], "did you mean hidden?"),
        (["--for=dfa.clients=3"], "--for cannot change clients, which is the same for every rule: use --clients"),
        (["--for=dfa.resample=true"], "--for cannot change resample, which is the same for every rule: use --resample"),
        (["--for=dfa.data.limit=3"], "--for cannot change data"),
        (["--for=dfa.lr"], "--for wants RULE.key=value, as in baffle.lr=0.3, not 'dfa.lr'"),
        (["--for=dfa=1"], "--for wants RULE.key=value"),
        (["--for=dfa.epochs=0"], "--for dfa: epochs must be at least 1"),
        (["--for=dfa.epochs=two"], "--for dfa: epochs must be a whole number"),
        (["--set=rule.momntum=0.9"], "rule backprop: unknown option of rule 'momntum': did you mean momentum?"),
        (["--model=lenett"], "did you mean lenet or resnet?"),
        (["--data=digit"], "did you mean digits?"),
        (["--strategy=fedscalar"], "--for backprop.KEY=VALUE"),
        (["--rules=forward-forward", "--set=model.hidden=[9]"], "two hidden blocks or more"),
        (["--clients=0"], "clients must be at least 1"),
        (["no.toml"], "cannot read the experiment file no.toml"),
        (["flower.toml"], "use inline here"),
    ],
    ids=lambda item: " ".join(item) if isinstance(item, list) else "",
)
def test_a_mistake_is_one_line_and_nothing_is_written(cli, tmp_path, words, told):
    (tmp_path / "flower.toml").write_text('engine = "flower"')
    one_line(cli(*WORDS, *words), told)
    assert not (tmp_path / "runs").exists()


def test_help_fits_a_terminal(cli, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    code, out, err = cli("compare", "--help")
    assert code == 0 and err == "" and "--for" in out and max(map(len, out.splitlines())) <= 80


def test_nothing_finished_is_a_mistake_too(cli, no_report):
    code, out, err = cli(*WORDS, "--lr=1e30", "--seeds=1")
    assert (code, out) == (2, "")
    assert err.splitlines()[-1].startswith(
        "error: no run of runs/it was finished: every client of round 1 failed: loss"
    )


# ---- cells and settings ----------------------------------------------------------------------------------------------


def test_cells_are_named_and_resolved_and_a_users_rule_has_its_folder():
    rule = "fedforward.algorithms:DFA"
    own = own_settings([f"{rule}.lr=0.5", "baffle.batch-size=7"], [rule, "baffle"])
    cells = cells_of(small(seed=5), own, 2)
    assert [cell.experiment.name for cell in cells] == [
        "fedforward.algorithms-DFA-seed5", "fedforward.algorithms-DFA-seed6", "baffle-seed5", "baffle-seed6",
    ]  # fmt: skip
    assert [(cell.experiment.lr, cell.experiment.strategy) for cell in cells[1:3]] == [
        (0.5, "fedavg"), (RULES["baffle"].lr, "fedscalar"),
    ]  # fmt: skip
    assert cells[2].experiment.batch_size == 7 and cells[0].experiment.batch_size == small().batch_size


def test_all_rules_and_an_experiment_without_settings_of_its_own():
    assert chosen_rules("all") == list(RULES) and chosen_rules(" dfa ,dfa,baffle") == ["dfa", "baffle"]
    assert experiment_of(small(), "dfa", {}) == small(rule="dfa")


def test_a_folder_that_holds_no_run_is_refused(tmp_path):
    (tmp_path / "dfa-seed0").mkdir()
    (cell,) = cells_of(small(), {"dfa": {}}, 1)
    with pytest.raises(ExperimentError, match=r"holds no run .*: remove it, or choose another --runs-dir"):
        finished(cell.experiment, tmp_path, watch=None)


# ---- rows ------------------------------------------------------------------------------------------------------------


def point(rule, accuracy, peak, up):
    return {"rule": rule, "accuracy": accuracy, "peak_bytes": peak, "bytes_up_total": up}


def test_front():
    rows = [
        point("best", 0.9, 100, 50),
        point("its tie", 0.9, 100, 50),
        point("dominated in one", 0.9, 101, 50),
        point("cheaper", 0.8, 100, 40),
        point("smaller", 0.1, 5, 500),
        point("dominated in all", 0.7, 200, 60),
        point("not measured", None, 1, 1),
        point("not a number", math.nan, 1, 1),
        point("without a peak", 0.99, None, 1),
    ]
    assert on_front(rows) == {"best", "its tie", "cheaper", "smaller"}
    assert on_front(rows[-3:]) == set()


def cell(seed, flops, accuracies, peak=10):
    """Return a made-up cell; `flops` so far and `accuracies` are by round, from the initial model on."""
    numbers = {"accuracy": accuracies[-1], "peak_bytes_max": peak, "bytes_up_client": 5.0, "bytes_up_total": 50}
    numbers |= {"seconds": 1.0, "client_rounds": 4, "failed": 0, "over_budget": 0, "adapted": 0}
    return Measured(seed, numbers, pd.DataFrame({"flops": flops, "accuracy": accuracies}), 0.1)


def test_accuracy_at_equal_flops():
    nan = math.nan
    cheap = [cell(0, [0, 10, 20], [0.1, 0.3, 0.5]), cell(1, [0, 14, 28], [0.1, 0.5, 0.7])]  # 12, 24 on the mean
    dear = [cell(0, [0, 12, 24, 36], [0.1, 0.2, nan, 0.9]), cell(1, [0, 12, 24, 36], [0.1, 0.4, nan, 0.9])]
    late = [cell(0, [0, 20, 40], [0.1, nan, 0.8])]
    dearer = [cell(0, [0, 25, 50], [0.1, 0.6, 0.8])]
    outcomes = [
        Outcome(name, cells=cells)
        for name, cells in {"cheap": cheap, "dear": dear, "late": late, "dearer": dearer}.items()
    ]
    found, budget = rows_of([*outcomes, Outcome("failed", failures={0: "why", 1: "why"})])
    assert budget == 24
    reached = {row["rule"]: row["accuracy_at_equal_flops"] for row in found}
    assert reached["cheap"] == pytest.approx(0.6)  # its last round, though seed 1 alone took more
    assert reached["dear"] == pytest.approx(0.3)  # round 2 was not evaluated
    assert reached["late"] is reached["dearer"] is reached["failed"] is None
    assert found[1]["accuracy_at_equal_flops_sd"] == pytest.approx(math.sqrt(0.02))
    assert found[-1]["reason"] == "why" and found[0]["accuracy_sd"] and found[2]["accuracy_sd"] is None
    assert accuracies_at(36, *mean_curve([each.curve for each in dear])) == [0.9, 0.9]


def test_a_rule_of_which_one_seed_failed_says_so():
    (row,), _ = rows_of([Outcome("dfa", {}, [cell(0, [0, 1], [0.1, 0.5])], {1: "the disk is full"})])
    assert row["seeds"] == 1 and row["accuracy"] == 0.5 and row["reason"] == "seed 1: the disk is full"


# ---- the picture -----------------------------------------------------------------------------------------------------


def test_a_picture_of_one_rule_of_many_and_of_none():
    many = [
        point(f"a_${rule}", 0.9 - n / 100, 10**5 + n, 10**6) | {"accuracy_sd": 0.01} for n, rule in enumerate(RULES)
    ]
    many = [row | {"front": n % 2 == 0} for n, row in enumerate(many)]
    many.append(point("backprop", 0.5, None, 0) | {"accuracy_sd": None, "front": False})
    assert draw_comparison(many[:1]).startswith(b"\x89PNG") and draw_comparison(many).startswith(b"\x89PNG")
    assert draw_comparison([point("dfa", None, 1, 1)]) is None


def test_labels_cover_neither_each_other_nor_points():
    figure = Figure(figsize=(6, 4), dpi=100)
    axes = figure.add_subplot(xlim=(0, 1), ylim=(0, 1))
    labels = [Label(0.5 + n / 25 % 0.2, 0.6 + n % 3 / 20, 0.01, f"rule number {n}", "k") for n in range(8)]
    labels += [Label(0.98, 0.5, 0, "at the edge", "k"), Label(0.98, 0.501, 0, "at the same place", "k")]
    place_labels(axes, labels)
    boxes = [text.get_window_extent() for text in axes.texts]
    assert len(boxes) == len(labels)
    assert not any(one.overlaps(other) for i, one in enumerate(boxes) for other in boxes[:i])
    points = axes.transData.transform([label[:2] for label in labels])
    assert not any(box.contains(*xy) for box in boxes for xy in points)
    inside = axes.get_window_extent()
    assert all(inside.x0 <= box.x0 and box.x1 <= inside.x1 for box in boxes)
