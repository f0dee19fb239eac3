"""The networks, rules and batches that the tests share, and the comparisons they make.

A new rule is tested against every promise of the contract on the day its row is added to `RULES`.
"""

from functools import cache, partial

import pytest
import torch
from fedforward.algorithms import (
    DFA,
    DGL,
    DRTP,
    PEPITA,
    SPSA,
    ApproxBackprop,
    AugLocal,
    Backprop,
    Baffle,
    Batch,
    CascadedForward,
    CheckpointedBackprop,
    Consensus,
    CounterCurrent,
    EquilibriumPropagation,
    Evolution,
    FedKSeed,
    FeedbackAlignment,
    ForwardForward,
    ForwardGradient,
    FusedBackprop,
    Genetic,
    InfoPro,
    KnowledgeAccumulation,
    LayerCollaboration,
    LikelihoodRatio,
    LocalForwardGradient,
    MonoForward,
    Network,
    NeuronSwarm,
    NoProp,
    NoPropCT,
    NoPropFM,
    PredictiveCoding,
    PredSim,
    ProductFeedbackAlignment,
    Projection,
    RuleError,
    SelectiveBackprop,
    SignSymmetry,
    SparseEvolution,
    State,
    TargetProjection,
    ZOAdam,
    ZOConserve,
    ZOSign,
)
from fedforward.algorithms.models import cnn, lenet, mlp
from fedforward.algorithms.seeds import Place
from fedforward.client.plan import Planner
from torch import nn

SHAPE, CLASSES = (1, 8, 8), 10

NETS = {
    "mlp": partial(mlp, SHAPE, CLASSES, hidden=(24, 16)),
    "mlp-tanh": partial(mlp, SHAPE, CLASSES, hidden=(24, 16), activation="tanh"),
    "mlp-gelu": partial(mlp, SHAPE, CLASSES, hidden=(12, 12), activation="gelu"),  # not in closed form
    "lenet": partial(lenet, SHAPE, CLASSES, channels=(4, 6)),
    "cnn-group": partial(cnn, SHAPE, CLASSES, channels=(16, 16), norm="group"),  # two channels a group
    "flat": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(64, 20), nn.ReLU(), nn.Linear(20, 12), nn.ReLU(), nn.Linear(12, CLASSES)
    ),
}

