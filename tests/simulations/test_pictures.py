"""Pictures show the runs that have data and name those that have none."""

import io

import numpy as np
import pytest
from fedforward.simulations.pictures import PICTURES, draw
from fedforward.simulations.summary import Shown
from made_runs import make_run
from PIL import Image


def read(*folders):
    return [Shown.read(folder, index, set()) for index, folder in enumerate(folders)]


@pytest.mark.parametrize("name", PICTURES)
def test_every_picture_shows_one_run_and_several(name, tmp_path):
    make_run(tmp_path / "a", fleet=True, diagnosed=True)
    make_run(tmp_path / "b", rounds=2, clients=7, fleet=True, diagnosed=True)
    for shown in (read(tmp_path / "a"), read(tmp_path / "a", tmp_path / "b")):
        png, caption = draw(PICTURES[name], shown)
        picture = Image.open(io.BytesIO(png))
        assert picture.format == "PNG" and picture.width > 600
        assert np.asarray(picture.convert("L")).std() > 5  # something is drawn
        assert "No data yet" not in caption


@pytest.mark.parametrize("clients", [1, 1000])
def test_one_and_a_thousand_clients_all_of_which_may_fail(tmp_path, clients):
    make_run(tmp_path / "a", rounds=1, clients=clients, evaluated=False)
    make_run(tmp_path / "b", rounds=1, clients=clients, failing={(1, client) for client in range(clients)})
    drawn = {name: draw(picture, read(tmp_path / "a")) for name, picture in PICTURES.items()}
    assert [name for name, (png, _) in drawn.items() if png] == ["memory", "parts", "clients"]
    assert drawn["traffic"][1].startswith("No data yet")
    _, caption = draw(PICTURES["memory"], read(tmp_path / "a", tmp_path / "b"))
    assert "No data yet: b." in caption


def test_a_name_is_no_notation_of_matplotlib(tmp_path):
    make_run(tmp_path / "a", name="_$a_1$\n{")
    make_run(tmp_path / "b", name="$")
    assert draw(PICTURES["clients"], read(tmp_path / "a", tmp_path / "b"))[0]


def test_devices_on_which_nobody_trains_are_shown_with_their_budget(tmp_path):
    make_run(tmp_path / "a", clients=2, fleet=True, failing={(t, 0) for t in (1, 2, 3)})
    png, _ = draw(PICTURES["devices"], read(tmp_path / "a"))
    assert png
    make_run(tmp_path / "b")
    assert draw(PICTURES["devices"], read(tmp_path / "b"))[0] is None and PICTURES["devices"].optional
