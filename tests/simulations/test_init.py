"""A run that begins where another ended, and adapts by scalars alone."""

import pytest
from fedforward.server.records import read_run
from fedforward.simulations.experiment import Experiment, ExperimentError
from fedforward.simulations.run import execute, start
from fedforward.simulations.world import build

COMMON = {"clients": 5, "batch_size": 32, "set": {"model": {"hidden": [32]}}}


def run(runs, **changes):
    world, folder = start(Experiment(**COMMON | changes), runs)
    execute(world, folder)
    return folder, read_run(folder)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A network that was trained on digits turned by a quarter."""
    options = COMMON["set"] | {"data": {"rotate": 90}}
    return run(tmp_path_factory.mktemp("runs"), rule="backprop", rounds=10, lr=0.2, evaluate_every=10, set=options)


def test_scalars_adapt_a_network_of_turned_digits_to_upright_ones(pretrained, tmp_path):
    folder, before = pretrained
    assert before.rounds.accuracy.iloc[-1] > 0.8
    options = COMMON["set"] | {"rule": {"directions": 16, "own": True}}
    _, after = run(
        tmp_path, rule="spsa", init=str(folder), rounds=50, lr=0.05, local_steps=1, evaluate_every=50, set=options
    )
    assert after.rounds.model_sha256.iloc[0] == before.rounds.model_sha256.iloc[-1]
    began, ended = after.rounds.accuracy.iloc[0], after.rounds.accuracy.iloc[-1]
    assert began < 0.5 and ended > began + 0.2
    down = after.clients.groupby("round").bytes_down
    assert down.min()[1] > 4 * 2410 and down.max()[2] < 2000  # the model is sent once


def test_a_run_that_is_none_and_a_model_of_another_shape_are_refused(pretrained, tmp_path):
    with pytest.raises(ExperimentError, match="holds no run"):
        start(Experiment(**COMMON, init=str(tmp_path)), tmp_path)
    wide = {"model": {"hidden": [33]}}
    with pytest.raises(ExperimentError, match="use the same --model"):
        start(Experiment(**COMMON | {"set": wide}, rule="backprop", init=str(pretrained[0])), tmp_path)


def test_a_model_is_not_put_beside_other_fixed_matrices_than_it_learned_by(tmp_path):
    folder, _ = run(tmp_path, rule="dfa", rounds=1, seed=3)
    begin = Experiment(**COMMON, rule="dfa", rounds=1, init=str(folder), name="on")
    for other in (begin, begin.replace(seed=3, set=COMMON["set"] | {"rule": {"regenerate": True}})):
        with pytest.raises(ExperimentError, match=r"other fixed random numbers.*use --seed 3"):
            start(other, tmp_path)
    start(begin.replace(seed=3), tmp_path)
    start(begin.replace(rule="feedback-alignment", name="another-rule"), tmp_path)


def test_a_node_needs_no_folder_of_the_run_that_the_server_begins_with(tmp_path):
    world = build(Experiment(**COMMON, rule="spsa", init=str(tmp_path / "elsewhere")))  # as every node makes it
    assert world.client(0).trainer is world.trainer
    with pytest.raises(ExperimentError, match="holds no run"):
        world.initial()