RULES = {
    "backprop": Backprop(lr=0.1),
    "backprop-adam": Backprop(lr=0.01, optimizer="adam", weight_decay=0.01),
    "backprop-fused": FusedBackprop(lr=0.1, momentum=0.9),
    "backprop-checkpointed": CheckpointedBackprop(lr=0.1),
    "backprop-checkpointed-late": CheckpointedBackprop(lr=0.1, fused=False),
    "backprop-selective": SelectiveBackprop(lr=0.1),
    "backprop-approx": ApproxBackprop(lr=0.1),
    "mono-forward": MonoForward(lr=0.1, momentum=0.9),
    "mono-forward-last": MonoForward(lr=0.1, prediction="last"),
    "forward-forward": ForwardForward(lr=0.01),
    "forward-forward-one-pass": ForwardForward(lr=0.01, inference="one-pass"),
    "forward-forward-hybrid": ForwardForward(lr=0.01, inference="one-pass", negatives="hybrid"),
    "forward-forward-hard": ForwardForward(lr=0.01, negatives="hard"),
    "layer-collaboration": LayerCollaboration(lr=0.01),
    "layer-collaboration-below": LayerCollaboration(lr=0.01, gamma="below"),
    "cascaded-forward": CascadedForward(lr=0.1, momentum=0.9),
    "cascaded-forward-sparsemax": CascadedForward(lr=0.1, predictor="sparsemax", features=40),
    "cascaded-forward-closed": CascadedForward(predictor="closed", features=40),
    "cascaded-forward-dfa": CascadedForward(lr=0.1, blocks="dfa"),
    "dfa": DFA(lr=0.1),
    "dfa-photonic": DFA(lr=0.1, feedback="ternary", ternarise=0.2, noise=0.3),
    "dfa-remade": DFA(lr=0.1, feedback="normal", regenerate=True),
    "feedback-alignment": FeedbackAlignment(lr=0.05),
    "feedback-alignment-remade": FeedbackAlignment(lr=0.05, regenerate=True),
    "sign-symmetry": SignSymmetry(),
    "sign-symmetry-fixed": SignSymmetry(scheme="frsf"),
    "sign-symmetry-drawn": SignSymmetry(scheme="brsf"),
    "sign-symmetry-remade": SignSymmetry(scheme="frsf", regenerate=True),
    "product-feedback-alignment": ProductFeedbackAlignment(),
    "pepita": PEPITA(lr=0.05),
    "pepita-mem": PEPITA(lr=0.05, variant="mem"),
    "pepita-hebbian": PEPITA(lr=0.05, variant="hebbian"),
    "pepita-time-local": PEPITA(lr=0.02, variant="time-local", momentum=0.0),
    "pepita-mirror": PEPITA(lr=0.05, mirror=0.1),
    "pepita-remade": PEPITA(lr=0.05, variant="mem", regenerate=True),
    "drtp": DRTP(lr=0.02),
    "drtp-remade": DRTP(lr=0.02, regenerate=True),
    "target-projection": TargetProjection(),
    "target-projection-remade": TargetProjection(regenerate=True),
    "target-projection-l1": TargetProjection(loss="l1"),
    "predictive-coding": PredictiveCoding(lr=0.1, relaxation=4),
    "predictive-coding-prox": PredictiveCoding(lr=0.1, scheme="prox", relaxation=3),
    "counter-current": CounterCurrent(lr=0.2),
    "counter-current-cosine": CounterCurrent(lr=0.2, loss="cosine"),
    "aug-local": AugLocal(),
    "dgl": DGL(),
    "predsim": PredSim(),
    "infopro": InfoPro(),
    "no-prop": NoProp(steps=2, width=12),
    "no-prop-learned": NoProp(steps=2, width=12, embedding="learned", dim=12),
    "no-prop-prototype": NoProp(steps=2, width=12, embedding="prototype"),
    "no-prop-ct": NoPropCT(steps=3, width=12),
    "no-prop-ct-learned": NoPropCT(steps=3, width=12, embedding="learned", dim=12),
    "no-prop-fm": NoPropFM(steps=3, width=12),
    "no-prop-fm-prototype": NoPropFM(steps=3, width=12, embedding="prototype"),
    "knowledge-accumulation": KnowledgeAccumulation(passes=4, eta=0.01),
    "equilibrium-propagation": EquilibriumPropagation(relaxation=4, nudged=3),
    "equilibrium-propagation-tied": EquilibriumPropagation(
        relaxation=4, nudged=3, phases=1, feedback="tied", momentum=0.0
    ),
    "projection": Projection(iterations=3),
    "projection-alternating": Projection(iterations=5, scheme="alternating", loss="margin", lr=0.5),
    "projection-difference": Projection(iterations=5, scheme="difference-map", beta=0.7),
    "baffle": Baffle(directions=3),
    "baffle-central": Baffle(directions=3, scheme="central"),
    "spsa": SPSA(directions=2),
    "spsa-abreast": SPSA(directions=5, abreast=2),
    "spsa-dropout": SPSA(directions=2, dropout=0.2),
    "zo-sign": ZOSign(directions=3),
    "zo-conserve": ZOConserve(directions=3),
    "zo-adam": ZOAdam(directions=2),
    "fedkseed": FedKSeed(directions=3),
    "evolution": Evolution(directions=3),
    "evolution-plain": Evolution(directions=3, shaping="none"),
    "sparse-evolution": SparseEvolution(directions=3, every=1),
    "genetic": Genetic(directions=6),
    "consensus": Consensus(directions=4),
    "forward-gradient": ForwardGradient(directions=3),
    "forward-gradient-abreast": ForwardGradient(directions=3, abreast=2),
    "forward-gradient-projection": ForwardGradient(directions=3, combine="projection"),
    "local-forward-gradient": LocalForwardGradient(lr=0.1, directions=3),
    "likelihood-ratio": LikelihoodRatio(lr=0.1, directions=2),
    "likelihood-ratio-orthogonal": LikelihoodRatio(lr=0.1, directions=3, draws="orthogonal"),
    "neuron-swarm": NeuronSwarm(particles=2, neurons=3),
    "neuron-swarm-all": NeuronSwarm(particles=1, neurons=0),
}

# Rows whose passes are like another's: where a test is long, theirs are slow ones.
ALIKE = {
    "forward-forward-hybrid", "layer-collaboration-below", "cascaded-forward-sparsemax", "cascaded-forward-dfa",
    "dfa-photonic", "dfa-remade", "feedback-alignment-remade", "sign-symmetry-remade", "pepita-remade", "drtp-remade",
    "target-projection-remade", "sign-symmetry-fixed", "sign-symmetry-drawn", "pepita-hebbian", "pepita-time-local",
    "pepita-mirror", "target-projection-l1", "predictive-coding-prox", "spsa-dropout", "zo-sign", "zo-conserve",
    "fedkseed", "evolution-plain", "sparse-evolution", "genetic", "consensus", "forward-gradient-projection",
    "likelihood-ratio-orthogonal", "equilibrium-propagation-tied", "projection-alternating", "projection-difference",
    "neuron-swarm-all", "no-prop-ct", "no-prop-fm", "predsim", "no-prop-learned", "no-prop-prototype",
    "no-prop-ct-learned", "no-prop-fm-prototype", "dgl", "infopro",
}  # fmt: skip


