"""Other simulators on the workload of `bare`, each in an environment of its own, in turns with the plain loop.

An environment is made once under `$FEDFORWARD_CACHE/peers` (default `~/.cache/fedforward/peers`), which takes minutes
and a network, by

    python -m venv FOLDER
    FOLDER/bin/python -m pip install -c CONSTRAINTS REQUIREMENT …

with the requirements of PEERS. CONSTRAINTS pins PyTorch to this environment's version, or pip would fetch gigabytes of
another. A peer's script sits beside this file: it runs the clients, batches and steps of the plain loop, ends with an
error unless it comes to the plain loop's weights, and prints one JSON line {runner, workload, rounds_per_s, start_s}.

Without a script: FedJAX, which computes with another library, BlazeFL, which wants Python 3.12, and FedLab.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from ...cache import cache_folder
from .. import engines, workload
from ..settings import Row, Settings, Timing


class Peer(NamedTuple):
    """A script beside this file, and what pip installs for it."""

    script: str
    requirements: tuple[str, ...]


PEERS = {
    "pfl-research 0.6": Peer("pfl_research.py", ("pfl[pytorch]==0.6.0",)),
    "fluke 0.8.1": Peer("fluke_fl.py", ("fluke-fl==0.8.1",)),
}
MINUTES = 20  # for pip, and for a script


class PeerFailed(RuntimeError):
    """A peer cannot be installed or does not run; one line that says why."""


def measure(settings: Settings) -> list[Row]:
    """Return a row for the plain loop and each peer on each model; a peer that fails says why and is left out."""
    failed, working = [], {}
    for name, peer in PEERS.items():
        settings.tell(f"peers: {name}")
        try:
            python = environment(name, peer)
            for model in workload.MODELS:
                run_script(python, peer, model, 1)
            working[name] = partial(run_script, python, peer)
        except PeerFailed as failure:
            failed.append({"model": "", "runner": name, "reason": str(failure)})
    rows = []
    for model in workload.MODELS:
        those = {engines.PLAIN: engines.bare_runners(model, settings)[engines.PLAIN]}
        those |= {name: partial(run, model, settings.rounds) for name, run in working.items()}
        try:
            rows += [row | {"ours": False} for row in engines.rows(model, those, settings)]
        except PeerFailed as failure:  # what the other model told stays
            failed.append({"model": model, "runner": "", "reason": str(failure)})
    return rows + failed


def environment(name: str, peer: Peer) -> Path:
    """Return the interpreter of a peer's environment, made if it is not there yet.

    Raises:
        PeerFailed: if it cannot be made; nothing of it stays.
    """
    folder = cache_folder() / "peers" / name.replace(" ", "-")
    python, ready = folder / "bin" / "python", folder / ".ready"
    if ready.exists():
        return python
    constraints = folder / "constraints.txt"
    try:
        _called([sys.executable, "-m", "venv", "--clear", str(folder)])
        constraints.write_text(f"torch=={torch.__version__.partition('+')[0]}\n")
        _called([str(python), "-m", "pip", "install", "--quiet", "-c", str(constraints), *peer.requirements])
        ready.touch()
    except (OSError, PeerFailed) as failure:
        shutil.rmtree(folder, ignore_errors=True)
        raise PeerFailed(f"cannot be installed: {failure}") from None
    return python


def run_script(python: Path, peer: Peer, model: str, rounds: int) -> Timing:
    """Return what a peer's script measures.

    Raises:
        PeerFailed: if it ends without an answer.
    """
    out = _called([str(python), str(Path(__file__).with_name(peer.script)), model, str(rounds)])
    try:
        answer = json.loads(out.strip().splitlines()[-1])
        return Timing(answer["rounds_per_s"], answer["start_s"])
    except (IndexError, KeyError, ValueError):
        raise PeerFailed(f"{peer.script} printed no figures") from None


def _called(command: list[str]) -> str:
    """Run a command and return what it prints; PeerFailed with the last line of its errors."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60 * MINUTES, check=False)
    except subprocess.TimeoutExpired:
        raise PeerFailed(f"{Path(command[0]).name} took more than {MINUTES} minutes") from None
    if done.returncode:
        raise PeerFailed((done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1])
    return done.stdout
