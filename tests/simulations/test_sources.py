"""Every source, and the words of every refusal, on data made here."""

import numpy as np
import pytest
import torch
from fedforward.simulations.datasets import DataError, load
from made_data import pictures, png, table, write

pytestmark = pytest.mark.usefixtures("own_caches")


def test_a_folder_of_images_keeps_its_splits_pixels_and_declared_classes(tmp_path, pixels):
    owner = [f"w{i % 3}" for i in range(8)]
    folder = write(
        tmp_path / "faces",
        train=pictures(pixels[:8], [0, 1] * 4, owner=owner),
        test=pictures(pixels[8:], [0, 1] * 2, owner=["w9"] * 4),
    )
    data = load(folder)
    assert (data.name, data.classes, data.shape, len(data.train), len(data.test)) == ("faces", 3, (1, 4, 5), 8, 4)
    assert data.columns["owner"].tolist() == owner
    x, y = data.test.batch(torch.arange(4))
    assert torch.equal(x, torch.from_numpy(pixels[8:, None]).float() * (1 / 255)) and y.tolist() == [0, 1, 0, 1]


def test_one_colour_image_makes_all_of_them_colour(tmp_path, pixels):
    rgb = np.stack([pixels[1], pixels[2], pixels[3]], axis=-1)
    data = load(
        write(tmp_path / "mixed", train=pictures([pixels[0], rgb, pixels[0], rgb], [0, 1, 0, 1])), test_fraction=0.5
    )
    assert data.shape == (3, 4, 5)
    assert torch.equal(data.train.x[0], torch.from_numpy(pixels[0]).expand(3, 4, 5))
    assert torch.equal(data.train.x[1], torch.from_numpy(rgb).permute(2, 0, 1))


def test_vectors_and_pandas_style_bytes_are_found(tmp_path, pixels):
    vectors = table(embedding=[[0.5, i] for i in range(10)], target=[0, 1] * 5)
    data = load(write(tmp_path / "vectors", train=vectors))
    assert data.shape == (2,) and data.train.x[3].tolist() == [0.5, 3.0] and data.train.scale == 1
    plain = table(image=[png(p)["bytes"] for p in pixels], label=[0, 1] * 6)
    assert load(write(tmp_path / "plain", train=plain)).shape == (1, 4, 5)


@pytest.mark.parametrize(
    "keys", [("x", "y", "x_test", "y_test"), ("train_images", "train_labels", "test_images", "test_labels")]
)
def test_npz_with_and_without_test_arrays(tmp_path, pixels, keys):
    labels = np.array([5, 7] * 6)[:, None]
    arrays = dict(zip(keys, (pixels[:8], labels[:8], pixels[8:], labels[8:]), strict=True))
    np.savez(tmp_path / "some.npz", **arrays)
    data = load(str(tmp_path / "some.npz"))
    assert (data.name, data.classes, data.shape, len(data.train), len(data.test)) == ("some", 2, (1, 4, 5), 8, 4)
    np.savez(tmp_path / "more.npz", values=np.ones((10, 3)), what=np.array(list("ab") * 5))
    data = load(str(tmp_path / "more.npz"), image="values", label="what")
    assert data.train.x.dtype == torch.float32 and data.train.scale == 1 and len(data.test) == 2
    np.savez(tmp_path / "last.npz", x=np.zeros((10, 6, 4, 3), np.uint8), y=np.arange(10) % 2)
    assert load(str(tmp_path / "last.npz")).shape == (3, 6, 4)


def test_a_hub_data_set_goes_the_same_way(monkeypatch):
    import datasets

    found = datasets.DatasetDict(train=table(x=[[float(i)] for i in range(10)], y=[0, 1] * 5))
    monkeypatch.setattr(datasets, "load_dataset", lambda name: found)
    data = load("owner/set")
    assert (data.name, data.shape, len(data.test)) == ("owner/set", (1,), 2)


def test_loading_leaves_the_progress_bars_as_they_were(tmp_path, pixels, capfd):
    import datasets

    before = datasets.is_progress_bar_enabled()
    load(write(tmp_path / "faces", train=pictures(pixels, [0, 1] * 6)))
    assert datasets.is_progress_bar_enabled() == before
    assert "Generating" not in capfd.readouterr().err


def refusal(*args, **kwargs):
    with pytest.raises(DataError) as caught:
        load(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_wrong_names_are_refused_with_near_ones(tmp_path, pixels, monkeypatch):
    import datasets

    folder = write(tmp_path / "faces", train=pictures(pixels, [0, 1] * 6))
    assert "did you mean digits" in refusal("digit")
    assert "did you mean faces" in refusal(str(tmp_path / "face"))
    assert "did you mean kind" in refusal(folder, label="kin")
    assert "--set data.image=COLUMN" in refusal(folder, image="imgs")
    assert "no data at" in refusal("nowhere.npz")
    assert "give the folder" in refusal(write(tmp_path / "faces") + "/train-00000-of-00001.parquet")
    (tmp_path / "empty").mkdir()
    assert "no data set folder" in refusal(str(tmp_path / "empty"))

    def offline(name):
        raise ConnectionError("Couldn't reach\nthe hub")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    assert all(word in refusal("cifar1000") for word in ("digits", "folder", ".npz", "hub could not be reached"))


def test_data_that_does_not_fit_is_refused_with_a_remedy(tmp_path, pixels):
    unequal = pictures([pixels[0], pixels[1, :3]], [0, 1])
    assert "resize" in refusal(write(tmp_path / "unequal", train=unequal))
    nameless = write(tmp_path / "nameless", train=table(word=["a", "b"], number=[1, 2]))
    assert all(word in refusal(nameless) for word in ("word, number", "--set data.label=COLUMN"))
    text = write(tmp_path / "text", train=table(text=["long " * 50] * 4, label=[0, 1] * 2))
    assert "text" in refusal(text) and "tables" in refusal(text)
    real = write(tmp_path / "real", train=table(a=[1, 2], label=[0.5, 1.0]))
    assert "real or missing" in refusal(real)
    unlabelled = pictures(pixels[:4], [-1] * 4)
    assert "no label" in refusal(write(tmp_path / "blind", train=pictures(pixels[:4], [0] * 4), test=unlabelled))
    ragged = write(tmp_path / "ragged", train=table(x=[[1.0], [1.0, 2.0]], y=[0, 1]))
    assert "differ in length" in refusal(ragged)
    broken = table(image=[b"no image"] * 2, label=[0, 1])
    assert "image 0 cannot be read" in refusal(write(tmp_path / "broken", train=broken))
    np.savez(tmp_path / "csr.npz", indices=np.arange(3), labels=np.arange(3))
    assert "name them x and y" in refusal(str(tmp_path / "csr.npz"))
    np.savez(tmp_path / "short.npz", x=np.ones((3, 2)), y=np.arange(2))
    assert "one class for each row" in refusal(str(tmp_path / "short.npz"))
    np.savez(tmp_path / "whole.npz", x=np.ones((4, 2), int), y=np.arange(4) % 2)
    assert "uint8" in refusal(str(tmp_path / "whole.npz"))
    (tmp_path / "bad.npz").write_bytes(b"PK no zip")
    assert "cannot be read" in refusal(str(tmp_path / "bad.npz"))
    assert "at least 1" in refusal("digits", limit=0)
    assert "test_fraction" in refusal("digits", test_fraction=1.0)
