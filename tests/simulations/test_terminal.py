"""What a run looks like: lines that fit 80 columns, never wrapped where no terminal reads them."""

import io

import pytest
from fedforward.client.budget import PROFILES
from fedforward.simulations.experiment import Experiment
from fedforward.simulations.population import Admission
from fedforward.simulations.terminal import Watcher, final_table, headline, say
from rich.console import Console

ROW = {"round": 1000, "accuracy": 1.0, "client_accuracy": 1.0, "train_loss": 1.234e-5, "failed": 1000, "seconds": 99.94}
OK = {"client": 1, "status": "ok", "peak_bytes": 1023 * 1024, "bytes_up": 1023 * 1024}
FAILED = {"client": 7, "status": "failed", "reason": "block [0] of shape [3, 4][/red] " + "is too long to fit " * 6}
LONG = Experiment(
    rule="forward-forward", partition="dirichlet:0.3", clients=1000, clients_per_round=100, rounds=1000, strategy="krum"
)


def watched(width, terminal, clients):
    file = io.StringIO()
    console = Console(file=file, width=width, force_terminal=terminal, color_system=None)
    with Watcher(console, LONG) as watcher:
        watcher.round_started(1000, 100)
        watcher.client_done()
        watcher.round_done(ROW, clients)
    return file.getvalue()


@pytest.mark.parametrize("width", [80, 120])
def test_lines_of_a_round_stand_under_their_headings(width):
    lines = watched(width, False, [OK]).splitlines()
    assert len(lines) == 2 and len(lines[0]) == len(lines[1]) <= 80
    assert lines[0].split() == [
        "round",
        "accuracy",
        "own",
        "acc",
        "tr.",
        "loss",
        "max",
        "memory",
        "max",
        "sent",
        "up",
        "failed",
        "time",
    ]
    assert lines[1] == "1000/1000   100.0 %  100.0 %  1.23e-05  1,023.0 KiB  1,023.0 KiB    1000  99.9 s"


def test_no_wrapping_no_bar_and_no_control_where_no_terminal_reads():
    text = watched(40, False, [OK, FAILED])
    assert "\x1b" not in text and "━" not in text
    assert f"  client 7 failed: {FAILED['reason']}" in text.splitlines()


def test_a_terminal_sees_the_bar():
    assert "round 1000/1000" in watched(80, True, [OK])


def test_the_bar_is_full_when_the_last_client_is_done():
    experiment = Experiment(clients=10, clients_per_round=3, rounds=5, evaluate_every=2)
    watcher = Watcher(Console(file=io.StringIO()), experiment, done=1)
    assert watcher.progress.tasks[0].total == 4 * 3 + 3 * 10  # rounds 2, 4 and 5 evaluate
    for _ in range(50):
        watcher.client_done()
    assert watcher.progress.finished
    many = Experiment(clients=2000, clients_per_round=3, rounds=5, evaluate_every=2)
    for experiment, evaluated in ((many, 1000), (many.replace(clients_per_evaluation=7), 7)):
        watcher = Watcher(Console(file=io.StringIO()), experiment)
        assert watcher.progress.tasks[0].total == 5 * 3 + 3 * evaluated


def test_many_failures_are_counted():
    text = watched(80, False, [FAILED | {"client": n} for n in range(300)])
    assert text.count("failed:") == 5 and "and 295 more: see the report" in text


def test_a_fleet_is_described_once_and_its_refused_are_counted():
    refused = {"client": 0, "status": "over budget", "device": "mcu-256k", "reason": "needs 9 B, has 8 B"}
    admissions = [Admission(10, PROFILES["mcu-256k"], None, "over budget: needs 9 B, has 8 B")]
    file = io.StringIO()
    experiment = LONG.replace(fleet="mcu-256k:0.5,phone:0.5", adapt="rule")
    with Watcher(Console(file=file, width=80), experiment, 0, admissions) as watcher:
        for _ in range(3):
            watcher.round_done(ROW | {"over_budget": 10, "failed": 1}, [OK, FAILED, *[refused] * 10])
    lines = file.getvalue().splitlines()
    assert lines[0] == "  mcu-256k (256.0 KiB for tensors), 10 clients: 10 over budget: needs 9 B, has 8 B"
    assert file.getvalue().count("needs 9 B") == 1 and file.getvalue().count("client 7 failed:") == 3
    assert lines[1].split()[-3:] == ["refused", "failed", "time"] and lines[2].split()[-4:-2] == ["10", "1"]
    assert len(lines[1]) == len(lines[2]) == 80


def test_headline_is_short():
    assert headline(Experiment()) == "mono-forward on digits (iid), 20 clients, 30 rounds, seed 0"
    assert len(headline(LONG)) <= 100 and "100 of 1000 clients" in headline(LONG)


def test_say_takes_text_as_it_is():
    file = io.StringIO()
    say(Console(file=file, width=10), "[bold]a[/bold] [/nothing] and more than ten")
    assert file.getvalue() == "[bold]a[/bold] [/nothing] and more than ten\n"


def test_final_table_of_a_run_in_which_nothing_was_measured():
    keys = (
        "accuracy", "loss", "client_accuracy", "peak_bytes_median", "peak_bytes_max", "bytes_up_client",
        "bytes_down_client", "angles", "sparsity", "separation",
    )  # fmt: skip
    summary = dict.fromkeys(keys) | {
        "bytes_up_total": 0,
        "bytes_down_total": 0,
        "evaluation_bytes_total": 0,
        "client_rounds": 0,
        "failed": 3,
        "adapted": 0,
        "over_budget": 0,
        "audited": 0,
        "audit_mismatches": 0,
        "simulated_seconds": None,
    }
    file = io.StringIO()
    table = final_table(Experiment(data="/tmp/[/odd]"), summary | {"seconds": 75.0, "name": "[x]"})
    Console(file=file, width=80).print(table)
    text = file.getvalue()
    assert "[x]: mono-forward on /tmp/[/odd]" in text and "0 (3)" in text and "1 min 15 s" in text
    assert max(map(len, text.splitlines())) <= 80
    assert "refused" not in text and "simulated" not in text and "audited" not in text
    fleet = {"adapted": 7, "over_budget": 8, "audited": 9, "audit_mismatches": 1, "simulated_seconds": 61.0}
    file = io.StringIO()
    Console(file=file, width=80).print(final_table(Experiment(), summary | fleet | {"seconds": 75.0, "name": "x"}))
    for words in ("rounds adapted to their device", " 7 │", " 8 │", "9 (1) │", "1 min 1 s │"):
        assert words in file.getvalue(), words
