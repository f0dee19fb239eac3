"""An experiment is the same as TOML, as flags and as a Flower run-config."""

import tomllib
from itertools import pairwise

import pytest
from fedforward.simulations.experiment import (
    Experiment,
    ExperimentError,
    from_mapping,
    from_run_config,
    from_toml,
    parse_options,
)

EXPERIMENTS = [
    Experiment(),
    Experiment(lr=0.25, clients=7, clients_per_round=3, strategy="krum", partition="dirichlet:0.3", seed=9, holdout=0),
    Experiment(set={"model": {"hidden": [64, 32], "activation": "tanh"}, "rule": {"momentum": 0.9, "nesterov": True}}),
    Experiment(set={"rule": {"text": 'a "quote", one\'s own = \\ $x\n#', "empty": "", "list": ["a b", "c"]}}),
    Experiment(set={"data": {"nested": [[1, 2], [3]], "number": 1e-7, "limit": 10}}, name="my run"),
    Experiment(clients=10**6, clients_per_round=100, clients_per_evaluation=50, resample=True, samples_per_client=20),
    Experiment(rule="some/where/my rule.py:Mine", data="./folder of data"),
]


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_toml_round_trip(experiment, tmp_path):
    text = experiment.to_toml()
    (tmp_path / "a.toml").write_text(text)
    again = from_toml(tmp_path / "a.toml")
    assert again == experiment and again.to_toml() == text


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_run_config_round_trip(experiment):
    config = experiment.to_run_config()
    assert all(isinstance(value, bool | int | float | str) for value in config.values())
    assert from_run_config(config) == experiment
    assert from_run_config(config | {"runs-dir": "elsewhere"}) == experiment
    assert from_run_config(config | {"lr": 0.0}) == experiment.replace(lr=None)  # Flower knows no null


def test_every_field_is_written_but_the_rules_own():
    assert set(tomllib.loads(Experiment(lr=1.0, set={"rule": {"a": 1}}).to_toml())) == {
        "name", "rule", "data", "model", "init", "partition", "clients", "clients-per-round", "clients-per-evaluation",
        "resample", "samples-per-client", "rounds", "epochs", "local-steps", "batch-size", "lr",
        "lr-schedule", "strategy", "fleet", "adapt", "micro-batch", "audit", "holdout", "evaluate-every",
        "diagnose-every", "seed", "engine", "devices", "timeout", "threads", "set",
    }  # fmt: skip


def test_all_clients_evaluate_up_to_a_thousand():
    counts = [Experiment(clients=clients).evaluated() for clients in (1, 20, 1000, 1001, 10**6)]
    assert counts == [1, 20, 1000, 1000, 1000]
    assert Experiment(clients=5000, clients_per_evaluation=4000).evaluated() == 4000


def test_flags_override_the_file(tmp_path):
    path = tmp_path / "a.toml"
    path.write_text("rounds = 3\nseed = 4\n[set.rule]\nweight-decay = 0.1\nmomentum = 0.5\n[set.model]\nhidden = [5]\n")
    merged = from_toml(path, {"rounds": 8, "lr": 0.2}, ["rule.weight_decay=0.3", "data.limit=9"])
    assert (merged.rounds, merged.seed, merged.lr) == (8, 4, 0.2)
    options = {"rule": {"weight_decay": 0.3, "momentum": 0.5}, "model": {"hidden": [5]}, "data": {"limit": 9}}
    assert merged.set == options


@pytest.mark.parametrize(("text", "flags"), [("clients = 100", 50), ("clients-per-round = 90", 90)])
def test_a_file_and_flags_are_judged_together(tmp_path, text, flags):
    (tmp_path / "a.toml").write_text(text)
    merged = from_toml(tmp_path / "a.toml", {"clients": 100, "clients-per-round": flags})
    assert (merged.clients, merged.clients_per_round) == (100, flags)


