"""Scalars over a wire that loses, repeats, delays and garbles: whoever follows ends where the server is."""

import random

import pytest
import torch
from fedforward import protocol
from fedforward.algorithms import RuleError
from fedforward.algorithms.directions import SHARED
from fedforward.scalar_wire import encode_answer
from fedforward.simulations.engines.inline import InlineGrid
from flwr.app import ConfigRecord
from small_runs import simulate, small_world
from wire_runs import Federation

RULES = {
    "shared": {"directions": 3},
    "own": {"directions": 2, "own": True},
    "pool": {"directions": 2, "pool": 24, "momentum": 0.9, "weight_decay": 0.01},
    "pool drawn anew": {"directions": 2, "own": True, "pool": 16, "rebase": 30},
}


def world(rule="baffle", clients=20, **options):
    return small_world(
        rule=rule, clients=clients, batch_size=4, local_steps=2, set={"rule": options, "model": {"hidden": [8]}}
    )


@pytest.mark.parametrize(
    "name", ["shared", "pool drawn anew", *(pytest.param(name, marks=pytest.mark.slow) for name in ("own", "pool"))]
)
def test_who_joins_late_who_missed_fifty_rounds_and_who_was_always_there_hold_the_servers_model(name):
    """200 rounds of 2 of 20 clients; 1 is always there, 2 not in rounds 100 – 149, 20 joins when all is over."""
    federation, draws = Federation(world(**RULES[name])), random.Random(0)
    for number in range(1, 201):
        others = [2] if number < 100 or number >= 150 else [draws.randrange(3, 20)]
        federation.round([1, *others], lr=0.01 / (1 + number / 100))
    assert federation.strategy.held.get(20) is None
    one, two, late = federation.bring([1, 2, 20])
    assert one == two == late == federation.server()
    assert federation.server() != Federation(world(**RULES[name])).server()


@pytest.mark.parametrize("name", ["shared", "pool"])
def test_the_hash_does_not_depend_on_threads(name):
    """The bits of the scalars may, so one run's history is replayed on one thread and on four."""
    federation = Federation(small_world(rule="baffle", set={"rule": RULES[name], "model": {"hidden": [400, 100]}}))
    for _ in range(3):
        federation.round([1, 2])
    found, threads = set(), torch.get_num_threads()
    try:
        for node, count in ((3, 1), (4, 4)):
            torch.set_num_threads(count)
            found |= set(federation.bring([node]))
    finally:
        torch.set_num_threads(threads)
    assert found == {federation.server()}


# ---- what comes back ------------------------------------------------------------------------------------------------


def scalars(reply):
    return protocol.scalars_of(reply)


def altered(reply, values):
    reply.content[protocol.SCALARS] = ConfigRecord({"values": values})
    return reply


def garbled(reply):
    data = bytearray(reply.content[protocol.SCALARS]["values"])
    data[20] ^= 4
    return altered(reply, bytes(data))


def with_scalars(change):
    def alter(reply):
        server_round, fingerprint, values = scalars(reply)
        return altered(reply, encode_answer(change(values.clone()), server_round, fingerprint))

    return alter


def set_first(value):
    def change(values):
        values[0] = value
        return values

    return with_scalars(change)


def of_another_model(reply):
    server_round, _, values = scalars(reply)
    return altered(reply, encode_answer(values, server_round, b"otherone"))


def saying(**metrics):
    def alter(reply):
        (record,) = reply.content.metric_records.values()
        for name, value in metrics.items():
            record[name.replace("_", "-")] = value
        return reply

    return alter


def silent(reply):
    (record,) = reply.content.metric_records.values()
    del record["steps"]
    return reply


def without(reply):
    del reply.content[protocol.SCALARS]
    return reply


CORRUPT = {
    "a bit": (garbled, "checksum"),
    "not a number": (set_first(float("nan")), "1 of 6 scalars are not finite"),
    "infinite": (set_first(float("inf")), "1 of 6 scalars are not finite"),
    "out of range": (set_first(2e6), "beyond strategy.limit"),
    "too few": (with_scalars(lambda values: values[:-1]), "5 scalars, where 2 steps give 6"),
    "of another model": (of_another_model, "another model"),
    "none": (without, "no scalars"),
    "of no steps": (lambda reply: with_scalars(lambda values: values[:0])(saying(steps=0.0)(reply)), "taken 0 steps"),
    "of samples that are no number": (saying(num_examples=float("nan")), "on nan samples"),
    "of no client": (saying(partition_id=1e12), "client 1e+12 cannot have"),
    "without steps": (silent, "does not say how many steps"),
    "of endless steps": (saying(steps=float("inf")), "taken inf steps"),
    "of half a step": (saying(steps=1.5), "taken 1.5 steps"),
    "of too many samples for a float": (saying(num_examples=1e300), "on 1e+300 samples"),
    "of another version": (saying(fit=[0.0, 4096.0, 0.0]), "give both one version"),
    "of a rule beyond the ladder": (saying(fit=[0.0, 1.0, 4096.0, 99.0]), "give both one version"),
    "of no known work": (saying(flops=float("nan")), "is not finite"),
}


