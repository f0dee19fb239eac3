"""What a server keeps of the scalars it was sent: the rounds that clients may have missed, and their averages.

A client that comes back is told of the rounds it missed, or given the coefficients of the ledger, or a model: whatever
is fewest bytes. Rounds that nobody would be told of any more, since something else is smaller, are forgotten, so that
a client that never comes back pins nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence

import torch
from flwr.app import ConfigRecord, RecordDict
from torch import Tensor

from .. import message_bytes, protocol
from ..algorithms.replica import Answer, Replica, ScalarRound
from ..algorithms.rule import Tensors
from ..algorithms.scalar_rule import ScalarRule
from ..scalar_wire import Terms, encode_news, encode_round

UNKNOWN = -1  # the round whose model a client holds, if it holds none


class History:
    """The last rounds of a run.

    Args:
        rule: the scalar rule.
        initial: the model before the first round; only shapes are looked at.
        known: every client can make the initial model itself, of the run seed.
    """

    def __init__(self, rule: ScalarRule, initial: Mapping[str, Tensor], known: bool) -> None:
        self.rule, self.known = rule, known
        self.terms = Terms.of(rule, dict(initial))
        self.done = 0
        self._rounds: deque[bytes] = deque()  # encoded; the last is round `done`

    def add(self, entry: ScalarRound, most: int) -> None:
        """Remember a round, and forget what is no longer worth telling.

        Args:
            entry: the round after the last.
            most: bytes of what a client could be given instead of all rounds that are remembered.
        """
        self.done = entry.round
        self._rounds.append(encode_round(entry))
        while self._rounds and sum(map(len, self._rounds)) > most:
            self._rounds.popleft()

    def news(self, held: int, replica: Replica, model: RecordDict) -> RecordDict:
        """Return the least that brings a client from the model of round `held` to the one after the last round.

        Args:
            held: the round whose model it holds; 0: the initial one; `UNKNOWN`: none.
            replica: the server's own, as of the last round.
            model: a message's records with the server's model, to take it from and to say the rest.
        """
        return min(self.ways(held, replica, model), key=message_bytes.payload_bytes)

    def ways(self, held: int, replica: Replica, model: RecordDict) -> list[RecordDict]:
        """Return all that brings a client from the model of round `held` to the last; see `news`."""
        rest = {name: record for name, record in model.items() if name != protocol.ARRAYS}
        held = 0 if held == UNKNOWN and self.known else held
        ways, missed = [], self.done - held
        if held != UNKNOWN and missed <= len(self._rounds):
            ways.append(self._records({}, b"", list(self._rounds)[len(self._rounds) - missed :], rest))
        ledger = replica.ledger.to_bytes() if replica.ledger else b""
        if ledger and held != UNKNOWN and self.rule.base(held + 1) == replica.ledger.base:
            ways.append(self._records({}, ledger, [], rest))
        return [*ways, self._records(replica.arrays(), ledger, [], rest)]

    def _records(self, arrays: Tensors, ledger: bytes, rounds: list[bytes], rest: dict) -> RecordDict:
        news = ConfigRecord({"values": encode_news(self.terms, self.done, ledger, rounds)})
        first = {protocol.ARRAYS: protocol.encode_params(arrays)} if arrays else {}
        return RecordDict({**first, protocol.NEWS: news, **rest})


def most_worth_telling(replica: Replica) -> int:
    """Return the bytes of the most that is given instead of rounds: of a ledger, perhaps with its w₀, or of a model."""
    arrays = sum(t.numel() * t.element_size() for t in replica.arrays().values())
    if replica.ledger:
        return replica.ledger.size + (arrays if replica.rule.rebase else 0)
    return arrays


# ---- aggregation ----------------------------------------------------------------------------------------------------


def average(answers: Sequence[Answer]) -> Tensor:
    """Return the mean of scalars by samples; a client that took fewer steps has no say in the later ones.

    The sum runs in float64 over answers in the order given, so that it does not depend on who answered first.
    """
    total = torch.zeros(max(len(answer.scalars) for answer in answers), dtype=torch.float64)
    weight = torch.zeros_like(total)
    for answer in answers:
        total[: len(answer.scalars)] += answer.weight * answer.scalars.double()
        weight[: len(answer.scalars)] += answer.weight
    return (total / weight).float()


def median(answers: Sequence[Answer]) -> Tensor:
    """Return the median of each scalar over the clients that sent it (Yin et al., arXiv 1803.01498, ICML 2018)."""
    return _each(answers, lambda column: column.quantile(0.5))


def trimmed(answers: Sequence[Answer], part: float) -> Tensor:
    """Return the mean of each scalar without its largest and smallest, the given part at either end (Yin et al.)."""

    def mean(column: Tensor) -> Tensor:
        cut = int(part * len(column))
        return column.sort().values[cut : len(column) - cut].mean()

    return _each(answers, mean)


def krum(answers: Sequence[Answer], bad: int) -> Tensor:
    """Return the answer that is nearest to its n − bad − 2 nearest others (Blanchard et al., NeurIPS 2017).

    Answers are compared where all have scalars. Of equal ones the first is taken.
    """
    common = min(len(answer.scalars) for answer in answers)
    points = torch.stack([answer.scalars[:common].double() for answer in answers])
    near = max(len(answers) - bad - 2, 1)
    scores = torch.cdist(points, points).square().sort(1).values[:, 1 : near + 1].sum(1)
    return answers[int(scores.argmin())].scalars


def _each(answers: Sequence[Answer], of: Callable[[Tensor], Tensor]) -> Tensor:
    """Return a function of each scalar's values over the clients that sent it, in float64."""
    longest = max(len(answer.scalars) for answer in answers)
    columns = ([a.scalars[i] for a in answers if i < len(a.scalars)] for i in range(longest))
    return torch.stack([of(torch.stack(column).double()) for column in columns]).float()
