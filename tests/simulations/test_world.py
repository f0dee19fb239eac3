"""What an experiment names becomes what it stands for, ours or a user's, or is refused in one line."""

import subprocess
import sys
import tomllib
from textwrap import dedent

import pytest
from fedforward.algorithms import DFA, MonoForward
from fedforward.server.records import Records, read_run
from fedforward.simulations import world as worlds
from fedforward.simulations.experiment import ExperimentError, from_run_config
from fedforward.simulations.naming import named
from fedforward.simulations.parts import MISTAKES, build_strategy
from fedforward.simulations.world import build, load_client, resolved
from flwr.app import Context, RecordDict
from small_runs import FLAGS, rows, small, small_world

MINE = dedent('''
    from dataclasses import dataclass

    import numpy as np
    import torch
    from flwr.app import Array, ArrayRecord
    from flwr.serverapp.strategy import FedAvg
    from torch import nn

    from fedforward.algorithms import Baffle, MonoForward
    from fedforward.simulations.datasets import DataSet, Samples


    @dataclass(frozen=True)
    class Mine(MonoForward):
        """Goes slower."""

        slower: float = 1.0

        def step(self, net, state, batch, lr):
            return super().step(net, state, batch, lr / self.slower)


    @dataclass(frozen=True)
    class Scalar(Baffle):
        """Sends two numbers."""

        directions: int = 2


    def model(shape, classes, *, width=8):
        return nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.Tanh(), nn.Linear(width, classes))


    class Counting(FedAvg):
        """Remembers something of its own."""

        def __init__(self, step=1, **fedavg):
            super().__init__(**fedavg)
            self.step, self.count = step, 0

        def aggregate_train(self, server_round, replies):
            self.count += self.step
            arrays, metrics = super().aggregate_train(server_round, replies)
            more = np.float32(1 + self.count / 100)
            return ArrayRecord({key: Array(array.numpy() * more) for key, array in arrays.items()}), metrics


    def data(n=60, seed=3):
        rng = np.random.default_rng(seed)
        x = torch.from_numpy(rng.standard_normal((n, 8, 8), dtype=np.float32))
        samples = Samples(x, torch.from_numpy(rng.integers(0, 10, n)), torch.arange(n), 1.0)
        return DataSet("noise", samples, samples.subset(torch.arange(10)), 10, (8, 8), {})


    rule, scalar, strategy, noise = Mine(slower=2.0), Scalar(lr=0.01), Counting(min_train_nodes=5), data()
    torch.manual_seed(0)
    sequential = model((64,), 10, width=6)
    number = 3
''')


@pytest.fixture
def mine(tmp_path):
    """Write a user's file in the current folder and forget it afterwards, as a new process would."""
    (tmp_path / "mine.py").write_text(MINE)

    def forget():
        for name in [n for n, m in sys.modules.items() if str(tmp_path) in (getattr(m, "__file__", "") or "")]:
            del sys.modules[name]

    path = list(sys.path)
    yield forget
    forget()
    sys.path[:] = path


CLASSES = {"rule": "Mine", "model": "model", "strategy": "Counting", "data": "data"}
INSTANCES = {"rule": "rule", "model": "sequential", "strategy": "strategy", "data": "noise"}
SCALARS = {"rule": "Scalar", "model": "model", "data": "data"}


@pytest.mark.parametrize("where", ["mine", "mine.py", "sub folder.v2/my-own.py"])
@pytest.mark.parametrize("parts", [CLASSES, INSTANCES, SCALARS], ids=["classes", "instances", "scalars"])
def test_a_users_own_is_run_recorded_resumed_and_reported(cli, no_report, mine, tmp_path, monkeypatch, where, parts):
    if "/" in where:
        (tmp_path / where).parent.mkdir()
        (tmp_path / "mine.py").rename(tmp_path / where)
    names = {part: f"{where}:{item}" for part, item in parts.items()}
    words = [word for part, name in names.items() for word in (f"--{part}", name)]
    words += ["--clients=5", "--epochs=1", "--rounds=2"]
    code, _, err = cli("run", *words, "--name", "whole")
    assert (code, err.count("error")) == (0, 0), err

    mine()
    interrupt_in_round(monkeypatch, 2)
    code, _, err = cli("run", *words, "--name", "cut")
    assert code == 130 and err.endswith("interrupted; go on with: fedforward run --resume runs/cut\n")
    mine()
    assert cli("run", "--resume", "runs/cut").code == 0
    assert rows(tmp_path / "runs" / "cut") == rows(tmp_path / "runs" / "whole")

    written = tomllib.loads((tmp_path / "runs" / "cut" / "experiment.toml").read_text())
    run = read_run(tmp_path / "runs" / "cut")
    assert {part: written[part] for part in names} == names and tomllib.loads(run.info["experiment"]) == written
    assert set(run.clients["rule"]) == {names["rule"]} and (run.clients["peak_bytes"] > 0).all()
    assert cli("report", "runs/cut").out == "runs/cut/report.html\n"
    assert names["rule"] in (tmp_path / "runs" / "cut" / "report.html").read_text()


