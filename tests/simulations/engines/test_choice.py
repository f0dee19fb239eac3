"""Which engine `auto` picks, and what is said of devices that are not there."""

import pytest
import torch
from fedforward.simulations.engines import choice
from fedforward.simulations.engines.choice import Choice, choose, devices_named
from fedforward.simulations.experiment import ExperimentError
from small_runs import small_world


@pytest.fixture
def machine(monkeypatch):
    """Return what sets the machine's cores, and a client's seconds."""

    def be(cores=2, alone=0.01, gpus=0):
        monkeypatch.setattr(choice, "cores", lambda: cores)
        monkeypatch.setattr(choice, "seconds_of_a_client", lambda world: alone)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)

    return be


def autograd_world(**options):
    """Return a world whose clients gain nothing side by side."""
    return small_world(rule="backprop", **options)


def test_short_runs_stay_in_this_process(machine):
    machine()
    assert choose(autograd_world(rounds=2))[:2] == ("inline", ("cpu",))


def test_long_runs_take_every_core(machine):
    machine(cores=4)
    picked = choose(autograd_world(rounds=2000))
    assert picked[:2] == ("pool", ("cpu",) * 4) and "about 100 s" in picked.why
    assert choose(autograd_world(rounds=2000, clients_per_round=3)).devices == ("cpu",) * 3
    assert choose(autograd_world(rounds=20000, clients_per_round=1)).engine == "inline"
    machine(cores=1)
    assert choose(autograd_world(rounds=2000)).engine == "inline"


def test_batches_of_clients_by_the_experiment_and_no_clock(machine):
    scalars = {"rule": "baffle", "set": {"rule": {"directions": 2}}}
    for alone in (1e-4, 1e4):
        machine(cores=2, alone=alone)
        assert choose(small_world(**scalars)).engine == "cohort"
        assert choose(small_world(**scalars, clients_per_round=4)).engine != "cohort"
        own = scalars | {"set": {"rule": {"directions": 2, "own": True}}}
        assert choose(small_world(**own)).engine != "cohort"
        convolutions = scalars | {"set": scalars["set"] | {"model": {"channels": [2]}}}
        assert choose(small_world(model="lenet", **convolutions)).engine != "cohort"


def test_small_clients_without_a_graph_train_side_by_side(machine):
    for alone in (1e-4, 1e4):
        machine(cores=2, alone=alone)
        assert choose(small_world(rounds=2))[:2] == ("cohort", ("cpu",))
        long = choose(small_world(rounds=10**7))
        assert long[:2] == ("cohort", ("cpu", "cpu")) and long.named() == "cpu:2"
        assert choose(small_world(rounds=2, devices="cpu")).engine == "cohort"
        assert choose(small_world(rule="forward-forward")).engine == "cohort"
        assert choose(small_world(rule="rules_for_pool:Hungry")).engine != "cohort"
        assert choose(small_world(set={"model": {"hidden": [3000, 3000]}})).engine != "cohort"
        assert choose(small_world(model="lenet", set={"model": {"channels": [2]}})).engine != "cohort"


def test_gpus(machine):
    machine(gpus=2)
    assert choose(small_world())[:2] == ("cohort", ("cuda:0",))
    assert choose(small_world(devices="cuda:0,cuda:1,cuda:1"))[:2] == ("pool", ("cuda:0", "cuda:1", "cuda:1"))
    with pytest.raises(ExperimentError, match="--devices cuda:2: PyTorch sees 2 GPU"):
        devices_named("cuda:2")


def test_what_is_asked_for_is_done():
    assert choose(small_world(engine="cohort")) == Choice("cohort", ("cpu",), "as asked")
    assert choose(small_world(engine="pool", devices="cpu:3")).devices == ("cpu",) * 3
    assert choose(small_world(devices="cpu:2")).engine == "pool"
    with pytest.raises(ExperimentError, match="engine inline uses one device, not cpu:2: use --engine pool"):
        choose(small_world(engine="inline", devices="cpu:2"))


@pytest.mark.parametrize("text", ["gpu:0", "cpu:two", "cpu:0", "cuda:x"])
def test_other_devices_are_refused_in_one_line(text):
    with pytest.raises(ExperimentError, match="--devices"):
        devices_named(text)


def test_the_probe_trains_and_changes_nothing():
    world = small_world()
    before = world.initial()
    assert choice.seconds_of_a_client(world) > 0
    after = world.initial()
    assert all((after[key].numpy() == before[key].numpy()).all() for key in before)