def mostly(names):
    """Return names of rules to parametrise a long test by: those that are alike with the slow tests."""
    return [pytest.param(name, marks=pytest.mark.slow) if name in ALIKE else name for name in names]


@cache
def network(name):
    return Network(NETS[name], SHAPE, CLASSES)


def takes(rule, net):
    """Return whether a rule can train a network."""
    try:
        rule.check(net)
    except RuleError:
        return False
    return True


def taken(rule, name="lenet"):
    """Return the network, or the MLP where the rule refuses it."""
    return network(name) if takes(rule, network(name)) else network("mlp")


def double(state):
    """Return a copy of the state in float64: the accuracy in which a rule is compared with the truth."""
    parts = ({key: t.double() if t.is_floating_point() else t for key, t in part.items()} for part in state)
    return State(*parts)


def copied(state):
    return State(*({key: t.clone() for key, t in part.items()} for part in state))


def batch(rule, size=6, *, seed=0, step=0, client=0, dtype=torch.float64, shape=SHAPE, classes=CLASSES):
    """Return a random batch whose samples all count, with the rule's draws for it."""
    g = torch.Generator().manual_seed(1000 * seed + 10 * step + client)
    return Batch(
        torch.rand(size, *shape, generator=g, dtype=dtype),
        torch.randint(classes, (size,), generator=g),
        torch.ones(size, dtype=dtype),
        rule.draw(Place(seed, 1, client, step), size, classes),
    )


def nonuniform(b):
    """Return the batch with two samples masked and the others weighted unequally."""
    weight = torch.linspace(0.5, 2, len(b.y), dtype=b.weight.dtype)
    weight[1] = weight[-2] = 0
    return b._replace(weight=weight)


def step(rule, net, state, b, lr=None):
    with torch.no_grad():
        return rule.step(net, state, b, rule.lr if lr is None else lr)


def descent(rule, net, state, b):
    """Return what one step with learning rate 1 subtracts from each parameter: the gradient, for plain SGD."""
    before = copied(state).params
    step(rule, net, state, b, lr=1.0)
    return {key: before[key] - p for key, p in state.params.items()}


def leaves(params):
    """Return copies of the parameters that record a graph."""
    return {key: p.detach().clone().requires_grad_() for key, p in params.items()}


def run_block(net, i, params, x):
    """Run block i by its modules alone: the reference of `Network.block`."""
    own = {key.partition(".")[2]: params[key] for key in net.keys(i)}
    return torch.func.functional_call(net.blocks[i], own, (x,))


def weighted_cross_entropy(scores, b):
    losses = -scores.log_softmax(1)[torch.arange(len(b.y)), b.y]
    return (losses * b.weight).sum() / b.weight.sum()


def assert_close(got, wanted, atol):
    """Assert that two dictionaries of tensors have the same keys and, to `atol`, the same values."""
    assert got.keys() == wanted.keys()
    for key in wanted:
        torch.testing.assert_close(got[key], wanted[key], rtol=0, atol=atol, msg=lambda m, key=key: f"{key}: {m}")


def equal(a, b):
    """Return whether two dictionaries hold the same bits in the same order."""
    return list(a) == list(b) and all(torch.equal(a[key], b[key]) for key in a)


def assert_one_block_is_needed(rule, numbers, size=64, width=32, more=0):
    """Assert that activities of one block are alive at a time: of a dense one so many numbers a unit, and a share.

    Args:
        rule: the rule.
        numbers: of each unit and sample.
        size: of the batch.
        width: of the blocks.
        more: numbers of each unit, whatever the batch.
    """
    nets = [Network(partial(mlp, (width,), 10, hidden=(width,) * depth), (width,), 10) for depth in (1, 2, 4, 8)]
    first, *others = (Planner(net).step(rule, size).parts["activations"] for net in nets)
    assert set(others) == {4 * size * (numbers * width + 1) + 4 * more * width}
    assert first == others[0] - 4 * size * width  # its input is the batch
    nets = [Network(partial(cnn, (3, 32, 32), 10, channels=(32, 64, 128)[:n]), (3, 32, 32), 10) for n in (1, 2, 3)]
    assert len({Planner(net).step(rule, 16).parts["activations"] for net in nets}) == 1  # the first is the largest
