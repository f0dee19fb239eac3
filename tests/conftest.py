"""The command line as a user meets it, in this process. This file also makes `small_runs` importable everywhere."""

import sys
from typing import NamedTuple

import pytest
import torch

torch.set_num_threads(1)  # as runs do; a second thread has nothing to do here but wait


class Answer(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def cli(monkeypatch, capsys, tmp_path):
    """Call `fedforward WORDS...` in an empty folder and return (exit code, standard output, standard error)."""
    from fedforward.simulations.cli import main

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["fedforward", *(str(word) for word in words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        return Answer(ended.value.code or 0, *capsys.readouterr())

    monkeypatch.chdir(tmp_path)
    return call


@pytest.fixture
def no_report(monkeypatch):
    """Leave out the report, which takes longer than a small run."""
    monkeypatch.setattr("fedforward.simulations.run.write_report", lambda folders: folders[0] / "report.html")
