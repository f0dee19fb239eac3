"""Peers are timed in environments of their own; one that fails is a line of the table. Nothing is installed here."""

import sys
from pathlib import Path

import pytest
from fedforward.simulations.benchmarks import engines, peers
from fedforward.simulations.benchmarks.peers import Peer, PeerFailed, environment, run_script
from fedforward.simulations.benchmarks.settings import Settings, Timing

TINY = Settings(repeats=2, rounds=1)
HERE = Path(sys.executable)


@pytest.fixture
def script(tmp_path, monkeypatch):
    """Make a peer whose script is the given text."""

    def make(text):
        (tmp_path / "script.py").write_text(text)
        monkeypatch.setattr(peers, "__file__", str(tmp_path / "__init__.py"))
        return Peer("script.py", ())

    return make


def test_a_script_prints_one_line_of_figures(script):
    peer = script("import sys; print('noise'); print('{\"rounds_per_s\": 2.5, \"start_s\": ' + sys.argv[2] + '}')")
    assert run_script(HERE, peer, "mlp", 3) == Timing(2.5, 3)


@pytest.mark.parametrize(
    "text, line", [("print('hello')", "printed no figures"), ("import sys; sys.exit('other weights')", "other weights")]
)
def test_a_script_that_fails_says_why(script, text, line):
    with pytest.raises(PeerFailed, match=line):
        run_script(HERE, script(text), "mlp", 1)


def test_an_environment_that_cannot_be_made_leaves_nothing(monkeypatch, tmp_path):
    monkeypatch.setenv("FEDFORWARD_CACHE", str(tmp_path))

    def called(command):
        if "pip" in command:
            raise PeerFailed("No matching distribution found for peer")
        Path(command[-1]).mkdir(parents=True)

    monkeypatch.setattr(peers, "_called", called)
    with pytest.raises(PeerFailed, match="cannot be installed: No matching distribution"):
        environment("a peer", Peer("script.py", ("peer",)))
    assert not (tmp_path / "peers" / "a-peer").exists()


def test_an_environment_is_made_once_with_this_pytorch(monkeypatch, tmp_path):
    monkeypatch.setenv("FEDFORWARD_CACHE", str(tmp_path))
    seen = []

    def called(command):
        seen.append(command)
        (tmp_path / "peers" / "a-peer").mkdir(parents=True, exist_ok=True)

    monkeypatch.setattr(peers, "_called", called)
    python = environment("a peer", Peer("script.py", ("peer==1",)))
    assert environment("a peer", Peer("script.py", ("peer==1",))) == python and len(seen) == 2
    assert seen[1][-1] == "peer==1" and "-c" in seen[1]
    assert (tmp_path / "peers" / "a-peer" / "constraints.txt").read_text().startswith("torch==")


def test_peers_are_rows_beside_the_plain_loop_and_failures_say_why(monkeypatch):
    def make(name, peer):
        if name == "broken":
            raise PeerFailed("cannot be installed: no network")
        return HERE

    monkeypatch.setattr(peers, "PEERS", {"works": Peer("a.py", ()), "broken": Peer("b.py", ())})
    monkeypatch.setattr(peers, "environment", make)
    monkeypatch.setattr(peers, "run_script", lambda python, peer, model, rounds: Timing(3.0, 1.0))
    monkeypatch.setattr(engines, "bare_runners", lambda model, settings: {"plain": lambda: Timing(6.0, 0.0)})
    rows = peers.measure(TINY)
    assert [(row["model"], row["runner"], row.get("of_plain")) for row in rows] == [
        ("mlp", "plain", 1.0), ("mlp", "works", 0.5), ("cnn", "plain", 1.0), ("cnn", "works", 0.5), ("", "broken", None)
    ]  # fmt: skip
    assert rows[-1]["reason"] == "cannot be installed: no network" and not any(row.get("ours") for row in rows)


def test_every_peer_has_a_script():
    folder = Path(peers.__file__).parent
    assert all((folder / peer.script).is_file() and peer.requirements for peer in peers.PEERS.values())
