"""The benchmark measures what it says, on tiny workloads: structure, ratios of made-up times, and errors. No timing."""

import json

import pytest
from fedforward.server.rounds import RunFailed
from fedforward.simulations.benchmarks import (
    compiled,
    engines,
    flops,
    metering,
    overhead,
    probes,
    rules,
    scaling,
    workload,
)
from fedforward.simulations.benchmarks.bench import PARTS, bench, parts_named
from fedforward.simulations.benchmarks.columns import LOOKS
from fedforward.simulations.benchmarks.picture import draw_bench, panels_of
from fedforward.simulations.benchmarks.settings import Settings, Timing, in_turns, ratio, timing
from fedforward.simulations.benchmarks.show import show
from fedforward.simulations.benchmarks.workload import Clock
from rich.console import Console

TINY = Settings(repeats=1, rounds=1, warm_up=1)
MACHINE = {
    "device": "a machine", "torch": "2", "repeats": 1, "rounds": 1, "warm_up": 1, "load_before": 0, "load_after": None
}  # fmt: skip


def engine_rows(paces, model="mlp"):
    return [{"model": model, "runner": name, "each": each} for name, each in paces.items()]


def test_runners_run_in_turns():
    seen = []
    runners = {name: lambda name=name: seen.append(name) or len(seen) for name in "ab"}
    assert in_turns(runners, Settings(repeats=2)) == {"a": [1, 3], "b": [2, 4]}
    assert seen == ["a", "b", "a", "b"]


def test_a_ratio_is_taken_within_each_turn():
    assert ratio([1.0, 20.0, 3.0], [2.0, 10.0, 3.0]) == 1.0


def test_start_up_is_what_a_run_takes_beyond_its_rounds():
    assert timing(10.0, 4.0, Settings(rounds=20, warm_up=5)) == Timing(5.0, 5.0)
    assert timing(1.0, 4.0, Settings()).start_s == 0.0


def test_rows_hold_the_median_pace_and_its_ratio_to_the_plain_loop():
    ours = iter([Timing(4.0, 1.0), Timing(9.0, 3.0), Timing(8.0, 2.0)])
    plain = iter([Timing(2.0, 0.0), Timing(3.0, 0.0), Timing(8.0, 0.0)])
    those = {"plain": lambda: next(plain), "backprop inline": lambda: next(ours)}
    first, second = engines.rows("mlp", those, Settings(repeats=3))
    assert (first["runner"], first["of_plain"], first["ours"]) == ("plain", 1.0, False)
    assert second["rounds_per_s"] == 8.0 and second["of_plain"] == 2.0 and second["start_s"] == 2.0 and second["ours"]


def test_overhead_is_the_time_over_the_bare_loop_s_of_the_same_turn():
    paces = {"plain": [10.0, 20.0], "backprop alone": [10.0, 20.0], "backprop inline": [5.0, 10.0]}
    (row,) = overhead.measure(TINY, engine_rows(paces))
    assert row["runner"] == "backprop inline" and row["floor"] == "backprop alone"
    assert row["time_of_floor"] == row["time_of_plain"] == 2.0
    assert row["added_ms_a_client"] == pytest.approx(7.5)  # 0.1 s and 0.05 s a round of ten clients


def test_a_cohort_answers_for_batched_products_and_two_workers_for_two():
    paces = {name: [1.0] for name in ("plain", "by hand", "bmm", "vmap", "two workers")}
    paces |= {"backprop-fused cohort": [0.5], "dfa cohort(2)": [0.25]}
    first, second = overhead.measure(TINY, engine_rows(paces))
    assert (first["floor"], second["floor"]) == ("bmm", "two workers")
    assert (first["time_of_hand"], second["time_of_hand"]) == (2.0, 4.0)


def test_compiling_pays_if_it_saves_and_after_so_many_rounds():
    assert compiled.figures(3.0, 0.002, 0.001)["pays_after_rounds"] == 101  # of 30 steps
    worse = compiled.figures(3.0, 0.001, 0.002)
    assert worse["pays_after_rounds"] is None and worse["time_of_eager"] == 2.0


def test_the_step_that_is_compiled_is_the_rules_own():
    step, (params, *batch) = compiled.step_of("mlp", "mono-forward", TINY)
    before = {key: p.clone() for key, p in params.items()}
    loss, correct, weight = step(params, *batch)
    assert loss > 0 and 0 <= correct <= 20 and weight == 20
    assert any((params[key] != p).any() for key, p in before.items())


def test_every_hand_written_loop_and_engine_is_among_the_runners():
    names = set(engines.runners("mlp", TINY))
    assert {"plain", "by hand", "two workers", "bmm", "vmap", "backprop alone", "backprop-fused auto"} <= names
    assert {f"backprop {name}" for name in ("inline", "cohort", "pool(1)", "pool(2)", "auto")} <= names
    assert {"plain", "cpu aware", "two workers", "vmap", "backprop alone"} <= set(engines.runners("cnn", TINY))


