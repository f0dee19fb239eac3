"""The experiments of the papers are ones that can be run."""

import pandas as pd
import pytest
from fedforward.simulations.papers import mnist_dense, mnist_scalars
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
