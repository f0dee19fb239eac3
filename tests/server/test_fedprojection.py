"""Projections of what clients learned: what the server makes of them, what they cost, and where they run."""

import pytest
import torch
from fedforward import message_bytes, protocol
from fedforward.algorithms import RuleError
from fedforward.algorithms.projection import basis, decode, encode
from fedforward.client.app import assignment
from fedforward.client.fitting import OverBudget, fit
from fedforward.scalar_wire import decode_round
from fedforward.server.records import Records, read_run
from fedforward.server.rounds import model_hash
from fedforward.simulations.engines.cohort import CohortGrid
from fedforward.simulations.engines.inline import InlineGrid
from fedforward.simulations.engines.pool import PoolGrid
from fedforward.simulations.experiment import ExperimentError
from small_runs import rows, simulate, small_world

K = 60


def world(rule="backprop", keep="length", directions=K, **changes):
    options = {"strategy": {"directions": directions, "keep": keep}}
    return small_world(rule=rule, strategy="fedprojection", set=options, **changes)


def d_of(w):
    return sum(p.numel() for p in w.trainer.initial_params().values())


def test_the_servers_model_is_the_mean_of_the_clients_projected_models(tmp_path):
    w = world(keep="projection", rounds=1, partition="dirichlet:0.5")
    arrays = protocol.params_of(simulate(w, tmp_path))
    whole = small_world(rule="backprop", rounds=1, partition="dirichlet:0.5")
    config = protocol.train_config(server_round=1, lr=w.trainer.rule.lr, epochs=1, batch_size=16, evaluate=False)
    total, samples = {key: torch.zeros_like(p) for key, p in arrays.items()}, 0
    for index in range(5):
        origin, client = whole.trainer.initial_params(), whole.client(index)
        model = whole.trainer.initial_params()
        whole.trainer.fit(model, client.train, client.test, index, assignment(config))
        decode(origin, encode(model, origin, basis(0, 1), K), basis(0, 1), K)
        for key, p in origin.items():
            total[key] += len(client.train) * p
        samples += len(client.train)
    for key, p in arrays.items():
        torch.testing.assert_close(p, total[key] / samples, rtol=0, atol=1e-5)


def test_with_a_direction_a_value_it_is_fedavg(tmp_path):
    full = simulate(world(directions=10**6), tmp_path / "a")
    plain = simulate(small_world(rule="backprop", strategy="fedavg"), tmp_path / "b")
    for key, array in plain.items():
        torch.testing.assert_close(torch.tensor(full[key].numpy()), torch.tensor(array.numpy()), rtol=0, atol=1e-5)


@pytest.mark.parametrize("rule, least", [("backprop", 0.7), ("mono-forward", 0.8)])
def test_a_run_on_the_digits_learns_from_a_thirtieth_of_the_bytes(tmp_path, rule, least):
    options = {"data": {"limit": 1797}, "model": {"hidden": [128]}, "strategy": {"directions": 300}}
    w = small_world(rule=rule, strategy="fedprojection", rounds=15, evaluate_every=15, set=options)
    simulate(w, tmp_path)
    run = read_run(tmp_path)
    assert d_of(w) > 300 * 30 and run.rounds["accuracy"].iloc[-1] > least
    assert set(run.clients["bytes_up"]) == {message_bytes.scalar_uplink_bytes(300)}
    assert message_bytes.scalar_uplink_bytes(300) == 4 * 300 + message_bytes.scalar_uplink_bytes(0)
    assert 20 * run.clients["bytes_up"].max() < message_bytes.model_uplink_bytes(w.trainer.initial_params())
    down = message_bytes.model_downlink_bytes(w.trainer.initial_params())
    assert set(run.clients["bytes_down"]) == {down + len("projection") + 8}


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["backprop", "mono-forward"])
def test_workers_give_the_bits_of_one_process(tmp_path, rule):
    w = world(rule)
    simulate(w, tmp_path / "inline")

    def pool(app, clients, run_config, *, work):
        return pooled

    with PoolGrid(w.experiment.to_run_config(), ("cpu", "cpu"), w.trainer.initial_params(), 5, work=w.work) as pooled:
        simulate(w, tmp_path / "pool", grid=pool)
    assert rows(tmp_path / "inline") == rows(tmp_path / "pool")


@pytest.mark.parametrize("rule", ["backprop", "mono-forward", "dfa"])
def test_side_by_side_comes_near_them(tmp_path, rule):
    w = world(rule)
    wanted = simulate(w, tmp_path / "inline")
    found = simulate(w, tmp_path / "cohort", grid=lambda app, clients, config, *, work: CohortGrid(w))
    for key, array in wanted.items():
        torch.testing.assert_close(torch.tensor(found[key].numpy()), torch.tensor(array.numpy()), rtol=0, atol=1e-3)
    up = [read_run(tmp_path / name).clients["bytes_up"].tolist() for name in ("inline", "cohort")]
    assert up[0] == up[1]