def interrupt_in_round(monkeypatch, server_round):
    commit = Records.commit_round

    def interrupted(self, row, *rest):
        if row["round"] == server_round:
            monkeypatch.setattr(Records, "commit_round", commit)
            raise KeyboardInterrupt
        commit(self, row, *rest)

    monkeypatch.setattr(Records, "commit_round", interrupted)


def test_options_reach_a_users_own(mine, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = {"rule": {"slower": 4}, "model": {"width": 5}, "strategy": {"step": 3}, "data": {"n": 30}}
    names = {part: f"mine:{item}" for part, item in CLASSES.items()}
    world = small_world(**names, set=options)
    assert world.trainer.rule.slower == 4.0 and world.trainer.net.sizes[0] == (5,)
    assert world.strategy().step == 3 and len(world.data.train) == 30
    assert resolved(small(**names, set=options)).lr == MonoForward().lr


def test_a_users_object_is_never_changed_by_a_run(mine, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    world = small_world(strategy="mine:strategy")
    world.strategy().count = 7
    assert world.strategy().count == 0


def test_a_file_may_import_what_lies_beside_it_and_keeps_out_of_the_way(mine, tmp_path):
    (tmp_path / "beside.py").write_text("HOW_MANY = 3")
    (tmp_path / "json.py").write_text("import beside\nn = beside.HOW_MANY")
    import json

    assert named("data", f"{tmp_path}/json.py:n", {}) == 3
    assert sys.modules["json"] is json


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rule": "mine:Min"}, "unknown object in mine 'Min': did you mean Mine"),
        ({"rule": "minee:Mine"}, "cannot import minee (ModuleNotFoundError: No module named 'minee'); name a module"),
        ({"rule": "no/such.py:Mine"}, "cannot import no/such.py (ImportError: there is no such file)"),
        ({"rule": "raises:Mine"}, "cannot import raises (NameError: name 'nonsense' is not defined)"),
        ({"rule": "raises.py:Mine"}, "cannot import raises.py (NameError: name 'nonsense' is not defined)"),
        ({"rule": "exits:Mine"}, "cannot import exits (SystemExit: 3)"),
        ({"rule": "syntax:Mine"}, "cannot import syntax (SyntaxError"),
        ({"rule": "mine:number"}, "rule 'mine:number' is an object of type int, not a fedforward.algorithms.Rule"),
        ({"rule": "mine:Counting"}, "rule 'mine:Counting' is the class Counting, not a"),
        ({"model": "mine:number"}, "'mine:number' is an object of type int, not an nn.Sequential or what makes one"),
        ({"model": "mine:rule"}, "model 'mine:rule' is an object of type Mine, not an"),
        ({"model": "mine:data"}, "model"),
        ({"strategy": "mine:number"}, "is an object of type int, not a flwr.serverapp.strategy.Strategy"),
        ({"strategy": "mine:Mine"}, "strategy 'mine:Mine' is the class Mine, not a"),
        ({"data": "mine:number"}, "data 'mine:number' gives an object of type int"),
        ({"data": "mine:model"}, "data 'mine:model' failed: TypeError"),
        ({"rule": "bad:Abstract"}, "rule 'bad:Abstract' failed: TypeError: Can't instantiate abstract class"),
        ({"rule": "bad:NoInit"}, "rule 'bad:NoInit' with model 'mlp' failed: ZeroDivisionError: division by zero"),
        ({"rule": "bad:NoLogits"}, "rule 'bad:NoLogits' with model 'mlp' failed: AttributeError"),
        ({"model": "bad:model"}, "model 'bad:model' failed: OSError: no"),
        ({"strategy": "bad:Locked"}, "failed: TypeError: it keeps what cannot be saved in a checkpoint: lock"),
        ({"strategy": "bad:Raises"}, "strategy 'bad:Raises' failed: KeyError: 'no'"),
        ({"rule": "mine:scalar", "strategy": "mine:strategy"}, "sends scalars, which mine:strategy cannot aggregate"),
        ({"model": "mine:sequential", "set": {"model": {"width": 3}}}, "takes no options: drop [set.model]"),
        ({"strategy": "mine:strategy", "set": {"strategy": {"step": 3}}}, "takes no options: drop [set.strategy]"),
        ({"data": "mine:noise", "set": {"data": {"n": 3}}}, "takes no options: drop [set.data]"),
        ({"rule": "mine:rule", "set": {"rule": {"slow": 3.0}}}, "unknown option of rule 'slow': did you mean slower"),
    ],
)
def test_what_a_user_names_wrongly_is_refused(mine, tmp_path, monkeypatch, changes, words):
    monkeypatch.chdir(tmp_path)
    for name, text in {"raises": "nonsense", "exits": "raise SystemExit(3)", "syntax": "def", "bad": BAD}.items():
        (tmp_path / f"{name}.py").write_text(text)
    options = {"data": {}, "model": {}} if "set" not in changes else {"data": {}, "model": {}} | changes["set"]
    with pytest.raises(MISTAKES) as told:
        build(small(**changes | {"set": options}))
    assert words in str(told.value)


