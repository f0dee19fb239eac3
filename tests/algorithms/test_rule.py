"""The contract, kept by every rule: padding, vmap, replay, and that it learns."""

import random
from contextlib import suppress
from dataclasses import replace

import numpy as np
import pytest
import torch
from cases import (
    ALIKE,
    CLASSES,
    NETS,
    RULES,
    assert_close,
    batch,
    copied,
    double,
    equal,
    network,
    nonuniform,
    step,
    taken,
    takes,
)
from fedforward import algorithms
from fedforward.algorithms import (
    DFA,
    Backprop,
    Batch,
    ForwardForward,
    MonoForward,
    ProductFeedbackAlignment,
    RuleError,
    ScalarRule,
    State,
    Stats,
)
from fedforward.algorithms.seeds import Place


def pairs(*nets):
    """Return rules and networks to parametrise by: those that are alike on further networks with the slow tests."""
    return [
        pytest.param(rule, net, marks=[pytest.mark.slow] * (rule in ALIKE and net != "mlp"))
        for rule in RULES
        for net in nets
        if takes(RULES[rule], network(net))
    ]


ALL = pairs("mlp", "lenet", "cnn-group")


def test_every_rule_is_tested_here():
    assert {type(rule) for rule in RULES.values()} == set(algorithms.RULES.values())
    assert all(rule.name == name and rule.paper and rule.__doc__ for name, rule in algorithms.RULES.items())


SIDE_BY_SIDE = [name for name, rule in RULES.items() if rule.stackable(network("mlp"))]


def test_closed_forms_are_what_trains_side_by_side():
    assert {RULES[name].name for name in SIDE_BY_SIDE} == {
        "backprop-fused", "mono-forward", "dfa", "feedback-alignment", "sign-symmetry", "product-feedback-alignment",
        "pepita", "drtp", "target-projection", "predictive-coding", "equilibrium-propagation", "knowledge-accumulation",
    }  # fmt: skip
    assert not any(rule.stackable(network(net)) for rule in RULES.values() for net in ("lenet", "cnn-group"))
    assert not MonoForward(optimizer="adam").stackable(network("mlp"))

    class Own(MonoForward):
        def update(self, state, grads, lr):
            super().update(state, grads, lr)

    assert not Own().stackable(network("mlp")), "what it does of its own may be another thing"


@pytest.mark.parametrize("name", SIDE_BY_SIDE)
def test_replicas_side_by_side_learn_what_each_learns_alone(name):
    rule, net = RULES[name], network("mlp")
    with suppress(RuleError):  # one that finds its own steps
        rule = replace(rule, momentum=0.5, weight_decay=0.1)
    alone = [double(rule.init(net, seed)) for seed in range(3)]
    fixed = alone[0].fixed
    stacked = State(
        *(
            {key: torch.stack([getattr(state, part)[key] for state in alone]) for key in getattr(alone[0], part)}
            for part in ("params", "fixed", "slots")
        )
    )._replace(fixed=fixed)
    for s in range(2):
        batches = [nonuniform(batch(rule, 5, seed=c, step=s)) for c in range(3)]
        filled = 3 if batches[0].draws is None else 4
        whole = Batch(*(torch.stack(column) for column in zip(*(b[:filled] for b in batches), strict=True)))
        stats = rule.step(net, stacked, whole._replace(x=whole.x.flatten(2)), 0.1)
        found = [rule.step(net, state._replace(fixed=fixed), b, 0.1) for state, b in zip(alone, batches, strict=True)]
        for c in range(3):
            assert_close({n: v[c] for n, v in stats._asdict().items()}, found[c]._asdict(), atol=1e-12)
            for part in ("params", "slots"):
                own = {key: t[c] for key, t in getattr(stacked, part).items()}
                assert_close(own, getattr(alone[c], part), atol=1e-12)


@pytest.mark.parametrize("rule, net", ALL)
def test_a_sample_of_weight_0_changes_nothing(rule, net):
    rule, net = RULES[rule], network(net)
    state = double(rule.init(net, seed=1))
    padded = copied(state)
    for s in range(2):  # the second step sees the optimizer's memory of the first
        plain = batch(rule, 5, step=s)
        junk = batch(rule, 8, seed=9, step=s)
        longer = Batch(
            torch.cat([plain.x, 100 * junk.x[5:]]),
            torch.cat([plain.y, junk.y[5:]]),
            torch.cat([plain.weight, torch.zeros(3, dtype=torch.float64)]),
            torch.cat([plain.draws, junk.draws[5:]]) if isinstance(plain.draws, torch.Tensor) else plain.draws,
        )
        stats, padded_stats = step(rule, net, state, plain), step(rule, net, padded, longer)
        assert_close(padded_stats._asdict(), stats._asdict(), atol=1e-12)
    assert_close(padded.params, state.params, atol=1e-12)
    assert_close(padded.slots, state.slots, atol=1e-12)


