"""Repetitions that are alike: from the third on each takes the memory and the arithmetic of the one before it.

Rules that settle or search repeat the same operations up to hundreds of times a step. Who only asks what a step would
take need not see them all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

Watch = Callable[[range], Iterable[int]]
_watch: ContextVar[Watch | None] = ContextVar("watch", default=None)


def alike(count: int) -> Iterable[int]:
    """Return 0 … count − 1, or of them what `watched` leaves."""
    watch = _watch.get()
    return watch(range(count)) if watch else range(count)


@contextmanager
def watched(watch: Watch) -> Iterator[None]:
    """Let `watch` choose which repetitions run while this is open."""
    token = _watch.set(watch)
    try:
        yield
    finally:
        _watch.reset(token)
