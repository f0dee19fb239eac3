"""What pruning leaves, who knows of it, and how much nearer the estimate comes to the gradient."""

import pytest
import torch
from cases import assert_close, copied, equal, network
from estimates import (
    MOSTLY_SLOW,
    SMALL,
    assert_mean_is,
    digits_losses,
    flat,
    gradient,
    mean_cosine,
    planner,
    problem,
    signs,
)
from fedforward.algorithms import Evolution, RuleError, SparseEvolution, State
from fedforward.algorithms.directions import Directions
from fedforward.algorithms.perturbation.sparse_evolution import prune, pruned
from fedforward.algorithms.seeds import Place
from fedforward.client.memory import PeakMemory
from fedforward.client.step import load_parts, residents, take_step

K, COUNT = 16, 1008


def left(params):
    return flat({key: p != 0 if p.dim() > 1 else torch.ones_like(p, dtype=torch.bool) for key, p in params.items()})


@pytest.mark.parametrize("name", MOSTLY_SLOW)
def test_the_estimate_is_the_gradient_of_what_is_left_and_as_near_as_if_that_were_all(name):
    net, rule = SMALL[name], SparseEvolution(directions=COUNT, sigma=1e-5, shaping="none")
    state, b = problem(rule, net)
    prune(state.params, 0.25, 64)
    kept = left(state.params)
    truth = gradient(state.params, b, lambda params: net.forward(params, b.x))[kept]
    c = rule.coefficients(rule.probe(net, state, b, 0.1)[0][None], torch.ones(1).double())[0]
    samples = COUNT * c[:, None] * signs(state.params, b.draws, COUNT)[:, kept]
    assert_mean_is(samples, truth)
    d = int(kept.sum())
    cosine = mean_cosine(samples.view(-1, K, d).mean(1), truth)
    assert cosine == pytest.approx((K / (K + d + 1)) ** 0.5, rel=0.1)
    assert d < 0.6 * len(kept)
    before = flat(state.params)  # and a step goes there alone
    rule.apply(state, b.draws, torch.rand(2 * COUNT).double(), 0.1)
    moved = flat(state.params) - before
    assert not moved[~kept].any() and moved[kept].all()


@pytest.mark.parametrize("chunk", [256, 10**6])
def test_pruning_takes_the_smallest_weights_of_all_layers_and_no_bias(chunk):
    params = network("lenet").init(3)
    before = copied(State(params, {}, {})).params
    weights = {key: p for key, p in before.items() if p.dim() > 1}
    for density in (0.8, 0.3, 0.01):
        prune(params, density, chunk)
        count = int(density * sum(p.numel() for p in weights.values()))
        threshold = flat(weights).abs().sort(descending=True).values[count]
        assert_close(params, before | {key: p * (p.abs() > threshold) for key, p in weights.items()}, atol=0)
    already = copied(State(params, {}, {})).params
    prune(params, 0.5, chunk)  # more than is left
    assert equal(params, already)


def test_pruning_follows_the_rounds_and_what_is_pruned_stays():
    net, rule = network("mlp"), SparseEvolution(directions=2, every=3, rate=0.5, density=0.2)
    state, found, gone = rule.init(net, seed=1), [], None
    weights = sum(p.numel() for p in state.params.values() if p.dim() > 1)
    for t in range(1, 13):
        for s in range(2):
            rule.apply(state, rule.draw(Place(0, t, 0, s), 0, 0), torch.tensor([1.0, 2.0, 4.0, 3.0]), 0.1)
            now = flat(pruned(state.params))
            assert gone is None or not (gone & ~now).any()
            gone = now
            found.append(1 - float(now.sum()) / weights)
    wanted = [max(0.2, 0.5 ** (t // 3)) for t in range(1, 13) for _ in range(2)]
    assert found == pytest.approx(wanted, abs=1e-3)
    assert all(p.all() for p in state.params.values() if p.dim() == 1)


def test_a_probe_gives_pruned_weights_back_exactly_and_a_weight_that_meets_zero_too():
    net, rule = SMALL["mlp-tanh"], SparseEvolution(directions=8, sigma=0.25)
    state, b = problem(rule, net)
    for p in state.params.values():
        p.copy_((p * 8).round() / 4)  # multiples of σ: many are 0 at w + σ z or w − σ z
    before = copied(state).params
    assert pruned(before)["0.linear.weight"].any() and (before["0.linear.weight"].abs() == 0.25).any()
    rule.probe(net, state, b, 0.1)
    assert equal(state.params, before)


def test_whoever_takes_the_model_has_the_mask():
    net, rule = network("lenet"), SparseEvolution(directions=2, every=1, rate=0.5)
    old = rule.init(net, seed=1)
    answer = torch.tensor([2.3, 2.2, 2.4, 2.1])
    rule.apply(old, Directions(0, 1, 0), answer, 0.1)
    new = State({key: p.clone() for key, p in old.params.items()}, {}, {})
    for t in (2, 3):
        for state in (old, new):
            rule.apply(state, Directions(0, t, 0), answer, 0.1)
    assert equal(old.params, new.params) and pruned(new.params)["0.conv2d.weight"].any()


def test_a_step_needs_a_byte_a_weight_above_evolution():
    plans = planner("lenet")
    weights = 26_730 - 16 - 64 - 10
    for k in (2, 6):
        plan = plans.step(SparseEvolution(directions=k), 64)
        assert plan.peak == plans.forward(64).peak + weights + 4 * (2 * k + 4)
        assert plan.peak == plans.step(Evolution(directions=k), 64).peak + weights


@pytest.mark.parametrize("model, size", [("mlp", 1), ("lenet", 4)])
def test_a_step_that_prunes_needs_no_more_than_one_that_does_not(model, size):
    plans, rule = planner(model), SparseEvolution(directions=2, every=3)

    def load(rows):
        return torch.rand(size, *plans.net.shape), torch.zeros(size, dtype=torch.int64)

    for t in (2, 3):
        state = rule.init(plans.net, seed=1)
        meter = PeakMemory(residents(state, {}))
        parts = load_parts(load, range(size), rule.draw(Place(0, t, 0, 0), size, 10), 0)
        take_step(rule, plans.net, state, parts, 0.1, meter)
        assert meter.peak == plans.step(rule, size).peak
        assert bool(pruned(state.params)[next(iter(state.params))].any()) == (t == 3)


def test_fifty_steps_on_the_digits_take_a_sixth_off_the_loss():
    rule = SparseEvolution(directions=24, every=5, density=0.5)
    losses = digits_losses(rule, network("mlp-tanh"), 50, place_of_round)
    assert losses[0] > 2.2 and losses[-1] < 5 / 6 * losses[0]


def place_of_round(step):
    return Place(0, step + 1, 0, 0)


def test_impossible_settings_are_refused():
    for wrong in ({"density": 0.0}, {"density": 1.1}, {"rate": 0.0}, {"rate": 2.0}, {"every": 0}):
        with pytest.raises(RuleError, match="sparse-evolution needs density and rate above 0"):
            SparseEvolution(**wrong)
    with pytest.raises(RuleError, match="cannot have a pool"):
        SparseEvolution(pool=64)