def test_on_a_gpu_the_loops_of_cpu_workers_are_left_out():
    assert "two workers" not in engines.bare_runners("mlp", Settings(device="cuda"))
    assert set(workload.engines("cuda")) == {"inline", "cohort", "pool(1)", "auto"}


@pytest.mark.parametrize("runner", ["plain", "backprop alone", "backprop inline", "backprop cohort"])
def test_a_runner_returns_a_pace_and_a_start(runner):
    found = engines.runners("mlp", Settings(repeats=1, rounds=1))[runner]()
    assert found.rounds_per_s > 0 and found.start_s >= 0


def test_our_side_takes_the_steps_of_the_bare_loops():
    asked = workload.experiment(TINY, **workload.MLP)
    world = workload.build(asked)
    assert [world.samples(i) for i in range(100)] == [60] * 100
    assert (asked.sampled(), asked.epochs, asked.batch_size, asked.lr) == (10, 1, 20, 0.1)
    assert not world.plan().evaluates(TINY.warm_up + TINY.rounds)
    assert sum(p.numel() for p in world.trainer.initial_params().values()) == 159_010


def test_a_run_whose_clients_fail_is_not_timed():
    with pytest.raises(RunFailed, match="2 clients of round 3 failed: lower --lr"):
        Clock().round_done({"failed": 2, "round": 3}, [{"status": "failed", "reason": "lower --lr"}])


def test_scaling_observes_time_and_memory():
    changes = scaling.COMMON | {"clients": 1000, "clients_per_round": 2, "samples_per_client": 10, "rounds": 3}
    found = scaling.observe(changes)
    assert found["peak_resident_bytes"] > found["model_bytes"] > 0 and found["above_start_bytes"] >= 0
    assert found["client_ms"] == pytest.approx(500 * found["round_s"])


def test_scaling_measures_every_size_in_a_process_of_its_own(monkeypatch):
    asked = []
    monkeypatch.setattr(
        scaling, "in_a_process", lambda changes: asked.append(changes) or {"above_start_bytes": 8, "model_bytes": 4}
    )
    rows = scaling.measure(TINY)
    assert [row["clients"] for row in rows if row["what"] == "registered"] == [100, 1000, 10_000, 100_000, 1_000_000]
    assert [row["clients_per_round"] for row in rows if row["what"] == "a round"] == [10, 100, 1000]
    assert rows[-1]["above_start_models"] == 2.0 and asked[-1]["rule"] == "backprop"


def test_a_process_that_fails_says_why():
    with pytest.raises(RunFailed, match=r"exit code 1: .*unknown rule 'nonsense'"):
        scaling.in_a_process({"rule": "nonsense"})


def test_rules_are_compared_over_engines():
    found = rules.verdict({"inline": 10.0, "pool(2)": 20.0}, "inline", ("cpu",))
    assert (found["fastest"], found["auto"], found["auto_of_fastest"], found["best"]) == (
        "pool(2)",
        "inline",
        0.5,
        20.0,
    )
    assert rules.verdict({"inline": 10.0, "pool(2)": 20.0}, "pool", ("cpu", "cpu"))["auto_of_fastest"] == 1.0
    assert rules.verdict({"inline": 10.0}, "pool", ("cpu",) * 8)["auto_of_fastest"] is None
    assert rules.verdict({"cohort": 4.0, "cohort(2)": 5.0}, "cohort", ("cpu", "cpu"))["auto"] == "cohort(2)"


def test_a_rule_gets_the_layers_it_wants():
    hidden = {name: rules.asked_of(name, TINY).set["model"]["hidden"] for name in ("backprop", "dfa", "baffle")}
    assert hidden["backprop"] == [200] and all(len(widths) in (1, 2) for widths in hidden.values())
    assert rules.asked_of("baffle", TINY).set["rule"] == {"directions": rules.DIRECTIONS}


def test_a_rule_is_measured_on_every_engine_and_one_that_cannot_says_why(monkeypatch):
    monkeypatch.setattr(rules, "RULES", {"mono-forward": rules.RULES["mono-forward"]})
    monkeypatch.setattr(
        rules, "_pace", lambda asked, settings: {"inline": 1.0, "cohort": 3.0, "pool": 2.0}[asked.engine]
    )
    (row,) = rules.measure(TINY)
    assert row["fastest"] == "cohort" and row["of_fastest_rule"] == 1.0 and row["pool(2)"] == 2.0

    def refuse(asked, settings):
        raise RunFailed("out of luck")

    monkeypatch.setattr(rules, "_pace", refuse)
    (row,) = rules.measure(TINY)
    assert row["reason"] == "out of luck" and row["best"] is row["of_fastest_rule"] is None


