"""Data sets: every source, the views, the cache and the words of every refusal, on data made here."""

import io
import sys
import warnings

import numpy as np
import pytest
import torch
from fedforward.simulations import datasets as ours
from fedforward.simulations.datasets import DataError, Samples, load, partition, split
from PIL import Image


@pytest.fixture(autouse=True)
def _caches(tmp_path, monkeypatch):
    """Keep every cache, ours and that of `datasets`, inside the test."""
    import datasets

    monkeypatch.setenv("FEDFORWARD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    ours._load.cache_clear()


def table(**columns):
    import datasets

    features = columns.pop("features", None)
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features) if features else None)


def write(folder, **splits):
    folder.mkdir(exist_ok=True)
    for name, rows in splits.items():
        rows.to_parquet(folder / f"{name}-00000-of-00001.parquet")
    return str(folder)


def png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


def pictures(pixels, labels, names="abc", **columns):
    from datasets import ClassLabel, Value
    from datasets import Image as ImageFeature

    features = {"img": ImageFeature(), "kind": ClassLabel(names=list(names)), **{c: Value("string") for c in columns}}
    return table(img=[png(p) for p in pixels], kind=labels, **columns, features=features)


@pytest.fixture
def pixels():
    return np.random.default_rng(0).integers(0, 256, (12, 4, 5), np.uint8)


def test_digits_are_built_in_stratified_and_free_the_second_time():
    data = load("digits")
    assert (data.name, data.classes, data.shape) == ("digits", 10, (1, 8, 8))
    assert len(data.train) + len(data.test) == 1797
    assert not set(data.train.index.tolist()) & set(data.test.index.tolist())
    share = data.test.y[data.test.index].bincount() / data.test.y.bincount()
    assert share.sub(0.2).abs().max() < 0.01
    x, y = data.train.batch(torch.arange(len(data.train)))
    assert x.dtype == torch.float32 and (x.min(), x.max()) == (0, 1) and y.dtype == torch.int64
    assert load("digits") is data
    assert not torch.equal(load("digits", seed=1).test.index, data.test.index)


def test_a_batch_owns_its_memory_and_a_subset_copies_nothing():
    samples = Samples(torch.rand(6, 3), torch.arange(6), torch.tensor([5, 3, 1]), 1.0)
    x, y = samples.batch(torch.tensor([2, 0]))
    assert y.tolist() == [1, 5] and torch.equal(x, samples.x[[1, 5]])
    before = samples.x.clone()
    x.zero_()
    assert torch.equal(samples.x, before)
    part = samples.subset(torch.tensor([1, 2]))
    assert len(part) == 2 and part.index.tolist() == [3, 1]
    assert part.x.data_ptr() == samples.x.data_ptr()
    whole, _ = part.batch(torch.arange(2))
    assert whole.untyped_storage().nbytes() == whole.numel() * 4


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


