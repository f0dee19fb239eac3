"""The experiments of the papers are ones that can be run."""

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
