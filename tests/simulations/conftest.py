"""Fixtures of the data tests."""

import numpy as np
import pytest
from fedforward.simulations import datasets as ours


@pytest.fixture
def own_caches(tmp_path, monkeypatch):
    """Keep every cache, ours and that of `datasets`, inside the test."""
    import datasets

    monkeypatch.setenv("FEDFORWARD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    ours._load.cache_clear()


@pytest.fixture
def pixels():
    return np.random.default_rng(0).integers(0, 256, (12, 4, 5), np.uint8)