BAD = dedent("""
    import threading
    from fedforward.algorithms import MonoForward, Rule
    from flwr.serverapp.strategy import FedAvg

    class Abstract(Rule):
        pass

    class NoInit(MonoForward):
        def init(self, net, seed):
            1 / 0

    class NoLogits(MonoForward):
        def logits(self, net, state, x):
            return x.no_such_thing

    def model(shape, classes):
        raise OSError("no")

    class Locked(FedAvg):
        def __init__(self, **fedavg):
            super().__init__(**fedavg)
            self.lock = threading.Lock()

    class Raises(FedAvg):
        def __init__(self, **fedavg):
            raise KeyError("no")
""")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rule": "monoforward"}, "unknown rule 'monoforward': did you mean mono-forward"),
        ({"model": "mpl"}, "unknown model 'mpl': did you mean mlp"),
        ({"strategy": "fedadm"}, "unknown strategy 'fedadm': did you mean fedadam"),
        ({"partition": "dirchlet:0.3"}, "did you mean dirichlet"),
        ({"rule": "baffle", "strategy": "fedavg"}, "which fedavg cannot aggregate: use --strategy fedscalar"),
        ({"strategy": "fedscalar"}, "sends weights, which fedscalar cannot aggregate: use --strategy fedavg"),
        ({"rule": "forward-forward", "set": {"model": {"hidden": [8]}}}, "forward-forward"),
        ({"set": {"model": {"hidden": []}}}, "mono-forward trains hidden blocks, and this model has none"),
        ({"model": "lenet", "data": "vectors.npz", "set": {"model": {}, "data": {}}}, "convolutions need images"),
        ({"clients": 5000}, "more clients"),
        ({"resample": True, "partition": "shard:2"}, "take one of iid, dirichlet, pathological with --resample"),
        ({"resample": True, "samples_per_client": 151}, "is more than the 150 training samples: lower it"),
        ({"set": {"rule": {"momentm": 0.9}}}, "unknown option of rule 'momentm': did you mean momentum"),
        ({"set": {"rule": {"momentum": "much"}}}, "rule.momentum must be of type float (default 0.0), not 'much'"),
        ({"set": {"rule": {"optimizer": 3}}}, "option rule.optimizer must be of type str"),
        ({"set": {"model": {"hidden": 64}}}, "option model.hidden must be of type list (default [128, 128]), not 64"),
        ({"set": {"model": {"hidden": [-4]}}}, "model.hidden must be whole numbers above 0"),
        ({"set": {"model": {"hidden": ["wide"]}}}, "model.hidden must be whole numbers above 0"),
        ({"set": {"data": {"limit": "few"}}}, "data 'digits' failed: TypeError"),
        ({"set": {"strategy": {"fraction_train": 0.5}}}, "unknown option of strategy 'fraction_train'"),
        ({"strategy": "fedtrimmedavg", "set": {"strategy": {"beta": 0.7}}}, "'fedtrimmedavg' failed: ValueError"),
        ({"data": "no/such/folder"}, "no data at no/such/folder"),
    ],
)
def test_what_is_ours_is_refused_with_the_remedy(tmp_path, monkeypatch, changes, words):
    import numpy as np

    monkeypatch.chdir(tmp_path)
    np.savez("vectors.npz", x=np.zeros((50, 7), np.float32), y=np.arange(50) % 5)
    with pytest.raises(MISTAKES) as told:
        build(small(**changes))
    assert words in str(told.value) and "\n" not in str(told.value)