def test_the_cache_spares_datasets_and_heals_itself(tmp_path, pixels, monkeypatch, caplog):
    import datasets

    folder = write(tmp_path / "faces", train=pictures(pixels, [0, 1] * 6))
    first = load(folder)
    assert not list((tmp_path / "cache").glob("*.tmp"))
    ours._load.cache_clear()
    with monkeypatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("error")
        patch.setattr(datasets, "load_dataset", None)
        second = load(folder)
    assert torch.equal(first.train.x, second.train.x) and torch.equal(first.test.index, second.test.index)
    for suffix, damage in (("npy", b""), ("npz", b""), ("npy", None), ("npz", b"no zip"), ("npy", b"no array")):
        (file,) = (tmp_path / "cache").glob(f"faces*.{suffix}")
        whole = file.read_bytes()
        file.unlink()  # the first load still maps the old file
        file.write_bytes(whole[: len(whole) // 2] if damage is None else damage)
        ours._load.cache_clear()
        assert torch.equal(load(folder).train.x, first.train.x)
        assert file.stat().st_size == len(whole)
    assert "broken cache" in caplog.text


def test_changed_files_are_noticed(tmp_path, pixels):
    folder = write(tmp_path / "faces", train=pictures(pixels, [0, 1] * 6))
    load(folder)
    write(tmp_path / "faces", train=pictures(pixels[:10], [0, 1] * 5))
    assert len(load(folder).train.x) == 10


def test_without_a_writable_cache_data_stays_in_memory(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FEDFORWARD_CACHE", str(tmp_path / "file"))
    assert len(load("digits").train.x) == 1797
    assert "set FEDFORWARD_CACHE" in caplog.text


def test_a_table_is_standardised_by_its_train_split_alone(tmp_path):
    train = table(
        a=[1.0, 3.0, None, 5.0], same=[7, 7, 7, 7], kind=["x", "y", "x", "y"], attack=["no", "smurf", "no", "smurf"]
    )
    test = table(a=[100.0, 3.0], same=[9, 7], kind=["z", "x"], attack=["no", "back"])
    data = load(write(tmp_path / "net", train=train, test=test), label="attack")
    assert (data.shape, data.classes) == ((4,), 3)
    assert data.train.y.tolist() == [1, 2, 1, 2, 1, 0]  # back < no < smurf, both splits together
    x, _ = data.train.batch(torch.arange(4))
    a = torch.tensor([1.0, 3.0, 3.0, 5.0])
    assert torch.allclose(x[:, 0], (a - 3) / torch.tensor([1.0, 3.0, 5.0]).std(correction=0))
    assert x[:, 1].eq(0).all() and x[:, 2:].tolist() == [[1, 0], [0, 1], [1, 0], [0, 1]]
    assert data.test.batch(torch.tensor([0]))[0][0, 2:].tolist() == [0, 0]  # a category that training never saw
    assert sorted(data.columns) == ["a", "kind", "same"]


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


def test_limit_keeps_random_train_rows_with_their_columns(tmp_path, pixels):
    owner = [f"w{i}" for i in range(12)]
    folder = write(tmp_path / "faces", train=pictures(pixels, [0, 1] * 6, owner=owner))
    full, few = load(folder), load(folder, limit=4)
    assert len(few.train) == 4 and torch.equal(few.test.index, full.test.index)
    assert few.columns["owner"].tolist() == [owner[i] for i in few.train.index]
    assert set(few.train.index.tolist()) < set(full.train.index.tolist())
    assert len(load(folder, limit=99).train) == len(full.train)


def test_classes_only_the_test_split_has_are_told(tmp_path, pixels, caplog):
    load(write(tmp_path / "faces", train=pictures(pixels[:8], [0, 1] * 4), test=pictures(pixels[8:], [2] * 4)))
    assert "faces: 1 of 3 classes" in caplog.text


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


def test_loading_leaves_the_progress_bars_as_they_were(tmp_path, pixels, capfd):
    import datasets

    before = datasets.is_progress_bar_enabled()
    load(write(tmp_path / "faces", train=pictures(pixels, [0, 1] * 6)))
    assert datasets.is_progress_bar_enabled() == before
    assert "Generating" not in capfd.readouterr().err


def test_split_holds_back_a_share_and_never_everything():
    rows = torch.arange(100, 120)
    train, held = split(rows, 0.25, seed=3, client=1)
    assert (len(train), len(held)) == (15, 5) and sorted(torch.cat([train, held]).tolist()) == rows.tolist()
    assert torch.equal(held, split(rows, 0.25, seed=3, client=1)[1])
    assert not torch.equal(held, split(rows, 0.25, seed=3, client=2)[1])
    assert [len(part) for part in split(rows[:1], 0.9, 0, 0)] == [1, 0]
    assert [len(part) for part in split(rows[:2], 0.01, 0, 0)] == [1, 1]
    assert [len(part) for part in split(rows, 0.0, 0, 0)] == [20, 0]
    with pytest.raises(DataError, match="below 1"):
        split(rows, 1.0, 0, 0)


def test_partition_speaks_of_rows_of_the_train_view():
    data = load("digits", limit=50)
    parts = partition(data, "iid", 5, seed=0)
    assert sorted(torch.cat(parts).tolist()) == list(range(50))
    assert data.train.subset(parts[0]).batch(torch.arange(10))[0].shape == (10, 1, 8, 8)
    assert "flwr_datasets" in sys.modules
