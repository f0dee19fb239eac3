"""How a client comes by a model that no message holds: of the one it has, and the news.

A node that trains by scalars keeps a replica of the model in its own state, as of the last round it was told of. News
bring it to the server's model bit for bit. A replica that has taken a round does not take it twice, and one that would
have to skip a round says so, and is given more the next time.
"""

from __future__ import annotations

from collections.abc import Callable

from flwr.app import ConfigRecord, Message, RecordDict

from .. import protocol
from ..algorithms.replica import Replica, TornHistory, fingerprint
from ..algorithms.rule import Tensors
from ..scalar_wire import Garbled, News, Terms, decode_news

KEPT = "fedforward-replica"  # in a node's state: arrays, and how far they have come


class OutOfStep(RuntimeError):
    """A client cannot follow the server; the message says why, and the server sends it more."""


def follow(message: Message, state: RecordDict, begin: Callable[[], Replica]) -> tuple[Tensors, bytes]:
    """Return (the model that a message's news lead to, its fingerprint), and keep in `state` what it takes to go on.

    Args:
        message: with news.
        state: the node's own; anything else in it is left alone.
        begin: makes a replica as of before the first round.

    Raises:
        OutOfStep: if the news lead nowhere; `state` is as it was.
    """
    try:
        news, replica = decode_news(message.content[protocol.NEWS]["values"]), begin()
        if objection := news.terms.objection(Terms.of(replica.rule, replica.state.params)):
            raise OutOfStep(objection)
        if KEPT in state:
            replica.become(*_kept(state))
        if news.done > replica.done or KEPT not in state:
            _take(replica, news, message.content.array_records)
        for entry in news.rounds:
            replica.take(entry)
    except (Garbled, TornHistory, ValueError) as error:
        raise OutOfStep(f"cannot follow the server: {error}") from error
    state[KEPT] = protocol.encode_params({key: t.clone() for key, t in replica.arrays().items()})
    state[f"{KEPT}-at"] = ConfigRecord({"round": replica.done, "ledger": _ledger(replica)})
    params = replica.current()
    return params, fingerprint(params)


def _take(replica: Replica, news: News, arrays: dict) -> None:
    """Take the model or the ledger that comes with the news, if one does."""
    if arrays or news.ledger:
        replica.become(news.done, protocol.decode_params(protocol.only(arrays)) if arrays else None, news.ledger)


def _kept(state: RecordDict) -> tuple[int, Tensors, bytes]:
    at = state[f"{KEPT}-at"]
    return at["round"], protocol.decode_params(state[KEPT]), at["ledger"]


def _ledger(replica: Replica) -> bytes:
    return replica.ledger.to_bytes() if replica.ledger else b""
