"""The Flower ServerApp: the same round loop under `flwr run` and SuperLink as under our own engines."""

from __future__ import annotations

from collections.abc import Callable

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from .job import Job
from .rounds import RunFailed, run_rounds


def make_server_app(prepare: Callable[[Context], Job], finish: Callable[[Job], None]) -> ServerApp:
    """Return the app that runs the job which `prepare` makes of a context, then calls `finish`."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        job = prepare(context)
        try:
            run_rounds(job, grid)
            finish(job)
        except (RunFailed, TimeoutError):
            job.records.finish("failed")
            raise
        finally:
            job.records.close()

    return app
