"""The scalar wire: rounds down and answers up, as bytes that a device can check.

    news     down  checksum, terms, round it brings to, sizes  |  ledger  |  rounds      little-endian
    answer   up    checksum, round, fingerprint of the model it was found at  |  scalars float32

A checksum covers all that comes after it. The terms are what both sides must agree on before a number means anything:
how many parameters there are, the length σ of a perturbation and the stream of signs. They are the server's to set and
come with every message, in 24 bytes.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from struct import Struct, error, unpack_from
from typing import Any, NamedTuple
from zlib import crc32

import numpy as np
import torch
from torch import Tensor

from .algorithms.directions import stream_hash
from .algorithms.replica import FINGERPRINT, Answer, ScalarRound
from .algorithms.rule import Tensors
from .algorithms.scalar_rule import ScalarRule

UNSAID = bytes(FINGERPRINT)  # in place of a fingerprint: the answer was found in the server's own process
_CHECK = Struct("<I")
_TERMS = Struct("<Qd8s")  # dimension, sigma, beginning of the hash of the sign stream
_NEWS = Struct("<II")  # the round that a model or ledger is as of, bytes of the ledger
_ROUND = Struct("<IdI")  # round, learning rate, answers
_ANSWER = Struct("<ifI")  # client, weight, scalars
_REPLY = Struct(f"<I{FINGERPRINT}s")  # round, fingerprint
ANSWER_BYTES = _CHECK.size + _REPLY.size  # of an answer, beside its scalars
NEWS_BYTES = _CHECK.size + _TERMS.size + _NEWS.size  # of news, beside what they bring


class Garbled(ValueError):
    """Bytes are not what was sent, or not meant for this run."""


class Terms(NamedTuple):
    """What a server and its clients must agree on."""

    dimension: int  # parameters
    sigma: float  # length of a perturbation; 0 for a rule without
    stream: bytes  # 8 bytes

    @classmethod
    def of(cls, rule: ScalarRule, params: Tensors) -> Terms:
        """Return the terms of a rule on a model; only shapes are looked at."""
        return cls(sum(p.numel() for p in params.values()), float(getattr(rule, "sigma", 0.0)), _stream())

    def objection(self, own: Terms) -> str | None:
        """Return why a client of its `own` terms cannot take part, in one line, or None."""
        if self.dimension != own.dimension:
            return f"the server has {self.dimension:,} parameters, this client {own.dimension:,}: give both one model"
        if self.sigma != own.sigma:
            return f"the server perturbs by sigma {self.sigma:g}, this client by {own.sigma:g}: give both one rule"
        if self.stream != own.stream:
            return "this client draws other signs than the server: give both one version of NumPy and of this package"
        return None


@cache
def _stream() -> bytes:
    return bytes.fromhex(stream_hash())[:8]


class News(NamedTuple):
    """What brings a client from the model it holds to the server's."""

    terms: Terms
    done: int  # the round whose model or ledger comes along, if one does
    ledger: bytes
    rounds: tuple[ScalarRound, ...]  # in their order

    def encode(self) -> bytes:
        """Return the news as bytes."""
        return encode_news(self.terms, self.done, self.ledger, map(encode_round, self.rounds))


def encode_news(terms: Terms, done: int, ledger: bytes, rounds: Iterable[bytes]) -> bytes:
    """Return news of rounds that are encoded already."""
    return _checked(_TERMS.pack(*terms) + _NEWS.pack(done, len(ledger)) + ledger + b"".join(rounds))


def decode_news(data: bytes) -> News:
    """Return the news of `encode_news`.

    Raises:
        Garbled: if not a byte may be trusted.
    """
    data = _verified(data)
    try:
        terms = Terms(*_TERMS.unpack_from(data))
        done, size = _NEWS.unpack_from(data, _TERMS.size)
        place = _TERMS.size + _NEWS.size + size
        ledger, rounds = data[place - size : place], []
        while place < len(data):
            entry, place = _decode_round(data, place)
            rounds.append(entry)
    except (error, ValueError) as failure:
        raise Garbled(f"the news end too soon ({failure})") from None
    return News(terms, done, ledger, tuple(rounds))


def encode_round(entry: ScalarRound) -> bytes:
    """Return a round as bytes, see `round_bytes`: 16, and for each answer 12 and 4 a scalar."""
    parts = [_ROUND.pack(entry.round, entry.lr, len(entry.answers))]
    for answer in entry.answers:
        parts += [_ANSWER.pack(answer.client, answer.weight, len(answer.scalars)), _to_bytes(answer.scalars)]
    return b"".join(parts)


def round_bytes(scalars: Iterable[int]) -> int:
    """Return the bytes of a round of answers that hold so many scalars each."""
    return _ROUND.size + sum(_ANSWER.size + 4 * count for count in scalars)


def decode_round(data: bytes) -> ScalarRound:
    """Return the round of `encode_round`."""
    return _decode_round(data, 0)[0]


def _decode_round(data: bytes, place: int) -> tuple[ScalarRound, int]:
    number, lr, count = _ROUND.unpack_from(data, place)
    place += _ROUND.size
    answers = []
    for _ in range(count):
        client, weight, size = _ANSWER.unpack_from(data, place)
        place += _ANSWER.size
        answers.append(Answer(client, weight, _from_bytes(data[place : place + 4 * size], size)))
        place += 4 * size
    return ScalarRound(number, lr, tuple(answers)), place


def encode_answer(scalars: Tensor, server_round: int, fingerprint: bytes = UNSAID) -> bytes:
    """Return a client's scalars (n,) as 16 + 4·n bytes, with the round and the model that they answer."""
    return _checked(_REPLY.pack(server_round, fingerprint) + _to_bytes(scalars))


def decode_answer(data: bytes) -> tuple[int, bytes, Tensor]:
    """Return (round, fingerprint, scalars) of `encode_answer`.

    Raises:
        Garbled: if not a byte may be trusted.
    """
    data = _verified(data)
    if len(data) < _REPLY.size or (len(data) - _REPLY.size) % 4:
        raise Garbled(f"an answer of {len(data)} B is not one")
    server_round, fingerprint = _REPLY.unpack_from(data)
    return server_round, fingerprint, _from_bytes(data[_REPLY.size :], (len(data) - _REPLY.size) // 4)


def _to_bytes(scalars: Tensor) -> bytes:
    return scalars.detach().cpu().numpy().astype("<f4").tobytes()


def _from_bytes(data: bytes, count: int) -> Tensor:
    if len(data) != 4 * count:
        raise Garbled(f"{count} scalars were announced, and {len(data)} B came")
    return torch.from_numpy(np.frombuffer(data, "<f4").astype(np.float32))


def _checked(data: bytes) -> bytes:
    return _CHECK.pack(crc32(data)) + data


def _verified(data: Any) -> bytes:
    """Return what a checksum covers."""
    if not isinstance(data, bytes) or len(data) < _CHECK.size or unpack_from("<I", data)[0] != crc32(data[4:]):
        raise Garbled("the checksum is not that of what came")
    return data[_CHECK.size :]
