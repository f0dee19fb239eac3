"""The cache spares decoding, notices changes, heals itself and is never needed."""

import warnings

import pytest
import torch
from fedforward.simulations import datasets as ours
from fedforward.simulations.datasets import load
from made_data import pictures, write

pytestmark = pytest.mark.usefixtures("own_caches")


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