def test_options_are_toml_or_plain_text():
    options = parse_options([
        "rule.momentum=0.9", "rule.optimizer=adam", "model.hidden=[64,64]", "rule.weight-decay=1", "data.name=a = b",
        "rule.flag=true", "rule.quoted='0.5'", "rule.nothing=",
    ])  # fmt: skip
    assert options["rule"] == {
        "momentum": 0.9, "optimizer": "adam", "weight_decay": 1, "flag": True, "quoted": "0.5", "nothing": ""
    }  # fmt: skip
    assert options["model"] == {"hidden": [64, 64]} and options["data"] == {"name": "a = b"}


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"round": 3}, "unknown setting 'round': did you mean rounds"),
        ({"batchsize": 3}, "did you mean batch-size"),
        ({"batch_size": 3}, "did you mean batch-size"),
        ({"rounds": 2.0}, "rounds must be a whole number, not 2.0"),
        ({"rounds": True}, "rounds must be a whole number, not True"),
        ({"rule": 3}, "rule must be a text, not 3"),
        ({"lr": "fast"}, "lr must be a number, not 'fast'"),
        ({"lr": -0.1}, "lr must be positive and finite, not -0.1"),
        ({"lr": 0}, "lr must be positive"),
        ({"lr": float("nan")}, "lr must be positive and finite, not nan"),
        ({"rounds": -3}, "rounds must be at least 1, not -3"),
        ({"batch-size": 0}, "batch-size must be at least 1, not 0"),
        ({"clients-per-round": 21}, "between 1 and clients (20), or 0 for all; it is 21"),
        ({"clients-per-round": -1}, "or 0 for all; it is -1"),
        ({"clients-per-evaluation": 21}, "clients (20), or 0 for all, or 1000 of more; it is 21"),
        ({"clients-per-evaluation": -1}, "clients-per-evaluation must be between 1 and clients"),
        ({"resample": 1}, "resample must be true or false, not 1"),
        ({"resample": "yes"}, "resample must be true or false, not 'yes'"),
        ({"resample": True, "samples-per-client": -1}, "samples-per-client must be at least 0, not -1"),
        ({"samples-per-client": 5}, "samples a client draws of its own: add --resample, or leave it out"),
        ({"sample": True}, "did you mean resample"),
        ({"holdout": 1.0}, "holdout must be at least 0 and less than 1, not 1"),
        ({"seed": -1}, "seed must be between 0 and 2^63 − 1, not -1"),
        ({"lr-schedule": "cosin"}, "unknown lr-schedule 'cosin': did you mean cosine"),
        ({"engine": "ray"}, "unknown engine 'ray'"),
        ({"name": "a/b"}, "name must be a plain folder name"),
        ({"name": ".hidden"}, "name must be a plain folder name"),
        ({"name": "two\nlines"}, "name must be a plain folder name"),
        ({"set": {"rul": {}}}, "unknown part in set 'rul': did you mean rule"),
        ({"set": 3}, "set must hold a table for each part"),
        ({"set": {"rule": 3}}, "set must hold a table for each part"),
        ({"set": {"rule": {"a": {"b": 1}}}}, "option rule.a must be a value"),
        ({"set": {"rule": {"a": float("nan")}}}, "option rule.a must be a value"),
        ({"set": "rule.momentum"}, "--set wants part.key=value, as in rule.momentum=0.9, not 'rule.momentum'"),
        ({"set": "rule.a='b"}, "set wants part.key=value words"),
    ],
)
def test_mistakes_are_told_in_one_line(values, words):
    with pytest.raises(ExperimentError) as told:
        from_mapping(values)
    assert words in str(told.value) and "\n" not in str(told.value)


def test_files_that_are_none(tmp_path):
    with pytest.raises(ExperimentError, match="No such file"):
        from_toml(tmp_path / "none.toml")
    with pytest.raises(ExperimentError, match="Is a directory"):
        from_toml(tmp_path)
    (tmp_path / "a.toml").write_text("rounds = ")
    with pytest.raises(ExperimentError, match=r"a.toml is not TOML: Invalid value \(at end of document\)"):
        from_toml(tmp_path / "a.toml")
    (tmp_path / "a.toml").write_bytes(b"rounds = \xff\xfe")
    with pytest.raises(ExperimentError, match="is not TOML"):
        from_toml(tmp_path / "a.toml")


def test_the_defaults_of_the_flower_app_are_those_of_the_command_line():
    from pathlib import Path

    import fedforward

    text = (Path(fedforward.__file__).parent / "pyproject.toml").read_text()
    assert from_run_config(tomllib.loads(text)["tool"]["flwr"]["app"]["config"]) == Experiment(engine="flower")


def test_experiments_of_one_seed_differ_only_where_they_are_told_to():
    assert all(a != b for a, b in pairwise(EXPERIMENTS))
    assert Experiment().replace(seed=3) == Experiment(seed=3)
