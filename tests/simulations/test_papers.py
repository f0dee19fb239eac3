"""The experiments of the papers are ones that can be run, and what is told of them is what the run database says."""

import json
import sqlite3
from contextlib import closing

import pandas as pd
import pytest
import typer
from fedforward.algorithms import RULES
from fedforward.server.records import read_run
from fedforward.simulations.papers import mnist_dense, mnist_scalars, pages
from fedforward.simulations.papers.script import asked
from fedforward.simulations.world import build, resolved

LINES = [mnist_scalars.experiment(rule, "digits") for rule in mnist_scalars.SETTINGS]
LINES += [
    mnist_dense.experiment(rule, kind, "digits") for rule in mnist_dense.SETTINGS for kind in ("central", "federated")
]


@pytest.mark.parametrize("cell", LINES, ids=lambda cell: cell.name)
def test_a_line_is_an_experiment_whose_steps_are_known(cell):
    world = build(resolved(cell))
    assert world.trainer.flops(world.samples(0), world.asked, None) > 0


def test_a_course_is_what_was_done_so_far(tmp_path):
    cell = mnist_scalars.experiment("baffle", "digits").replace(rounds=2, evaluate_every=1)
    seen = mnist_scalars.course(cell, tmp_path)
    assert seen["round"].tolist() == [0, 1, 2] and seen["bytes"].is_monotonic_increasing
    # 10 clients, 64 samples, 20 directions and the model itself, in every round
    assert seen["forward"].tolist() == pytest.approx([0, 10 * 64 * 21, 2 * 10 * 64 * 21])


def test_courses_are_told_kept_and_drawn(tmp_path, monkeypatch, capsys):
    short = {rule: mnist_scalars.SETTINGS[rule] | {"rounds": 2, "evaluate_every": 1} for rule in ("spsa", "backprop")}
    monkeypatch.setattr(mnist_scalars, "SETTINGS", short)
    mnist_scalars.main("digits", tmp_path, "spsa,backprop")
    told, kept = capsys.readouterr().out, pd.read_csv(tmp_path / "courses.csv")
    assert "spsa" in told and "best" in told
    assert kept.groupby("rule")["round"].max().to_dict() == {"spsa": 2, "backprop": 2}
    assert (tmp_path / "courses.png").read_bytes().startswith(b"\x89PNG")


def test_an_unknown_rule_is_answered_with_the_near_one():
    assert asked("spsa, baffle", mnist_scalars.SETTINGS) == ["spsa", "baffle"]
    with pytest.raises(typer.BadParameter, match="unknown rule of this script 'bafle': did you mean baffle"):
        asked("bafle", mnist_scalars.SETTINGS)


@pytest.mark.parametrize("page", pages.pages(), ids=lambda page: page.name)
def test_a_page_is_of_a_rule_and_its_lines_are_experiments_that_can_be_built(page):
    assert page.rule in RULES and page.name.startswith(page.rule) and page.claim and page.source and page.differs
    assert page.published is None or 0.1 < page.published < 1
    for name, line in page.lines.items():
        assert line.rule == page.rule and line.clients == {"central": 1, "federated": 10}[name]
        build(resolved(line.replace(data="digits")))


PAGE = """
claim = "All is well."
source = "table 1"
published = 0.5
differs = "in nothing"
[experiment]
rule = "backprop"
data = "digits"
rounds = 2
[experiment.set.model]
hidden = [8]
[federated]
rounds = 1
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "pages").mkdir()
    (tmp_path / "pages" / "backprop.toml").write_text(PAGE)
    monkeypatch.setattr(pages, "FOLDER", tmp_path / "pages")


def test_papers_lays_what_was_published_beside_what_was_recorded(cli, folder, no_report, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    told = json.loads(cli("papers", "--json").out)["papers"]
    assert [(row["line"], row["ours"], row["status"]) for row in told] == [
        ("central", None, "not run"), ("federated", None, "not run"),
    ]  # fmt: skip
    said = cli("papers", "backprop", "--run").out
    for line, rounds in (("central", 2), ("federated", 1)):
        recorded = read_run(pages.Path("runs/papers") / f"backprop-{line}").rounds["accuracy"].iloc[-1]
        assert f"{100 * recorded:.2f}" in said and f"{100 * (recorded - 0.5):+.2f}" in said and f"{rounds}/" in said
    assert "All is well." in said and "fedforward papers backprop --run" in said
    assert cli("papers", "backprp").err.startswith("error: unknown rule with a page 'backprp': did you mean backprop?")


def test_a_run_of_other_settings_is_not_taken_for_a_papers(cli, folder, no_report, tmp_path):
    cli("papers", "--run")
    page = tmp_path / "pages" / "backprop.toml"
    page.write_text(page.read_text().replace("hidden = [8]", "hidden = [9]"))
    told = cli("papers", "--json").out
    assert [row["status"] for row in json.loads(told)["papers"]] == ["other settings"] * 2
    refused = cli("papers", "--run")
    assert refused.code == 2 and "is a run of other settings: remove it" in refused.err


def test_a_run_of_another_version_hides_nothing(cli, folder, no_report):
    cli("papers", "--run")
    with closing(sqlite3.connect("runs/papers/backprop-central/run.sqlite")) as db, db:
        db.execute("UPDATE runs SET experiment = experiment || 'unheard-of = 1'")
    told = json.loads(cli("papers", "--json").out)["papers"]
    assert [row["status"] for row in told] == ["other settings", "finished"]
    assert "published: 50.00 %" in cli("rules", "--describe", "backprop").out


def test_a_rule_may_have_further_pages_with_one_line(cli, folder, tmp_path):
    more = PAGE.replace("claim", 'lines = ["central"]\nclaim')
    (tmp_path / "pages" / "backprop-more.toml").write_text(more)
    assert [(page.name, list(page.lines)) for page in pages.pages(["backprop"])] == [
        ("backprop-more", ["central"]), ("backprop", ["central", "federated"]),
    ]  # fmt: skip
    assert [page.name for page in pages.pages(["backprop-more"])] == ["backprop-more"]
    said = cli("rules", "--describe", "backprop").out
    assert said.count("published: 50.00 % (table 1)") == 2 and "fedforward papers backprop-more --run" in said
    assert json.loads(cli("rules", "--describe", "backprop", "--json").out)["papers"][0]["ours"] == {"central": None}
