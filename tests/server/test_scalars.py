"""What the server makes of scalars: averages, the rounds it remembers, and the fewest bytes that bring a client on."""

import pytest
import torch
from fedforward import message_bytes, protocol
from fedforward.algorithms import SPSA, Baffle
from fedforward.algorithms.replica import Answer, Replica, ScalarRound, fingerprint, rebuild, shared
from fedforward.client.following import follow
from fedforward.scalar_wire import decode_round
from fedforward.server.records import Records, read_run
from fedforward.server.rounds import model_hash
from fedforward.server.scalars import UNKNOWN, History, average, krum, median, most_worth_telling, trimmed
from fedforward.simulations.engines.local import assume_identity
from flwr.app import Message, RecordDict
from small_runs import simulate, small_world

K = 3


def answers(*rows, weights=None):
    weights = weights or [1.0] * len(rows)
    return [Answer(i, weight, torch.tensor(row)) for i, (row, weight) in enumerate(zip(rows, weights, strict=True))]


def test_average_weighs_by_samples_and_by_who_took_the_step():
    one, two = answers([1.0, 2.0, 3.0, 4.0], [5.0, 10.0], weights=[3.0, 1.0])  # the second took half as many steps
    assert average([one, two]).tolist() == [(3 + 5) / 4, (6 + 10) / 4, 3.0, 4.0]
    assert average([two, one]).tolist() == average([one, two]).tolist()


def test_average_is_summed_in_float64():
    assert average(answers([1e8], [1.0], [-1e8])).item() == pytest.approx(1 / 3)


def test_robust_averages_bear_liars():
    honest = [[1.0, -2.0], [1.1, -2.1], [0.9, -1.9], [1.05, -2.05], [0.95, -1.95]]
    lies = [[1e6, 1e6], [-1e6, 1e6]]
    assert median(answers(*honest)).tolist() == pytest.approx([1.0, -2.0])
    for robust in (median, lambda found: trimmed(found, 0.3), lambda found: krum(found, 2)):
        got = robust(answers(*lies, *honest)).tolist()
        assert 0.9 <= got[0] <= 1.1 and -2.1 <= got[1] <= -1.9
    assert abs(average(answers(*lies, *honest))[1]) > 1e5  # which the mean does not


def test_a_trimmed_mean_without_trimming_is_the_mean_and_all_take_unequal_steps():
    uneven = answers([1.0, 2.0, 7.0], [3.0, 6.0], [5.0, 1.0])
    assert trimmed(uneven, 0.0).tolist() == average(uneven).tolist() == [3.0, 3.0, 7.0]
    assert median(uneven).tolist() == [3.0, 2.0, 7.0]
    assert krum(answers([0.0, 0.0], [0.1, 0.0, 9.0], [0.2, 0.0], [50.0, 0.0]), 1).tolist()[0] in (
        0.0,
        pytest.approx(0.1),
    )


# ---- the least that brings a client on -----------------------------------------------------------------------------


def model():
    return {"0.weight": torch.linspace(-1, 1, 600).view(30, 20), "0.bias": torch.zeros(20)}


def play(rule, rounds, scalars, known=True):
    """Return (history, replica) after so many rounds of as many shared scalars, kept as the strategy keeps them."""
    replica, history = Replica(rule, 5, model()), History(rule, model(), known)
    for number in range(1, rounds + 1):
        values = torch.randn(scalars, generator=torch.Generator().manual_seed(number))
        replica.take(entry := shared(number, 0.01, values))
        history.add(entry, most_worth_telling(replica))
    return history, replica


def message(replica):
    config = protocol.train_config(server_round=1, lr=0.1, epochs=1, batch_size=1, evaluate=True)
    return RecordDict({"arrays": protocol.encode_params(replica.current()), "config": config})


