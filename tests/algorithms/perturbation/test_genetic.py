"""The best child replaces its parent or none does, and a chain of winners is the model."""

import itertools
from math import log

import pytest
import torch
from cases import copied, equal, network
from cases import weighted_cross_entropy as cross_entropy
from estimates import MOSTLY_SLOW, SMALL, digits_losses, flat, gradient, mean_cosine, planner, problem, signs
from fedforward.algorithms import Genetic, RuleError
from fedforward.algorithms.directions import SHARED
from fedforward.algorithms.replica import Answer, Replica, ScalarRound, passed_on
from fedforward.algorithms.seeds import Place
from fedforward.scalar_wire import encode_round

K = 6


def moved(rule, losses, weights):
    return rule.coefficients(rule.pass_on(losses, weights), weights)


@pytest.mark.parametrize("name", MOSTLY_SLOW)
def test_a_step_takes_the_best_child_or_keeps_the_elite(name):
    net, kept = SMALL[name], 0
    for seed in range(10):
        for lr in (0.01, 0.3, 2.0):
            rule = Genetic(lr=lr, directions=K)
            state, b = problem(rule, net, seed)
            members = [copied(state) for _ in range(K + 1)]
            for k in range(K):
                b.draws.add(members[k + 1].params, k, lr, 4096)
            losses = [float(cross_entropy(net.forward(m.params, b.x), b)) for m in members]
            best = min(range(K + 1), key=losses.__getitem__)
            fitness, stats = rule.probe(net, state, b, lr)
            assert fitness.tolist() == pytest.approx(losses, rel=1e-9)
            assert float(stats.loss / stats.weight) == pytest.approx(losses[0], rel=1e-9)
            rule.apply(state, b.draws, fitness, lr)
            torch.testing.assert_close(flat(state.params), flat(members[best].params), rtol=0, atol=1e-12)
            kept += best == 0
    assert 0 < kept < 30


@pytest.mark.parametrize("name", MOSTLY_SLOW)
def test_the_best_of_many_small_mutations_goes_as_far_downhill_as_the_largest_of_many_normal_numbers(name):
    # Its cosine with −g is that of the steepest of K random directions: E max of K normal numbers, over √d.
    net, k, lr, found = SMALL[name], 12, 1e-5, []
    for seed in range(150):
        rule = Genetic(lr=lr, directions=k)
        state, b = problem(rule, net)
        b = b._replace(draws=rule.draw(Place(seed, 0, 0, 0), 7, 3))
        c = moved(rule, rule.probe(net, state, b, lr)[0][None], torch.ones(1).double())[0]
        found.append(c @ signs(state.params, b.draws, k))
    truth = gradient(state.params, b, lambda params: net.forward(params, b.x))
    largest = float(torch.randn(100_000, k, generator=torch.Generator().manual_seed(0)).max(1).values.mean())
    assert mean_cosine(torch.stack(found), truth) == pytest.approx(largest / len(truth) ** 0.5, rel=0.1)
    assert 1 < largest < (2 * log(k)) ** 0.5


def test_a_chain_of_winners_is_the_model_bit_for_bit():
    net, rule = network("lenet"), Genetic(directions=K)
    state, genome = rule.init(net, seed=1), []
    _, b = problem(rule, net)
    b = b._replace(x=b.x.float(), weight=b.weight.float())
    other = copied(state)
    for t in range(8):
        draws = rule.draw(Place(3, t, 0, 0), 7, 10)
        fitness, _ = rule.probe(net, copied(state), b._replace(draws=draws), rule.lr)
        rule.apply(state, draws, fitness, rule.lr)
        genome.append((draws, int(fitness.argmin()) - 1))
    for draws, winner in genome:
        if winner >= 0:
            draws.add(other.params, winner, rule.lr, rule.chunk)
    assert equal(state.params, other.params) and len({winner for _, winner in genome}) > 2


def test_of_clients_with_children_of_their_own_the_largest_weighed_gain_wins():
    rule = Genetic(directions=2)
    losses = torch.tensor([[2.0, 1.0, 1.9], [5.0, 4.5, 2.0]])  # parent and two children each
    assert moved(rule, losses, torch.tensor([0.5, 0.5])).tolist() == [[0, 0], [0, -1]]
    assert moved(rule, losses, torch.tensor([0.9, 0.1])).tolist() == [[-1, 0], [0, 0]]
    assert moved(rule, losses, torch.tensor([1.0, 0.0])).tolist() == [[-1, 0], [0, 0]]
    assert not moved(rule, torch.tensor([[1.0, 1.0, 1.5]]), torch.ones(1)).any()  # no better is not better


@pytest.mark.parametrize("own", [False, True])
def test_one_number_a_generation_is_passed_on_and_makes_the_same_model(own):
    rule, net = Genetic(directions=K, own=own), network("lenet")
    state, server = rule.init(net, seed=1), Replica(rule, 3, copied(rule.init(net, seed=1)).params)
    losses = torch.tensor([[2.0, 1.9, 1.5, 2.5, 2.0, 3.0, 2.0], [1.0, 1.0, 1.2, 1.1, 1.0, 0.9, 1.0]])
    answers = [Answer(i if own else SHARED, 1.0, row) for i, row in enumerate(losses[: 1 + own].repeat(1, 2))]
    entry = ScalarRound(1, 0.5, passed_on(rule, answers))  # of two steps
    assert [answer.scalars.tolist() for answer in entry.answers] == [[2.0, 2.0], [0.0, 0.0]][: 1 + own]
    assert len(encode_round(entry)) == 16 + (12 + 2 * 4) * (1 + own)
    server.take(entry)
    for step in range(2):
        rule.draw(Place(3, 1, 0, step), 7, 10).add(state.params, 1, 0.5, rule.chunk)
    assert equal(server.current(), state.params)


def test_a_step_needs_what_inference_needs_and_its_answers():
    plans = planner("lenet")
    inference = plans.forward(64).peak
    for k in (2, 12, 32):
        plan = plans.step(Genetic(directions=k), 64)
        assert plan.peak == inference + 4 * (k + 4)
        assert plan.flops == (k + 1) * plans.forward(64).flops


def test_fifty_generations_on_the_digits_take_a_sixth_off_the_loss_which_never_rises():
    losses = digits_losses(Genetic(directions=24), network("mlp-tanh"), 50)
    assert losses[0] > 2.2 and losses[-1] < 5 / 6 * losses[0]
    assert all(after <= before + 1e-5 for before, after in itertools.pairwise(losses))


def test_impossible_settings_are_refused():
    with pytest.raises(RuleError, match="genetic needs directions, chunk and abreast ≥ 1"):
        Genetic(directions=0)
