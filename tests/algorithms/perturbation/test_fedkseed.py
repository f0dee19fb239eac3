"""A run of FedKSeed is a sum of its pool, and whoever has the accumulators has the model."""

import pytest
import torch
from cases import network
from estimates import SMALL, digits_losses, flat, gradient, planner, problem, signs
from fedforward.algorithms import SPSA, FedKSeed, RuleError, ScalarRule, State
from fedforward.algorithms.directions import Directions
from fedforward.algorithms.seeds import Place

POOL = 12


def run(rule, net, dtype, clients=3, rounds=4, steps=5):
    """Return (models after each client's steps, accumulators of each (P,)): clients take turns on one replica."""
    state, b = problem(rule, net)
    state = State({key: p.to(dtype) for key, p in state.params.items()}, {}, {})
    b, models, accumulated, total = b._replace(x=b.x.to(dtype), weight=b.weight.to(dtype)), [], [], torch.zeros(POOL)
    for t in range(rounds):
        for client in range(clients):
            for s in range(steps):
                draws = rule.draw(Place(7, t + 1, client, s), 7, 3)
                scalars, _ = rule.probe(net, state, b._replace(draws=draws), rule.lr)
                rule.apply(state, draws, scalars, rule.lr / (t + 1))  # the learning rate falls
                total[draws.candidates[0]] += float(scalars) / (t + 1)
            models.append(flat(state.params).clone())
            accumulated.append(total.clone())
    return models, accumulated


@pytest.mark.parametrize("name", SMALL)
def test_the_steps_of_a_run_lie_in_the_span_of_the_pool(name):
    net, rule = SMALL[name], FedKSeed(pool=POOL)
    state, _ = problem(rule, net)
    models, _ = run(rule, net, torch.float64)
    pool = signs(state.params, Directions.of_pool(7, POOL), POOL)
    steps = torch.stack(models) - flat(state.params)
    outside = steps - steps @ torch.linalg.pinv(pool) @ pool
    assert outside.abs().max() < 1e-10 and steps[-1].norm() > 0.05
    models, _ = run(FedKSeed(pool=POOL, rebase=1), net, torch.float64)  # other rounds, other pools
    steps = torch.stack(models) - flat(state.params)
    assert (steps - steps @ torch.linalg.pinv(pool) @ pool)[-1].norm() > 0.1 * steps[-1].norm()


@pytest.mark.parametrize("name", SMALL)
def test_a_replica_of_accumulators_is_the_one_that_took_the_steps(name):
    net, rule = SMALL[name], FedKSeed(lr=0.02, pool=POOL)
    models, accumulated = run(rule, net, torch.float32)
    pool = Directions.of_pool(7, POOL)
    for model, total in zip(models, accumulated, strict=True):  # whoever comes late needs the last ones alone
        params = rule.init(net, seed=1).params
        for p in range(POOL):
            pool.add(params, p, -rule.lr * total[p], rule.chunk)
        assert (flat(params) - model).abs().max() < 2e-6
    assert (models[-1] - flat(rule.init(net, seed=1).params)).abs().max() > 1e-2


def test_of_a_gradient_a_pool_shows_the_share_of_its_dimensions():
    net = SMALL["lenet"]  # 163 parameters
    shares, d = [], 163
    for seed in range(40):
        state, b = problem(FedKSeed(), net, seed)
        truth = gradient(state.params, b, lambda params: net.forward(params, b.x))  # noqa: B023
        pool = signs(state.params, Directions.of_pool(seed, POOL), POOL)
        shares.append((torch.linalg.pinv(pool) @ (pool @ truth)).norm() / truth.norm())
    assert float(torch.stack(shares).square().mean()) ** 0.5 == pytest.approx((POOL / d) ** 0.5, rel=0.1)


def test_the_candidate_of_a_step_follows_from_its_place_and_clients_take_their_own():
    rule = FedKSeed()
    places = [Place(1, t, client, s) for t in range(1, 5) for client in range(5) for s in range(50)]
    taken = [rule.draw(place, 0, 0).candidates[0] for place in places]
    assert taken == [rule.draw(place, 9, 9).candidates[0] for place in places]
    assert all(0 <= k < 1024 for k in taken)
    # A thousand throws into 1024 boxes leave 1024 (1 − 1/1024)^1000 = 385.4 of them empty, give or take 10.
    assert abs(1024 - len(set(taken)) - 385.4) < 40
    assert ScalarRule.numbers.fget(rule) == 1


def test_it_needs_what_spsa_needs_and_sends_one_number_a_step():
    plans = planner("lenet")
    ours, spsa = (plans.step(rule, 64) for rule in (FedKSeed(), SPSA()))
    assert (ours.peak, ours.bytes_up) == (spsa.peak, spsa.bytes_up)
    assert ours.peak == plans.forward(64).peak + 8


@pytest.mark.slow  # as spsa's
def test_a_hundred_steps_on_the_digits_take_a_sixth_off_the_loss():
    losses = digits_losses(FedKSeed(lr=0.06, directions=16), network("mlp-tanh"), 100)
    assert losses[0] > 2.2 and losses[-1] < 5 / 6 * losses[0]


def test_impossible_settings_are_refused():
    with pytest.raises(RuleError, match="or spsa for new directions"):
        FedKSeed(pool=0)
    with pytest.raises(RuleError, match="a pool of 8 has not 9 directions"):
        FedKSeed(pool=8, directions=9)