RULES = {
    "new directions": SPSA(directions=10),
    "pool": SPSA(directions=10, pool=64),
    "pool with momentum": SPSA(directions=10, pool=64, momentum=0.9, weight_decay=0.01),
    "pool drawn anew": SPSA(directions=10, pool=32, rebase=7),
}


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("name", RULES)
def test_the_way_taken_is_the_shortest_of_all_that_lead_there(name, known):
    """A table of lags: each way is walked, ends in the server's model, and none is shorter than the one taken."""
    rule, kinds = RULES[name], set()
    for rounds in (1, 5, 20, 80):
        history, replica = play(rule, rounds, 10, known)
        for held in sorted({UNKNOWN, 0, rounds // 2, rounds - 3, rounds - 1, rounds} & set(range(UNKNOWN, rounds + 1))):
            content = message(replica)
            taken, ways = history.news(held, replica, content), history.ways(held, replica, content)
            assert message_bytes.payload_bytes(taken) == min(map(message_bytes.payload_bytes, ways))
            kinds.add(tuple(taken))
            for way in ways:
                follower, state = Replica(rule, 5, model()), RecordDict()
                if held > 0:
                    earlier, own = play(rule, held, 10, known)
                    walk(earlier.ways(UNKNOWN, own, content)[-1], state, rule)
                    assert follower.done == 0
                params, seen = walk(way, state, rule)
                assert seen == fingerprint(replica.current())
                assert all(torch.equal(params[key], p) for key, p in replica.current().items())
    if name == "new directions":
        assert kinds == {("news", "config"), ("arrays", "news", "config")}  # the model after many rounds, not after few


def walk(content, state, rule):
    assume_identity()
    return follow(Message(content, dst_node_id=1, message_type="train"), state, lambda: Replica(rule, 5, model()))


def test_what_is_remembered_never_outgrows_what_else_could_be_sent():
    for name, most in (("new directions", 4 * 620), ("pool", 20 + 4 * 64), ("pool drawn anew", 4 * 620 + 20 + 4 * 32)):
        history, replica = play(RULES[name], 200, 10)
        assert most_worth_telling(replica) == most
        assert most - 68 < sum(map(len, history._rounds)) <= most  # a round takes 16 + 12 + 4 · 10 bytes


# ---- whole runs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{}, {"own": True}, {"pool": 16}, {"pool": 16, "own": True, "momentum": 0.5, "rebase": 2}],
    ids=["shared", "own", "pool", "own pool"],
)
@pytest.mark.parametrize("partition", ["iid", "dirichlet:0.4"])  # the second: clients of unequal numbers of steps
def test_the_servers_model_is_rebuilt_bit_for_bit_from_its_log(tmp_path, partition, options):
    world = small_world(
        rule="baffle", rounds=3, partition=partition, clients_per_round=3, lr_schedule="linear",
        set={"rule": {"directions": K, **options}},
    )  # fmt: skip
    simulate(world, tmp_path)
    run, records = read_run(tmp_path), Records(tmp_path)
    log = [decode_round(blob) for _, blob in records.scalars()]
    records.close()
    assert [entry.round for entry in log] == [1, 2, 3] and log[0].lr > log[2].lr
    params = rebuild(world.trainer.rule, world.experiment.seed, world.trainer.initial_params(), log)
    assert model_hash(protocol.encode_params(params)) == run.rounds["model_sha256"].iloc[-1]

    sent = run.clients
    assert sent["bytes_up"].tolist() == [message_bytes.scalar_uplink_bytes(K * steps) for steps in sent["steps"]]
    for entry in log:
        steps = sent[sent["round"] == entry.round]["steps"]
        assert [len(answer.scalars) for answer in entry.answers] == [
            K * n for n in (steps if options.get("own") else [steps.max()])
        ]


def test_a_round_without_answers_is_a_round():
    replica = Replica(Baffle(directions=2), 0, model())
    replica.take(ScalarRound(1, 0.1, ()))
    assert replica.done == 1 and all(torch.equal(model()[key], p) for key, p in replica.current().items())
