"""Every rule learns: nine of ten digits that it has not seen, within a stated number of epochs."""

import numpy as np
import pytest
import torch
from cases import CLASSES, SHAPE, step
from fedforward.algorithms import (
    DFA,
    DGL,
    DRTP,
    PEPITA,
    AugLocal,
    Backprop,
    Batch,
    CascadedForward,
    CounterCurrent,
    EquilibriumPropagation,
    FeedbackAlignment,
    ForwardForward,
    InfoPro,
    KnowledgeAccumulation,
    LayerCollaboration,
    MonoForward,
    Network,
    NoProp,
    NoPropCT,
    NoPropFM,
    PredictiveCoding,
    PredSim,
    ProductFeedbackAlignment,
    Projection,
    SelectiveBackprop,
    SignSymmetry,
    TargetProjection,
)
from fedforward.algorithms.models import mlp
from fedforward.algorithms.seeds import Place
from sklearn.datasets import load_digits

# rule, epochs over 1,437 digits in batches of 16
BUDGETS = {
    "backprop": (Backprop(), 4),
    "backprop-adam": (Backprop(lr=1e-3, optimizer="adam"), 4),
    "backprop-selective": (SelectiveBackprop(), 4),
    "mono-forward": (MonoForward(), 3),
    "mono-forward-last": (MonoForward(prediction="last"), 3),
    "forward-forward": (ForwardForward(), 12),
    "forward-forward-one-pass": (ForwardForward(inference="one-pass"), 6),
    "forward-forward-hybrid": (ForwardForward(inference="one-pass", negatives="hybrid"), 8),
    "forward-forward-hard": (ForwardForward(inference="one-pass", negatives="hard"), 6),
    "layer-collaboration": (LayerCollaboration(), 12),
    "cascaded-forward": (CascadedForward(), 8),
    "cascaded-forward-closed": (CascadedForward(predictor="closed"), 1),
    "cascaded-forward-dfa": (CascadedForward(blocks="dfa"), 6),
    "dfa": (DFA(), 8),
    "feedback-alignment": (FeedbackAlignment(), 8),
    "sign-symmetry": (SignSymmetry(), 4),
    "product-feedback-alignment": (ProductFeedbackAlignment(), 8),
    "pepita": (PEPITA(), 10),
    "pepita-mirror": (PEPITA(mirror=0.05), 10),
    "pepita-time-local": (PEPITA(variant="time-local", scale=0.5, lr=0.01, momentum=0.0, dropout=0.0), 30),
    "drtp": (DRTP(), 8),
    "target-projection": (TargetProjection(), 4),
    "predictive-coding": (PredictiveCoding(), 8),
    "predictive-coding-prox": (PredictiveCoding(scheme="prox", lr=1.0), 8),
    "counter-current": (CounterCurrent(), 10),
    "counter-current-cosine": (CounterCurrent(loss="cosine"), 10),
    "aug-local": (AugLocal(), 4),
    "dgl": (DGL(), 4),
    "predsim": (PredSim(), 4),
    "infopro": (InfoPro(), 4),
    "no-prop": (NoProp(steps=5), 4),
    "no-prop-learned": (NoProp(steps=5, embedding="learned"), 4),
    "no-prop-prototype": (NoProp(steps=5, embedding="prototype"), 4),
    "no-prop-ct": (NoPropCT(lr=3e-3), 8),
    "no-prop-ct-learned": (NoPropCT(lr=3e-3, embedding="learned"), 10),
    "no-prop-ct-prototype": (NoPropCT(lr=3e-3, embedding="prototype"), 8),
    "no-prop-fm": (NoPropFM(lr=3e-3), 6),
    "no-prop-fm-learned": (NoPropFM(lr=3e-3, embedding="learned"), 6),
    "no-prop-fm-prototype": (NoPropFM(lr=3e-3, embedding="prototype"), 6),
    "knowledge-accumulation": (KnowledgeAccumulation(), 8),
    "equilibrium-propagation": (EquilibriumPropagation(), 6),
    "projection": (Projection(iterations=10), 1),
}


LONG = {
    "mono-forward-last", "forward-forward-one-pass", "forward-forward-hybrid", "forward-forward-hard",
    "layer-collaboration", "cascaded-forward-dfa", "projection", "predsim", "infopro", "dgl", "pepita-mirror",
    "pepita-time-local", "no-prop", "no-prop-learned", "no-prop-prototype", "no-prop-ct", "no-prop-ct-learned",
    "no-prop-ct-prototype", "no-prop-fm", "no-prop-fm-learned", "no-prop-fm-prototype", "knowledge-accumulation",
    "predictive-coding-prox", "counter-current-cosine",
}  # fmt: skip


@pytest.mark.parametrize("case", [pytest.param(case, marks=[pytest.mark.slow] * (case in LONG)) for case in BUDGETS])
def test_every_dense_rule_reads_nine_digits_in_ten(case):
    rule, epochs = BUDGETS[case]
    activation = {"drtp": "tanh", "counter-current": "elu", "counter-current-cosine": "elu"}.get(case, "relu")
    hidden = (1024,) if case == "pepita-time-local" else (128, 128)
    net = Network(lambda: mlp(SHAPE, CLASSES, hidden=hidden, activation=activation), SHAPE, CLASSES)
    x, y = (torch.from_numpy(a) for a in load_digits(return_X_y=True))
    x, rng, place = x.float().view(-1, *SHAPE) / 16, np.random.default_rng(0), 0
    train, test = torch.from_numpy(rng.permutation(len(y))).split([1437, 360])
    state = rule.init(net, seed=0)
    for epoch in range(epochs):
        lr = rule.lr * min(1, 2 * (1 - epoch / epochs))  # constant for half the epochs, then falling in a line
        for rows in train[torch.from_numpy(rng.permutation(len(train)))].split(16):
            draws = rule.draw(Place(0, 0, 0, place), len(rows), CLASSES)
            step(rule, net, state, Batch(x[rows], y[rows], torch.ones(len(rows)), draws), lr)
            place += 1
    accuracy = float((rule.logits(net, state, x[test]).argmax(1) == y[test]).float().mean())
    assert accuracy >= 0.9