@pytest.mark.parametrize("rule, net", ALL + pairs("mlp-tanh", "flat"))
def test_vmap_over_clients_is_the_loop_over_clients(rule, net):
    rule, net, clients = RULES[rule], network(net), 3
    assert rule.vmappable
    if isinstance(rule, ScalarRule):
        rule = replace(rule, own=False)  # who steps together shares directions
    start = double(rule.init(net, seed=1))
    batches = [[batch(rule, step=s, client=c) for c in range(clients)] for s in range(2)]
    looped = [copied(start) for _ in range(clients)]
    looped_stats = [[step(rule, net, looped[c], row[c]) for c in range(clients)] for row in batches]

    params, slots = (
        {key: torch.stack([p] * clients) for key, p in part.items()} for part in (start.params, start.slots)
    )
    for row, wanted in zip(batches, looped_stats, strict=True):
        batched = isinstance(row[0].draws, torch.Tensor)
        x, y, weight = (torch.stack([b[i] for b in row]) for i in range(3))
        draws = torch.stack([b.draws for b in row]) if batched else torch.zeros(clients)

        def run(params, slots, x, y, weight, draws, shared=None if batched else row[0].draws):
            state = State(params, start.fixed, slots)  # fixed matrices are shared by all clients
            return step(rule, net, state, Batch(x, y, weight, draws if shared is None else shared))

        stats = torch.func.vmap(run)(params, slots, x, y, weight, draws)
        assert_close(stats._asdict(), Stats(*map(torch.stack, zip(*wanted, strict=True)))._asdict(), atol=1e-9)
    for c, state in enumerate(looped):
        assert_close({key: p[c] for key, p in params.items()}, state.params, atol=1e-9)
        assert_close({key: p[c] for key, p in slots.items()}, state.slots, atol=1e-9)


@pytest.mark.parametrize("rule", RULES)
def test_equal_seeds_give_equal_bits_and_other_seeds_other_ones(rule):
    rule, net = RULES[rule], taken(RULES[rule])
    a, b, other = rule.init(net, seed=1), rule.init(net, seed=1), rule.init(net, seed=2)
    assert all(equal(x, y) for x, y in zip(a, b, strict=True))
    drawn = [
        key
        for part in (a.params, a.fixed)
        for key, p in part.items()
        if not p.is_floating_point() or p.std(correction=0) > 0
    ]
    assert len(drawn) >= 2
    assert not any(torch.equal((a.params | a.fixed)[key], (other.params | other.fixed)[key]) for key in drawn)


@pytest.mark.parametrize("rule", RULES)
def test_no_tensor_of_a_state_holds_on_to_more_than_itself(rule):
    for part in RULES[rule].init(taken(RULES[rule]), seed=1):
        for key, p in part.items():
            assert p.untyped_storage().nbytes() == p.numel() * p.element_size(), f"{key} is a view"


@pytest.mark.parametrize("rule", RULES)
def test_draws_are_a_function_of_their_place(rule):
    rule, place = RULES[rule], Place(1, 2, 3, 4)
    drawn = [rule.draw(p, 64, CLASSES) for p in (place, place, place._replace(step=5), place._replace(round=5))]
    if isinstance(drawn[0], torch.Tensor):
        drawn = [d.tolist() for d in drawn]
    assert drawn[0] == drawn[1]
    assert drawn[0] is None or drawn[0] != drawn[3]
    reads_the_round_alone = isinstance(rule, ProductFeedbackAlignment)
    assert drawn[0] is None or (drawn[0] == drawn[2]) == reads_the_round_alone
    if isinstance(rule, ScalarRule):  # the server must make shared directions without knowing the client
        assert (rule.draw(place._replace(client=-1), 0, 0) == drawn[0]) == (not rule.own)


@pytest.mark.parametrize("rule", RULES)
def test_the_global_generators_are_left_alone(rule):
    rule, net = RULES[rule], taken(RULES[rule])

    def states():
        return torch.get_rng_state().tolist(), str(np.random.get_state()), random.getstate()  # noqa: NPY002

    b = batch(rule, dtype=torch.float32)
    before = states()
    state = rule.init(net, seed=1)
    rule.draw(Place(1, 2, 3, 4), 6, CLASSES)
    step(rule, net, state, b)
    rule.logits(net, state, b.x)
    assert states() == before


@pytest.mark.parametrize("rule, net", pairs(*NETS))
def test_a_replay_of_steps_gives_the_same_bits_in_place(rule, net):
    rule, net = RULES[rule], network(net)
    a, b = rule.init(net, seed=1), rule.init(net, seed=1)
    storages = {key: p.data_ptr() for key, p in a.params.items()}
    start = copied(a).params
    for state in (a, b):
        for _ in range(2):
            step(rule, net, state, batch(rule, dtype=torch.float32))
    assert equal(a.params, b.params) and equal(a.slots, b.slots)
    assert {key: p.data_ptr() for key, p in a.params.items()} == storages
    assert not any(p.requires_grad for p in a.params.values())
    assert all(not torch.equal(a.params[key], p) for key, p in start.items())


def test_an_unknown_optimizer_is_refused():
    for rule in (Backprop, MonoForward, ForwardForward, DFA):
        with pytest.raises(ValueError, match="unknown optimizer 'lion'"):
            rule(optimizer="lion")
