"""What crosses the scalar wire arrives as it was sent, or is told from what was."""

import random

import pytest
import torch
from fedforward.algorithms import Baffle
from fedforward.algorithms.replica import Answer, ScalarRound
from fedforward.scalar_wire import (
    ANSWER_BYTES,
    NEWS_BYTES,
    Garbled,
    News,
    Terms,
    decode_answer,
    decode_news,
    decode_round,
    encode_answer,
    encode_round,
    round_bytes,
)

PARAMS = {"0.weight": torch.zeros(3, 4), "0.bias": torch.zeros(3)}
TERMS = Terms.of(Baffle(sigma=0.002), PARAMS)


def rounds():
    wild = torch.tensor([float("inf"), -0.0, 1e-45, 3.0])
    return (
        ScalarRound(7, 0.1, (Answer(-1, 1.0, torch.randn(5)),)),
        ScalarRound(8, 1 / 3, ()),
        ScalarRound(9, 1e-9, (Answer(0, 12.0, wild), Answer(2**31 - 1, 5.0, torch.empty(0)))),
    )


def same(a, b):
    return (a.round, a.lr, len(a.answers)) == (b.round, b.lr, len(b.answers)) and all(
        (x.client, x.weight) == (y.client, y.weight) and x.scalars.numpy().tobytes() == y.scalars.numpy().tobytes()
        for x, y in zip(a.answers, b.answers, strict=True)
    )


def test_scalars_survive_the_wire_to_the_bit():
    scalars = torch.randn(1000)
    scalars[:4] = torch.tensor([float("inf"), float("nan"), -0.0, 1e-45])
    data = encode_answer(scalars, 12, b"12345678")
    server_round, fingerprint, back = decode_answer(data)
    assert (server_round, fingerprint, len(data)) == (12, b"12345678", 4000 + ANSWER_BYTES) and ANSWER_BYTES == 16
    assert back.numpy().tobytes() == scalars.numpy().tobytes()
    assert data[16:20] == b"\x00\x00\x80\x7f"  # little-endian float32


@pytest.mark.parametrize("ledger", [b"", b"coefficients"])
def test_news_survive_the_wire(ledger):
    news = News(TERMS, 6, ledger, rounds())
    data = news.encode()
    back = decode_news(data)
    assert (back.terms, back.done, back.ledger) == (TERMS, 6, ledger)
    assert len(back.rounds) == 3 and all(map(same, back.rounds, news.rounds))
    assert len(data) == NEWS_BYTES + len(ledger) + sum(
        round_bytes(len(answer.scalars) for answer in entry.answers) for entry in news.rounds
    )
    assert all(same(decode_round(encode_round(entry)), entry) for entry in news.rounds)


def test_whatever_is_changed_or_cut_off_is_noticed():
    draws, answer = random.Random(0), encode_answer(torch.randn(9), 1)
    for data, decode in ((News(TERMS, 6, b"x", rounds()).encode(), decode_news), (answer, decode_answer)):
        for _ in range(200):
            place, bit = draws.randrange(len(data)), 1 << draws.randrange(8)
            with pytest.raises(Garbled, match="checksum"):
                decode(data[:place] + bytes([data[place] ^ bit]) + data[place + 1 :])
            with pytest.raises(Garbled, match="checksum"):
                decode(data[:place])
    with pytest.raises(Garbled):
        decode_news("no bytes")


def test_terms_name_what_differs():
    assert Terms(15, 0.002, TERMS.stream) == TERMS and TERMS.objection(TERMS) is None
    for other, words in (
        (
            Terms.of(Baffle(sigma=0.002), {"0.weight": torch.zeros(4, 4)}),
            "the server has 15 parameters, this client 16",
        ),
        (Terms.of(Baffle(sigma=0.001), PARAMS), "perturbs by sigma 0.002, this client by 0.001"),
        (TERMS._replace(stream=b"\0" * 8), "draws other signs"),
    ):
        assert words in TERMS.objection(other)
