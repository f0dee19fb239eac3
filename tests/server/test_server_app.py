"""The same run under Flower's ServerApp as under our own engine."""

import pytest
from fedforward.client import make_client_app
from fedforward.server.app import make_server_app
from fedforward.server.records import Records, read_run
from fedforward.server.rounds import AllClientsFailed
from fedforward.simulations.engines.inline import InlineGrid
from fedforward.simulations.run import execute, finish, prepare, start
from fedforward.simulations.world import load_client
from flwr.app import Context, RecordDict
from small_runs import rows, small


def serve(config, app, work=None):
    grid = InlineGrid(app, config["clients"], config, work=work)
    context = Context(run_id=1, node_id=0, node_config={}, state=RecordDict(), run_config=config)
    make_server_app(prepare, finish)(grid, context)


def test_it_leaves_the_rows_of_our_own_engine(tmp_path, no_report, capsys):
    world, folder = start(small(name="ours", engine="inline"), tmp_path)
    execute(world, folder)
    config = small(name="flowers", engine="inline").to_run_config() | {"runs-dir": str(tmp_path)}
    serve(config, make_client_app(load_client), world.work)
    assert rows(tmp_path / "flowers") == rows(folder)
    assert capsys.readouterr().err.endswith(f"finished: {tmp_path / 'flowers' / 'report.html'}\n")


def test_a_run_that_fails_is_marked_and_let_go(tmp_path):
    config = small(name="it").to_run_config() | {"runs-dir": str(tmp_path)}
    with pytest.raises(AllClientsFailed, match="ZeroDivisionError"):
        serve(config, make_client_app(lambda context: 1 / 0))
    assert read_run(tmp_path / "it").info["status"] == "failed"
    Records(tmp_path / "it").close()
