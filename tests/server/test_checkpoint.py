"""A checkpoint holds the model and all that a strategy remembers, or says what it cannot hold."""

import io
import threading

import numpy as np
import pytest
from fedforward.server import checkpoint
from flwr.app import Array, ArrayRecord
from flwr.serverapp.strategy import FedAdam, FedAvg


def test_model_and_strategy_come_back(tmp_path):
    arrays = ArrayRecord({"0.w": Array(np.arange(6, dtype=np.float32).reshape(2, 3)), "0.b": Array(np.float32([7]))})
    strategy = FedAdam(eta=0.3)
    strategy.m_t = [np.array([1.5, 2.5])]
    file = io.BytesIO()
    checkpoint.dump(4, arrays, checkpoint.freeze(strategy), file)
    saved = checkpoint.load(file.getvalue())
    assert saved.round == 4 and list(saved.arrays) == ["0.w", "0.b"]
    assert saved.arrays["0.w"].numpy().tolist() == arrays["0.w"].numpy().tolist()
    assert saved.strategy["eta"] == 0.3 and saved.strategy["m_t"][0].tolist() == [1.5, 2.5]


def test_what_cannot_be_saved_is_named():
    strategy = FedAvg()
    strategy.guard = threading.Lock()
    strategy.sizes = [1, 2]
    with pytest.raises(TypeError, match=r"cannot be saved in a checkpoint: guard$"):
        checkpoint.freeze(strategy)
