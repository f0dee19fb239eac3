"""The server's state after a round, as bytes: the model and whatever the strategy remembers."""

from __future__ import annotations

import io
import pickle
from typing import IO, Any, NamedTuple

from flwr.app import Array, ArrayRecord
from flwr.serverapp.strategy import Strategy


class Checkpoint(NamedTuple):
    """What a resumed run starts from."""

    round: int
    arrays: ArrayRecord
    frozen: bytes  # the strategy's attributes, as they were when the round ended

    @property
    def strategy(self) -> dict[str, Any]:
        """The strategy's attributes."""
        return pickle.loads(self.frozen)


class _Pickler(pickle.Pickler):
    """Pickles Flower's arrays by value: after a transfer they cache views of memory that cannot be pickled."""

    def reducer_override(self, item: Any) -> Any:
        if type(item) is Array:
            return Array, (item.dtype, tuple(item.shape), item.stype, bytes(item.data))
        return NotImplemented


def freeze(strategy: Strategy) -> bytes:
    """Return what a strategy remembers, as bytes.

    Raises:
        TypeError: if it keeps something that cannot be pickled, naming the attribute.
    """
    attributes = vars(strategy)
    try:
        return _pickle(attributes)
    except (pickle.PicklingError, TypeError, AttributeError):
        guilty = [name for name, value in attributes.items() if not _picklable(value)]
        raise TypeError(f"it keeps what cannot be saved in a checkpoint: {', '.join(guilty)}") from None


def dump(server_round: int, arrays: ArrayRecord, frozen: bytes, file: IO[bytes]) -> None:
    """Write the checkpoint to a file; `frozen` is the strategy. The model goes there without a copy."""
    _Pickler(file, protocol=5).dump(Checkpoint(server_round, arrays, frozen))


def load(data: bytes) -> Checkpoint:
    """Return the checkpoint written by `dump`. Only open your own: it is a pickle."""
    return pickle.loads(data)


def _pickle(item: Any) -> bytes:
    buffer = io.BytesIO()
    _Pickler(buffer, protocol=5).dump(item)
    return buffer.getvalue()


def _picklable(item: Any) -> bool:
    try:
        _pickle(item)
    except (pickle.PicklingError, TypeError, AttributeError):
        return False
    return True