def test_probes_are_told_beside_one_by_one_and_only_what_fits(monkeypatch):
    monkeypatch.setattr(probes, "COUNT", {"cpu": 4})
    monkeypatch.setattr(probes, "ABREAST", (1, 4, 16))
    monkeypatch.setattr(probes, "NETWORKS", {"mlp": ((1, 8, 8), {"hidden": [16]})})
    monkeypatch.setattr(flops, "ATLEAST", 0.0)
    rows = probes.measure(TINY)
    assert [(row["rule"], row["abreast"]) for row in rows] == [
        ("baffle", 1), ("baffle", 4), ("forward-gradient", 1), ("forward-gradient", 4)
    ]  # fmt: skip
    assert rows[0]["pace_of_alone"] == 1 and all(row["direction_ms"] > 0 for row in rows)
    assert rows[1]["peak_bytes"] > rows[0]["peak_bytes"]
    monkeypatch.setattr(probes, "MOST", rows[0]["peak_bytes"])
    assert [row["abreast"] for row in probes.measure(TINY) if row["rule"] == "baffle"] == [1]


def test_flops_are_told_beside_a_matrix_product_s():
    rows = flops.figures("narrow", {flops.PRODUCT: 100, "dfa": 10}, {flops.PRODUCT: 1.0, "dfa": 0.2})
    assert [row["flops_per_s"] for row in rows] == [100.0, 50.0]
    assert [row["of_product"] for row in rows] == [1.0, 0.5]


def test_every_rule_takes_steps_that_are_planned(monkeypatch):
    monkeypatch.setattr(flops, "NETWORKS", {"narrow": ([16, 16], 4)})
    monkeypatch.setattr(flops, "ATLEAST", 0.0)
    monkeypatch.setattr(flops, "SIDE", 64)
    rows = flops.measure(TINY)
    assert {row["rule"] for row in rows} == {flops.PRODUCT, *flops.RULES}
    assert all(row["flops"] > 0 and row["step_ms"] > 0 for row in rows)


def test_metering_compares_planned_and_audited_rounds(monkeypatch):
    monkeypatch.setattr(metering, "SAMPLES", 40)
    row = metering.compare("backprop", "mlp", 1)
    assert min(row["planned"], row["audited"], row["first_plan_ms"], row["bare_ms"]) > 0


def test_parts_come_in_their_order_and_slow_ones_when_asked_for():
    assert parts_named("", "cpu") == ["engines", "overhead", "scaling", "flops", "metering"]
    assert parts_named("rules, engines", "cpu") == ["engines", "rules"]
    assert set(LOOKS) == set(PARTS)


@pytest.mark.parametrize(
    "words, line",
    [
        (["--only", "engine"], "unknown part of the benchmark 'engine': did you mean engines"),
        (["--device", "cuda:99"], "--device cuda:99: PyTorch sees no such GPU here"),
        (["--device", "cpu:2"], "bench measures on one device, cpu or cuda:GPU, not on 'cpu:2'"),
        (["--picture", "a.svg"], "--picture writes a PNG: name a file that ends in .png, not a.svg"),
    ],
)
def test_a_mistake_is_one_line(cli, words, line):
    answer = cli("bench", *words)
    assert answer.code == 2 and line in answer.err.replace("\n", " ") and not answer.out


def test_what_is_measured_on_the_cpu_is_refused_on_a_gpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    assert "metering" not in parts_named("", "cuda:0")
    with pytest.raises(ValueError, match="flower is measured on the CPU"):
        parts_named("flower", "cuda:0")


def test_the_command_prints_a_table_or_json_and_draws(cli, monkeypatch, tmp_path):
    row = {"network": "narrow", "rule": "dfa", "flops": 10, "step_ms": 1.0, "flops_per_s": 1e4, "of_product": 0.5}
    monkeypatch.setattr(flops, "measure", lambda settings: [row])
    answer = cli("bench", "--only", "flops", "--picture", tmp_path / "a.png")
    assert answer.code == 0 and "10.0 kFLOP/s" in answer.out and "0.50 ×" in answer.out
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads(cli("bench", "--only", "flops", "--json").out)
    assert found["flops"] == [row] and {"device", "torch", "load_before", "load_after"} <= set(found["machine"])
    answer = cli("bench", "--only", "flops", "--picture", tmp_path / "missing" / "a.png")
    assert answer.code == 2 and "cannot write" in answer.err


def test_overhead_takes_the_figures_of_engines_that_are_there(monkeypatch):
    seen = []
    monkeypatch.setattr(engines, "measure", lambda settings: seen.append(1) or [])
    assert bench("engines", TINY)["engines"] == []
    monkeypatch.setattr(overhead, "measure", lambda settings, before: before)
    assert bench("engines,overhead", TINY)["overhead"] == [] and len(seen) == 2


def test_a_row_that_failed_is_in_the_table_and_not_in_the_picture():
    rows = [{"model": "mlp", "runner": "plain", "rounds_per_s": 2.0}, {"model": "", "runner": "x", "reason": "no pip"}]
    assert [panel.names for panel in panels_of("peers", rows)] == [["plain"]]
    console = Console(width=100, record=True)
    show({"machine": MACHINE, "peers": rows}, console)
    assert "no pip" in console.export_text()
    assert draw_bench({"machine": MACHINE, "peers": rows}).startswith(b"\x89PNG")


def test_flower_without_ray_is_one_line(monkeypatch):
    monkeypatch.setattr("fedforward.simulations.engines.flower.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="not installed: pip install"):
        bench("flower", TINY)