def test_the_recorded_numbers_give_the_model_again_on_any_number_of_threads(tmp_path):
    w = world(rounds=3)
    end = model_hash(simulate(w, tmp_path))
    records, threads = Records(tmp_path), torch.get_num_threads()
    try:
        log = [decode_round(blob) for _, blob in records.scalars()]
        assert [len(entry.answers[0].scalars) for entry in log] == [K] * 3
        for count in (1, 4):
            torch.set_num_threads(count)
            params = w.trainer.initial_params()
            for entry in log:
                decode(params, entry.answers[0].scalars, basis(0, entry.round), K, 0.5)
            assert model_hash(protocol.encode_params(params)) == end
    finally:
        torch.set_num_threads(threads)
        records.close()


# ---- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["backprop", "backprop-fused", "mono-forward"])
def test_every_client_uses_the_memory_that_was_planned(tmp_path, rule):
    w = world(rule, audit=1.0)
    simulate(w, tmp_path)
    found = read_run(tmp_path).clients
    assert (found["status"] == "ok").all() and (found["audited"] == 1).all()
    planner, batch = w.trainer.planner, int(found["batch"].iloc[0])
    own = sum(p.nbytes for p in w.trainer.initial_params().values())
    plan, plain = (planner.step(w.trainer.rule, batch, anchored=anchored).peak for anchored in (True, False))
    encoding = planner.encoding(w.trainer.rule, K).peak
    assert plan == plain + own
    assert set(found["peak_bytes"]) == {max(plan, encoding)}


def test_what_encoding_needs_is_planned_to_the_byte_and_part_of_what_must_fit():
    from fedforward.client.memory import PeakMemory

    w = world(directions=5000)
    planner, rule, params = w.trainer.planner, w.trainer.rule, w.trainer.initial_params()
    origin = w.trainer.initial_params()
    meter = PeakMemory({"parameters": params.values(), "state": origin.values()})
    with torch.no_grad(), meter:
        encode(params, origin, basis(0, 1), 5000)
    planned = planner.encoding(rule, 5000).peak
    assert meter.peak == planned
    assert planned > planner.step(rule, 1, anchored=True).peak  # so it decides
    assert fit(planner, rule, 1, anchored=True, projection=5000).peak == planned
    with pytest.raises(OverBudget, match=rf"needs {planned:,} B"):
        fit(planner, rule, 1, planned - 1, anchored=True, projection=5000)
    assert fit(planner, rule, 1, planned, anchored=True, projection=5000).peak == planned


# ---- what does not count ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda a: a._replace(scalars=a.scalars[:-1]), f"{K - 1} numbers, where the model's change is {K}"),
        (lambda a: a._replace(scalars=a.scalars / 0), "not all of its numbers are finite"),
        (lambda a: a._replace(round=7), "it answers round 7"),
        (lambda a: a._replace(params={"x": torch.ones(1)}, scalars=None), "the answer holds no scalars"),
    ],
)
def test_an_answer_that_is_none_is_refused_and_the_run_is_as_if_it_had_not_come(tmp_path, change, words):
    class Bad(InlineGrid):
        """The second answer is another; with `lost` it does not come."""

        lost = False

        def stream(self, messages, **options):
            for i, reply in enumerate(super().stream(messages, **options)):
                answer = protocol.live(reply)
                if answer and i == 1:
                    if self.lost:
                        continue
                    reply.answer = change(answer)
                yield reply

    class Lost(Bad):
        lost = True

    ends = [model_hash(simulate(world(rounds=1), tmp_path / grid.__name__, grid=grid)) for grid in (Bad, Lost)]
    assert ends[0] == ends[1]
    refused = read_run(tmp_path / "Bad").clients.query("status == 'failed'")
    assert len(refused) == 1 and words in refused["reason"].iloc[0]


@pytest.mark.parametrize(
    "changes, error, words",
    [
        ({"directions": 0}, RuleError, "strategy.directions ≥ 1"),
        ({"directions": 5}, RuleError, "5 directions for 6 tensors: use strategy.directions ≥ 6"),
        ({"keep": "everything"}, RuleError, "use projection, length, unbiased"),
        ({"rule": "baffle"}, ExperimentError, "baffle sends scalars, which fedprojection cannot aggregate"),
    ],
)
def test_impossible_settings_are_refused(changes, error, words):
    with pytest.raises(error, match=words):
        world(**changes)