@pytest.mark.parametrize("name", CORRUPT)
def test_a_corrupt_answer_is_refused_and_the_run_is_as_if_it_had_not_come(name):
    change, words = CORRUPT[name]
    run, undisturbed = Federation(world(directions=3)), Federation(world(directions=3))
    for federation in (run, undisturbed):
        federation.round([1, 2, 3])
    replies = [run.answer(message) for message in run.ask([1, 2, 3]).values()]
    refused = run.end([replies[0], change(replies[1]), replies[2]])
    assert refused[0] is refused[2] is None and refused[1].startswith("answer refused: ") and words in refused[1]
    assert run.strategy.held[1] == run.strategy.held[3] == 1 and 2 not in run.strategy.held
    messages = undisturbed.ask([1, 2, 3])
    undisturbed.end([undisturbed.answer(messages[node]) for node in (1, 3)])
    assert run.server() == undisturbed.server()
    for federation in (run, undisturbed):
        federation.round([1, 2, 3])
    assert run.server() == undisturbed.server() == run.bring([2])[0]


def test_an_answer_that_comes_twice_counts_once_and_one_of_an_earlier_round_not_at_all():
    run, undisturbed = Federation(world(directions=3)), Federation(world(directions=3))
    messages = run.ask([1, 2, 3])
    late = run.answer(messages[3])
    run.end([run.answer(messages[1]), run.answer(messages[2])])
    replies = [run.answer(message) for message in run.ask([1, 2]).values()]
    refused = run.end([replies[0], late, replies[1], replies[0]])
    assert refused == [None, "answer refused: it answers round 1", None, None]
    messages = undisturbed.ask([1, 2, 3])
    undisturbed.end([undisturbed.answer(messages[node]) for node in (1, 2)])
    undisturbed.round([1, 2])
    assert run.server() == undisturbed.server()


def test_the_order_of_answers_does_not_matter_to_a_run(tmp_path):
    class Backwards(InlineGrid):
        def in_order(self, messages):
            return super().in_order(messages)[::-1]

    w = world(clients=5, directions=3)
    ends = [simulate(w, tmp_path / grid.__name__, grid=grid) for grid in (InlineGrid, Backwards)]
    assert all((ends[0][key].numpy() == ends[1][key].numpy()).all() for key in ends[0])


def test_refused_answers_are_recorded_and_a_second_answer_is_passed_over(tmp_path):
    from fedforward.server.records import read_run

    class Bad(InlineGrid):
        def stream(self, messages, **options):
            for i, reply in enumerate(super().stream(messages, **options)):
                train = protocol.SCALARS in reply.content
                yield set_first(float("nan"))(reply) if train and i == 1 else reply
                if train and i == 2:
                    yield reply

    simulate(world(clients=5, directions=3), tmp_path, grid=Bad)
    rows = read_run(tmp_path).clients
    assert rows["status"].value_counts().to_dict() == {"ok": 8, "failed": 2} and len(rows) == 10
    assert set(rows[rows["status"] == "failed"]["reason"]) == {"answer refused: 1 of 6 scalars are not finite"}


# ---- what is sent ---------------------------------------------------------------------------------------------------


def test_a_message_that_comes_twice_is_taken_once():
    federation = Federation(world(directions=3))
    federation.round([1, 2])
    message = federation.ask([1])[1]
    first, second = federation.answer(message), federation.answer(message)
    assert scalars(first)[1] == scalars(second)[1] and torch.equal(scalars(first)[2], scalars(second)[2])
    assert federation.held(1) == federation.server()


@pytest.mark.parametrize("name", RULES)
def test_messages_in_the_wrong_order_leave_the_client_where_the_later_brought_it(name):
    federation = Federation(world(**RULES[name]))
    federation.round([1, 2])
    earlier = federation.ask([1])[1]
    federation.end([])
    later = federation.ask([1])[1]
    assert federation.answer(later).has_content()
    server_round, found_at, _ = scalars(federation.answer(earlier))
    assert federation.held(1) == federation.server() == found_at and server_round == 2  # an answer that will be refused


