"""Small experiments on the digits, and what is left of a run when its times are taken away."""

import sqlite3
from contextlib import closing

from fedforward.server.job import Job
from fedforward.server.records import DATABASE, TIMES, Records
from fedforward.server.rounds import run_rounds
from fedforward.simulations.engines.inline import InlineGrid
from fedforward.simulations.experiment import Experiment
from fedforward.simulations.world import build

SMALL = {"clients": 5, "rounds": 2, "epochs": 1, "batch_size": 16}
OPTIONS = {"data": {"limit": 150}, "model": {"hidden": [12, 12]}}
KEYS = {"clients": ", client", "evaluations": ", client", "diagnoses": ", block"}
FLAGS = [f"--{key.replace('_', '-')}={value}" for key, value in SMALL.items()]
FLAGS += ["--set", "data.limit=150", "--set", "model.hidden=[12,12]"]


def small(**changes):
    """Return an experiment of under a second; options in `set` are laid over the small ones."""
    options = OPTIONS | changes.pop("set", {})
    return Experiment(**SMALL | changes, set=options)


def rows(folder):
    """Return every row of every table but the times, and the run's own row without its dates."""
    with closing(sqlite3.connect(folder / DATABASE)) as db:
        db.row_factory = sqlite3.Row
        tables = {
            name: [
                {key: row[key] for key in row.keys() if key not in TIMES.get(name, ())}  # noqa: SIM118
                for row in db.execute(f"SELECT * FROM {name} ORDER BY round{KEYS.get(name, '')}")
            ]
            for name in ("rounds", "clients", "evaluations", "diagnoses")
        }
        return tables | {"status": db.execute("SELECT status FROM runs").fetchone()["status"]}


def simulate(world, folder, *, strategy=None, initial=None, grid=InlineGrid, observer=None):
    """Run a world's rounds on the inline engine, or go on with them, and return the final arrays."""
    records = Records(folder)
    if records.status() is None:
        records.start("small", world.experiment.to_toml(), "0", {})
    job = Job(
        world.plan(), strategy or world.strategy(), initial or world.initial(), world.evaluate, records, observer,
        world.complete, world.diagnose,
    )  # fmt: skip
    e = world.experiment
    try:
        arrays = run_rounds(job, grid(world.app(), e.clients, e.to_run_config(), work=world.work))
        records.finish()
    finally:
        records.close()
    return arrays


def small_world(**changes):
    """Return the world of a small experiment."""
    return build(small(**changes))
