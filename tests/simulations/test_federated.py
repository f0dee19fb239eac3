"""Twenty clients of unlike data, averaged, beat the best of them alone, whatever a rule sends beside weights.

Heads, auxiliary nets, activity means, mirrors, learned feedback, a second network, class embeddings, moments: the plain
mean of each is right for it, and the shares of the classes that a client has are its own (Dirichlet, α = 0.3).
"""

import pytest
from fedforward.algorithms import RULES
from fedforward.client.trainer import Assignment
from fedforward.server.records import read_run
from fedforward.simulations.experiment import Experiment, ExperimentError
from fedforward.simulations.run import execute, start
from fedforward.simulations.world import build

ROUNDS, EPOCHS, BATCH = 12, 2, 10
OWN = {
    "mono-forward": {},
    "forward-forward": {},
    "layer-collaboration": {},
    "cascaded-forward": {},
    "cascaded-forward-closed": {"rule": {"predictor": "closed"}},
    "counter-current": {"model": {"activation": "elu"}},
    "counter-current-cosine": {"model": {"activation": "elu"}, "rule": {"loss": "cosine"}},
    "dfa": {},
    "feedback-alignment": {},
    "sign-symmetry": {},
    "product-feedback-alignment": {"rule": {"strong_rounds": 3}},
    "pepita": {},
    "pepita-mirror": {"rule": {"mirror": 0.05}},
    "drtp": {"model": {"activation": "tanh"}},
    "target-projection": {},
    "predictive-coding": {},
    "equilibrium-propagation": {"model": {"activation": "tanh"}},
    "projection": {"rule": {"iterations": 10}},
    "aug-local": {},
    "dgl": {},
    "predsim": {},
    "infopro": {},
    "no-prop": {"rule": {"steps": 4, "lr": 3e-3}},
    "no-prop-ct": {"rule": {"lr": 3e-3}},
    "no-prop-fm": {"rule": {"embedding": "learned", "lr": 3e-3}},
    "knowledge-accumulation": {},
    "neuron-swarm": {"model": {"hidden": [16]}},
}
FAST = ("drtp",)


def rule_of(case):
    return next(name for name in sorted(RULES, key=len, reverse=True) if case.startswith(name))


def alone(world, index):
    """Return the accuracy of what a client makes by itself, in as many rounds, on the data that all are judged by."""
    client, params = world.client(index), world.trainer.initial_params()
    for server_round in range(1, ROUNDS + 1):
        todo = Assignment(server_round, world.trainer.rule.lr, EPOCHS, BATCH, evaluate=False)
        params = world.trainer.fit(params, client.train, client.test, index, todo).params
    return world.trainer.evaluate(params, world.data.test).accuracy


@pytest.mark.parametrize("case", [pytest.param(c, marks=[pytest.mark.slow] * (c not in FAST)) for c in OWN])
def test_the_mean_of_unlike_clients_beats_the_best_of_them(case, tmp_path, no_report):
    asked = Experiment(
        rule=rule_of(case), partition="dirichlet:0.3", clients=20, rounds=ROUNDS, epochs=EPOCHS, batch_size=BATCH,
        holdout=0.0, evaluate_every=ROUNDS, clients_per_evaluation=1, set=OWN[case],
    )  # fmt: skip
    world, folder = start(asked, tmp_path)
    execute(world, folder)
    together = read_run(folder).rounds.accuracy.iloc[-1]
    best = max(alone(world, index) for index in range(20))
    print(f"{case}: together {together:.3f}, best alone {best:.3f}")
    assert together > best


@pytest.mark.parametrize("strategy", ["fedadam", "fedprox", "krum"])
def test_moments_are_averaged_plainly_or_not_at_all(strategy):
    closed = Experiment(rule="cascaded-forward", strategy=strategy, set={"rule": {"predictor": "closed"}})
    with pytest.raises(ExperimentError, match="only the plain mean is right: use --strategy fedavg"):
        build(closed)
    build(closed.replace(set={}))
