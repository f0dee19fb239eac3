"""Directions abreast give what they give one after another, cost what is said, and give way to a budget."""

from dataclasses import replace

import pytest
import torch
from cases import RULES, batch, copied, double, equal, network, nonuniform
from fedforward.algorithms import Baffle, ForwardGradient, Network, RuleError, ScalarRule
from fedforward.client.fitting import fit
from fedforward.client.memory import PeakMemory
from fedforward.client.plan import Planner
from fedforward.client.step import residents, take_step

NAMES = [name for name, rule in RULES.items() if isinstance(rule, ScalarRule)]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("model", ["mlp", "lenet"])
def test_the_numbers_are_those_of_one_after_another(name, model):
    alone, net = replace(RULES[name], directions=5, abreast=1), network(model)
    b = nonuniform(batch(alone))
    state = double(alone.init(net, seed=1))
    with torch.no_grad():
        wanted, stats = alone.probe(net, copied(state), b, 0.1)
        for abreast in (2, 5, 9):  # with one left over, all, and more than there are
            found, seen = replace(alone, abreast=abreast).probe(net, state, b, 0.1)
            torch.testing.assert_close(found, wanted, rtol=1e-7, atol=1e-7)  # of differences over σ, in float64
            torch.testing.assert_close(torch.stack(seen), torch.stack(stats), rtol=1e-9, atol=1e-9)


def test_parameters_are_not_touched_by_full_groups():
    rule, net = Baffle(directions=6, abreast=3), network("lenet")
    state = rule.init(net, seed=1)
    before = copied(state)
    rule.probe(net, state, batch(rule, dtype=torch.float32), 0.1)
    assert equal(state.params, before.params)


def test_the_network_itself_is_run_once_for_all_tangents():
    net = network("mlp")
    alone, abreast = (Planner(net).step(ForwardGradient(directions=8, abreast=p), 16).flops for p in (1, 8))
    passes = Planner(net).forward(16).flops
    assert 7 * passes * 0.99 < alone - abreast < 7 * passes * 1.01


@pytest.mark.parametrize("name", ["baffle", "evolution", "forward-gradient"])
def test_memory_is_planned_and_gives_way_to_a_budget(name):
    rule, net = replace(RULES[name], directions=8), network("lenet")
    planner, peaks = Planner(net), []
    for abreast in (1, 3, 8):
        asked = replace(rule, abreast=abreast)
        state, b = asked.init(net, seed=1), batch(asked, dtype=torch.float32)
        meter = PeakMemory(residents(state, {}))
        take_step(asked, net, state, [b], 0.1, meter)
        peaks.append(planner.step(asked, len(b.y)).peak)
        assert peaks[-1] == meter.peak
    model = sum(p.nbytes for p in state.params.values())
    assert peaks[2] - peaks[1] > 0.9 * 5 * model * (name != "forward-gradient")  # whose tangents are of one block
    for budget, most in ((peaks[1], 3), (peaks[1] - 1, 2), (peaks[0], 1)):
        chosen = fit(planner, replace(rule, abreast=8), 6, budget)
        assert chosen.abreast == most and chosen.peak <= budget and chosen.chunk == rule.chunk
    with pytest.raises(RuleError, match="abreast ≥ 1"):
        replace(rule, abreast=0)


class Copied(torch.nn.Module):
    def forward(self, x):
        return torch.zeros(x.shape, device=x.device).copy_(x)


def test_a_network_that_cannot_be_batched_is_refused_with_the_remedy():
    net = Network(lambda: torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10), Copied()), (1, 8, 8), 10)
    rule = Baffle(directions=4)
    state, b = rule.init(net, seed=1), batch(rule, dtype=torch.float32)
    assert rule.probe(net, state, b, 0.1)[0].isfinite().all()
    with pytest.raises(RuleError, match="cannot be batched over directions: leave rule"):
        replace(rule, abreast=4).probe(net, state, b, 0.1)
