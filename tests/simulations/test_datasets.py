"""Data sets: views, tables, splits and the options of `load`, on data made here."""

import sys

import pytest
import torch
from fedforward.simulations.datasets import DataError, Samples, load, partition, split
from made_data import pictures, table, write

pytestmark = pytest.mark.usefixtures("own_caches")


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


def test_columns_are_dropped_and_one_label_stands_against_all_others(tmp_path):
    train = table(a=[1.0, 2.0, 3.0, 4.0], level=[1, 2, 1, 2], attack=["normal", "smurf", "back", "normal"])
    folder = write(tmp_path / "net", train=train, test=table(a=[5.0], level=[1], attack=["worm"]))
    data = load(folder, label="attack", negative="normal", drop=["level"])
    assert (data.classes, data.shape, list(data.columns)) == (2, (1,), ["a"])
    assert data.train.y.tolist() == [0, 1, 1, 0, 1]
    full = load(folder, label="attack")  # from the same cache
    assert (full.classes, full.shape, list(full.columns)) == (4, (2,), ["a", "level"])
    with pytest.raises(DataError, match="nothing to learn it from"):
        load(folder, label="attack", drop=["a", "level"])
    with pytest.raises(DataError, match=r"no column 'levle'.*did you mean level.*data.drop=..COLUMN"):
        load(folder, label="attack", drop=["levle"])
    with pytest.raises(DataError, match=r"no label 'norm'.*did you mean normal.*data.negative=LABEL"):
        load(folder, label="attack", negative="norm")
    assert load("digits", negative=3).train.y.bincount().tolist() == [183, 1797 - 183]


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


def test_images_are_turned_and_brought_to_mean_0_and_deviation_1():
    plain, turned, unit = load("digits"), load("digits", rotate=90), load("digits", standardize=True)
    rows = torch.arange(len(plain.train))
    x, moved, standard = (data.train.batch(rows)[0] for data in (plain, turned, unit))
    assert torch.equal(moved, x.rot90(1, (2, 3))) and not torch.equal(moved, x)
    assert abs(standard.mean()) < 1e-5 and abs(standard.std(correction=0) - 1) < 1e-5
    torch.testing.assert_close(standard, (x - x.mean()) / x.std(correction=0), rtol=1e-4, atol=1e-4)
    assert abs(unit.test.batch(torch.arange(len(unit.test)))[0].mean()) > 1e-5  # by the train split's numbers
    with pytest.raises(DataError, match="no quarter turn"):
        load("digits", rotate=45)


def test_images_are_scaled_and_keep_their_type_and_their_mean():
    plain, small, large = load("digits"), load("digits", resize=4), load("digits", resize=10)
    assert (small.shape, large.shape, small.train.x.dtype) == ((1, 4, 4), (1, 10, 10), plain.train.x.dtype)
    rows = torch.arange(len(plain.train))
    x, scaled = plain.train.batch(rows)[0], small.train.batch(rows)[0]
    pooled = torch.nn.functional.avg_pool2d(x, 2)
    assert torch.corrcoef(torch.stack([scaled.flatten(), pooled.flatten()]))[0, 1] > 0.95
    assert abs(scaled.mean() - x.mean()) < 0.01
    with pytest.raises(DataError, match="no width of an image"):
        load("digits", resize=-1)
