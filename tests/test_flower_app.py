"""The Flower way: the shipped copy is what runs, and Ray ends in the same model as the inline engine."""

import os
import shutil
import socket
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import httpx
import pytest
from fedforward.server.records import TIMES, read_run
from fedforward.simulations.experiment import from_run_config
from fedforward.simulations.run import execute, start

ROOT = Path(__file__).resolve().parents[1]


def run_config():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]


def test_unpacked_copy_is_what_is_imported(tmp_path):
    """Flower unpacks the bundle anywhere; an installed fedforward must not be taken instead."""
    copy = tmp_path / "bundle"
    names = shutil.ignore_patterns(".*", "tests", "runs", "__pycache__", "*.egg-info", "build", "dist")
    shutil.copytree(ROOT, copy, ignore=names)
    program = (
        "import fedforward, sys; sys.path.insert(0, sys.argv[1]); import flower_app;"
        "import fedforward.client.app as app; print(app.__file__); print(flower_app.client_app, flower_app.server_app)"
    )
    out = subprocess.run(
        [sys.executable, "-c", program, str(copy)], capture_output=True, text=True, check=True, cwd=tmp_path
    ).stdout
    assert out.splitlines()[0] == str(copy / "client" / "app.py")


@pytest.fixture
def superlink(tmp_path):
    """A SuperLink of its own, which does not install anything and ends with the test."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    home = tmp_path / "flwr"
    home.mkdir()
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "test"\n[superlink.test]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
    )
    environment = os.environ | {"FLWR_HOME": str(home), "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    command = ["flower-superlink", "--insecure", "--simulation", "--isolation", "subprocess"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--database", str(home / "state.db")]
    with open(tmp_path / "superlink.log", "w") as log:
        process = subprocess.Popen(
            [*command, "--disable-runtime-dependency-installation"], env=environment, stdout=log, stderr=log
        )
        try:
            _wait_for(f"http://127.0.0.1:{port}/health", process)
            yield environment
        finally:
            process.terminate()
            process.wait(30)


def _wait_for(url, process, seconds=60):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(url, timeout=1).is_success:
                return
        except httpx.HTTPError:
            time.sleep(0.2)
    raise TimeoutError(f"no SuperLink at {url}")


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["mono-forward", "baffle"])
def test_flower_ray_ends_in_the_same_model_and_rows_as_inline(superlink, tmp_path, rule):
    pytest.importorskip("ray", reason="Flower's simulation needs the extra `ray`")
    settings = {"rule": rule, "clients": 5, "clients-per-round": 3, "rounds": 2, "epochs": 1, "name": "ray"}
    options = "model.hidden=[32] rule.directions=4" if rule == "baffle" else "model.hidden=[32]"
    overrides = " ".join(f"{key}={value!r}" for key, value in settings.items())
    overrides += f" set='{options}' runs-dir='{tmp_path}'"
    federation = "num-supernodes=5 client-resources-num-cpus=1"
    subprocess.run(
        ["flwr", "run", str(ROOT), "--stream", "--run-config", overrides, "--federation-config", federation],
        env=superlink, check=True, capture_output=True, text=True, timeout=300, cwd=tmp_path,
    )  # fmt: skip
    world, folder = start(
        from_run_config(run_config() | settings | {"set": options, "name": "inline", "engine": "inline"}), tmp_path
    )
    execute(world, folder)
    ray, inline = read_run(tmp_path / "ray"), read_run(folder)
    assert ray.rounds.model_sha256.tolist() == inline.rounds.model_sha256.tolist()
    for table in ("rounds", "clients", "evaluations"):
        times = list(TIMES.get(table, ()))
        ours, theirs = getattr(inline, table).drop(columns=times), getattr(ray, table).drop(columns=times)
        assert ours.equals(theirs), ours.compare(theirs)