def test_a_client_that_lost_what_it_held_says_so_and_is_given_more():
    federation = Federation(world(directions=3))
    for _ in range(3):
        federation.round([1, 2])
    federation.nodes.states.pop(1)
    message = federation.ask([1])[1]
    reply = federation.answer(message)
    assert reply.error.code == protocol.OUT_OF_STEP
    assert reply.error.reason == "cannot follow the server: it holds round 0, and is told of round 3"
    federation.end([reply])
    federation.round([1])
    assert federation.held(1) != federation.server() and federation.bring([1]) == [federation.server()]


def test_a_garbled_message_is_refused_and_the_client_keeps_what_it_holds():
    federation = Federation(world(directions=3))
    federation.round([1])
    before = federation.held(1)
    message = federation.ask([1])[1]
    data = message.content[protocol.NEWS]["values"]
    message.content[protocol.NEWS] = ConfigRecord({"values": data[:50] + b"?" + data[51:]})
    reply = federation.answer(message)
    assert reply.error.code == protocol.OUT_OF_STEP and "checksum" in reply.error.reason
    assert federation.held(1) == before
    federation.end([reply])
    federation.round([1])
    assert federation.bring([1]) == [federation.server()]


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"set": {"rule": {"sigma": 0.01}}}, "perturbs by sigma 0.001, this client by 0.01"),
        ({"set": {"model": {"hidden": [9]}}}, "the server has 610 parameters, this client 685"),
    ],
)
def test_a_client_of_other_terms_says_what_differs(changes, words):
    options = {"rule": {"directions": 3}, "model": {"hidden": [8]}}
    federation = Federation(small_world(rule="baffle", set=options))
    other = Federation(small_world(rule="baffle", set=options | changes["set"]))
    reply = other.answer(federation.ask([1])[1])
    assert reply.error.code == protocol.OUT_OF_STEP and words in reply.error.reason


def test_a_model_that_no_seed_gives_is_sent_once():
    w = world(directions=3)
    federation = Federation(w)
    federation.strategy.known = False
    federation.arrays = protocol.encode_params({k: p + 0.5 for k, p in w.trainer.initial_params().items()})
    first = federation.round([1])[1]
    assert protocol.ARRAYS in first.content and protocol.ARRAYS not in federation.round([1])[1].content
    assert federation.bring([1, 2]) == [federation.server()] * 2


def test_bytes_down_are_those_of_what_crosses_the_wire(tmp_path):
    """In the server's own process nothing is decoded, and what is counted is what a device would be sent."""
    from fedforward.server.records import read_run

    w = small_world(rule="baffle", rounds=6, clients_per_round=2, local_steps=2, set={"rule": {"directions": 3}})
    simulate(w, tmp_path)
    counted = read_run(tmp_path).clients
    evaluated = set(range(1, 7))  # every client evaluates every model, and so misses nothing
    assert evaluated and (counted[counted["round"] > 1]["bytes_down"] == counted["bytes_down"].iloc[-1]).all()
    config = protocol.train_config(server_round=1, lr=0.1, epochs=1, batch_size=1, steps=2, evaluate=True)
    assert counted["bytes_down"].iloc[0] == len("values") + 44 - 8 + config.count_bytes()


# ---- settings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, rule, words",
    [
        ({"aggregate": "mode"}, {}, "use mean, median, trimmed-mean or krum"),
        ({"aggregate": "median"}, {"own": True}, "leave rule.own out"),
        ({"trim": 0.5}, {}, "trim must be"),
        ({"ema": 0.9}, {}, "set rule.pool"),
        ({}, {"momentum": 0.9}, "set rule.pool too"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(options, rule, words):
    with pytest.raises((RuleError, ValueError), match=words):
        small_world(rule="baffle", set={"rule": rule, "strategy": options})


def test_clipping_and_the_robust_averages_are_what_is_applied(tmp_path):
    robust = [{"aggregate": name} for name in ("median", "krum", "trimmed-mean")]
    for options in ({"clip": 1e-3}, {"normalize": True}, *robust):
        w = small_world(rule="baffle", rounds=1, set={"rule": {"directions": 3}, "strategy": options})
        strategy = w.strategy()
        simulate(w, tmp_path / next(iter(options.values())).__str__(), strategy=strategy)
        ((client, _, averaged),) = strategy.taken.answers
        assert client == SHARED and averaged.isfinite().all()
        if "clip" in options:
            assert averaged.abs().max() <= 1e-3 * (1 + 1e-6)
        if "normalize" in options:
            assert averaged.square().mean() == pytest.approx(1)


def test_an_unstable_run_is_warned_of(caplog):
    w = small_world(rule="baffle", lr=1.0, set={"rule": {"directions": 3}})
    Federation(w).ask([1], lr=1.0)
    assert "above 1.5 runs diverge" in caplog.text
    caplog.clear()
    Federation(w).ask([1], lr=0.01)
    assert "diverge" not in caplog.text
