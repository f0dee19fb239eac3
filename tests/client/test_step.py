"""A batch in parts gives the update of the whole batch, for every rule that says so."""

import pytest
import torch
from cases import CLASSES, RULES, assert_close, batch, copied, double, network, taken
from fedforward.algorithms import ForwardForward, RuleError
from fedforward.client.fitting import OverBudget, fit
from fedforward.client.plan import Planner
from fedforward.client.step import accumulators, load_parts, take_step
from fedforward.client.trainer import Trainer

SPLITTABLE = [name for name, rule in RULES.items() if not rule.unsplittable]
PLAIN = {"inference": "sweep", "peer": 0.0}


def trained(rule, net, whole, sizes, steps=2):
    """Return (state, stats of the last step, answers) after steps on one batch in parts of the given size."""
    state, answers = double(rule.init(net, seed=1)), []
    if sizes:
        state = state._replace(gradients=accumulators(rule, state.params))
    for _ in range(steps):
        parts = (
            part._replace(weight=part.weight.double(), total=None if part.total is None else part.total.double())
            for part in load_parts(lambda rows: (whole.x[rows], whole.y[rows]), torch.arange(7), whole.draws, sizes)
        )
        stats, answer = take_step(rule, net, state, parts, 0.05)
        answers.append(answer)
    return state, stats, answers


@pytest.mark.parametrize("net", ["mlp", "cnn-group"])
@pytest.mark.parametrize("size", [pytest.param(1, marks=pytest.mark.slow), 3, 9])
@pytest.mark.parametrize("rule", SPLITTABLE)
def test_parts_add_up_to_the_batch(rule, size, net):
    rule, net = RULES[rule], taken(RULES[rule], net)
    whole = batch(rule, 7)
    once, stats, answers = trained(rule, net, whole, 0)
    state, part_stats, part_answers = trained(rule, net, whole, size)
    assert_close(state.params, once.params, atol=1e-9)
    assert_close(state.slots, once.slots, atol=1e-9)
    assert_close(part_stats._asdict(), stats._asdict(), atol=1e-9)
    if answers[0] is not None:
        for got, wanted in zip(part_answers, answers, strict=True):
            torch.testing.assert_close(got, wanted, rtol=0, atol=1e-7)


def test_what_refuses_to_be_split_would_learn_something_else():
    rule, net = ForwardForward(), network("mlp")
    assert "peer term" in rule.unsplittable
    whole = batch(rule, 7)
    once, split = (trained(rule, net, whole, size)[0].params for size in (0, 2))
    assert max((once[key] - split[key]).abs().max() for key in once) > 1e-5
    assert not ForwardForward(peer=0.0).unsplittable
    without = ForwardForward(peer=0.0)
    once, split = (trained(without, net, whole, size)[0].params for size in (0, 2))
    assert_close(split, once, atol=1e-9)


def test_a_rule_that_cannot_be_split_is_refused_for_it():
    with pytest.raises(RuleError, match="forward-forward cannot split a batch: the peer term"):
        Trainer(ForwardForward(), network("mlp"), 0, micro_batch=2)
    planner = Planner(network("mlp"))
    peak = planner.step(ForwardForward(), 8).peak
    assert fit(planner, ForwardForward(), 8, peak).micro_batch == 0
    with pytest.raises(OverBudget, match="its batch cannot be split: the peer term"):
        fit(planner, ForwardForward(), 8, peak - 1)


def test_parts_are_loaded_one_after_the_other_and_share_their_draws():
    loaded = []

    def load(rows):
        loaded.append(rows.tolist())
        return torch.zeros(len(rows), 2), torch.zeros(len(rows), dtype=torch.int64)

    draws = torch.arange(10)
    parts = load_parts(load, torch.arange(10) + 100, draws, 4)
    assert loaded == []
    seen = [(part, list(loaded)) for part in parts]
    assert [len(rows) for _, rows in seen] == [1, 2, 3]
    assert loaded == [[100, 101, 102, 103], [104, 105, 106, 107], [108, 109]]
    assert torch.cat([part.draws for part, _ in seen]).tolist() == draws.tolist()
    assert all(part.draws.untyped_storage().data_ptr() == draws.untyped_storage().data_ptr() for part, _ in seen)
    assert sum(part.share().sum() for part, _ in seen) == pytest.approx(1.0)
    assert all(float(part.total) == 10 for part, _ in seen)
    (whole,) = load_parts(load, torch.arange(3), None, 3)
    assert whole.total is None and CLASSES == 10


def test_a_split_batch_holds_gradients_and_one_part_at_a_time():
    net, rule = network("mlp"), RULES["backprop"]
    whole, split = (Planner(net).step(rule, 64, size) for size in (0, 4))
    assert split.parts["gradients"] == split.parts["parameters"] == whole.parts["parameters"]
    assert split.parts["batch"] < whole.parts["batch"] / 8
    assert split.flops == whole.flops
    assert copied(rule.init(net, 0)).gradients == {}