def test_auto_and_the_rules_rate_are_written_out():
    assert (resolved(small()).strategy, resolved(small(rule="baffle")).strategy) == ("fedavg", "fedscalar")
    assert resolved(small(rule="dfa")).lr == DFA().lr and resolved(small(rule="dfa", lr=0.5)).lr == 0.5
    assert resolved(small(set={"rule": {"lr": 0.25}})).lr == 0.25
    assert resolved(small(strategy="fedprox")).set["strategy"] == {"proximal_mu": 0.1}
    with pytest.raises(ExperimentError, match="lr must be positive"):
        resolved(small(set={"rule": {"lr": -1.0}}))


def test_a_client_is_its_part_of_the_data():
    world = small_world(holdout=0.2)
    clients = [world.client(i) for i in range(5)]
    held = [row for client in clients for part in (client.train, client.test) for row in part.index.tolist()]
    assert sorted(held) == sorted(world.data.train.index.tolist())
    assert [client.partition for client in clients] == [0, 1, 2, 3, 4]


def test_a_flower_node_loads_the_same_client():
    experiment = resolved(small())
    config = experiment.to_run_config()
    assert from_run_config(config) == experiment
    node = Context(run_id=1, node_id=77, node_config={"partition-id": 3}, state=RecordDict(), run_config=config)
    client, same = load_client(node), build(experiment).client(3)
    assert client.partition == 3 and client.train.index.tolist() == same.train.index.tolist()
    assert load_client(node).trainer is client.trainer  # the world is made once


def test_a_flower_node_draws_the_same_samples():
    experiment = resolved(small(clients=10**6, clients_per_round=2, resample=True, partition="dirichlet:0.3"))
    node = Context(1, 77, {"partition-id": 999_999}, RecordDict(), experiment.to_run_config())
    client, same = load_client(node), build(experiment).client(999_999)
    assert client.train.index.tolist() == same.train.index.tolist() and len(same.train) + len(same.test) == 100


@pytest.mark.parametrize(
    ("changes", "trained", "evaluated"),
    [
        ({}, 5, 5),
        ({"clients_per_round": 3}, 3, 5),
        ({"clients_per_evaluation": 2}, 5, 2),
        ({"clients": 1000, "resample": True, "clients_per_round": 7}, 7, 1000),
        ({"clients": 1001, "resample": True, "clients_per_round": 7}, 7, 1000),
        ({"clients": 1001, "resample": True, "clients_per_evaluation": 1001}, 1001, 1001),
    ],
)
def test_a_strategy_takes_as_many_clients_as_the_experiment_says(changes, trained, evaluated):
    strategy = build_strategy(e := small(**changes), MonoForward())
    assert (strategy.min_train_nodes, strategy.min_evaluate_nodes) == (trained, evaluated)
    assert (strategy.fraction_train, strategy.fraction_evaluate) == (trained / e.clients, evaluated / e.clients)


@pytest.mark.slow
def test_a_file_outside_is_found_by_a_process_of_its_own(tmp_path):
    (tmp_path / "mine.py").write_text(MINE)
    for name in ("mine:Mine", "mine.py:Mine"):
        words = [sys.executable, "-m", "fedforward", "run", "--rule", name, *FLAGS, "--json"]
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=True)
        assert '"accuracy"' in done.stdout


def test_a_diagnosis_sees_all_of_the_test_set_and_no_more_than_memory_allows(monkeypatch):
    seen = []
    world = build(small(rule="dfa"))
    model = world.initial()

    def spied(rule, params, data, rows, place, replica_of=world.trainer.replica_of):
        seen.append((len(data), rows.tolist(), place.client))
        return replica_of(rule, params, data, rows, place)

    monkeypatch.setattr(world.trainer, "replica_of", spied)
    assert [row["block"] for row in world.diagnose(3, model)] == [0, 1, 2]
    monkeypatch.setattr(worlds, "DIAGNOSED_BYTES", world.trainer.planner.step(world.trainer.rule, 20).peak)
    world.diagnose(3, model)
    (size, rows, client), (_, fewer, _) = seen
    assert rows[0] == 0 and rows[-1] == size - 1 and len(rows) == min(256, size) and client == world.experiment.clients
    assert 8 <= len(fewer) <= 20 and fewer[-1] == size - 1
