"""A model that is followed from afar: rounds of scalars in, the same bits as everybody's out.

A round of a scalar rule is its number, its learning rate and the answers that counted. Directions follow from the run
seed, so whoever holds the initial model, or any later one, and takes the rounds since then in their order arrives at
the server's model bit for bit, on any machine. The server follows its own rounds with this very class.

A rule with new directions in every step leaves no other way than to take them all: its replica is a model. A rule whose
directions come from a pool has a shorter one, a coefficient a candidate: see `ledger`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from hashlib import blake2b
from typing import NamedTuple

import torch
from torch import Tensor

from .directions import SHARED
from .ledger import Ledger
from .rule import State, Tensors
from .scalar_rule import ScalarRule
from .seeds import Place

FINGERPRINT = 8  # bytes
SLOT = "slot/"  # before the key of what a rule keeps beside the model, where both travel


class TornHistory(RuntimeError):
    """Rounds are missing between what a replica holds and what it is given."""


class Answer(NamedTuple):
    """The scalars of one client, or of all who share directions."""

    client: int  # whose directions they are along, or `SHARED`
    weight: float  # its samples
    scalars: Tensor  # (steps · n,) float32; in a round, (steps · m,) of them are passed on


class ScalarRound(NamedTuple):
    """One round of the history."""

    round: int  # from 1
    lr: float
    answers: tuple[Answer, ...]


class Replica:
    """A model as of the end of some round.

    Args:
        rule: the scalar rule that all clients run, with the pool, momentum and decay of its ledger.
        seed: the run seed.
        params: the model before the first round, owned from now on.

    Attributes:
        done: the last round that has been taken.
        state: the model, as of then where there is no ledger (see `current`), and what the rule keeps beside it.
        ledger: of a rule with a pool.
    """

    def __init__(self, rule: ScalarRule, seed: int, params: Tensors) -> None:
        self.rule, self.seed, self.done = rule, seed, 0
        self.state = State(params, {}, rule.slots(params))
        self.ledger = Ledger(rule, seed, params) if rule.pool else None

    def take(self, entry: ScalarRound) -> bool:
        """Go on by one round; return False, and change nothing, if it has been taken already.

        Raises:
            TornHistory: if a round before it has not.
        """
        if entry.round <= self.done:
            return False
        if entry.round > self.done + 1:
            raise TornHistory(f"it holds round {self.done}, and is told of round {entry.round}")
        take_round(self.ledger or self.rule, self.state, self.seed, entry)
        self.done = entry.round
        if self.ledger and self.rule.base(entry.round + 1) != self.rule.base(entry.round):
            self.ledger.rebase(self.current())
        return True

    def current(self) -> Tensors:
        """Return the model after the rounds taken, to look at; made of the ledger if there is one."""
        if self.ledger:
            self.ledger.write(self.state.params)
        return self.state.params

    def arrays(self) -> Tensors:
        """Return the arrays that another needs, beside a ledger, to become as this one is; not to be changed."""
        if self.ledger:
            return self.ledger.origin
        return self.state.params | {f"{SLOT}{key}": slot for key, slot in self.state.slots.items()}

    def become(self, done: int, arrays: Tensors | None, ledger: bytes) -> None:
        """Become as another is after round `done`.

        Args:
            done: the round.
            arrays: the other's, or None if this one has them already.
            ledger: the other's, as bytes; empty without one.

        Raises:
            ValueError: if they are not those of a replica of this rule and model.
        """
        if arrays is not None and _shapes(arrays) != _shapes(self.arrays()):
            raise ValueError(f"arrays {', '.join(arrays)} are not those of a replica of this rule and model")
        if self.ledger:
            self.ledger.from_bytes(ledger, arrays)
        elif arrays is not None:
            for key, own in self.arrays().items():
                own.copy_(arrays[key])
        self.done = done


def _shapes(arrays: Tensors) -> dict[str, torch.Size]:
    return {key: t.shape for key, t in arrays.items()}


def take_round(into: ScalarRule | Ledger, state: State, seed: int, entry: ScalarRound) -> None:
    """Descend along all that was answered in a round, step after step.

    Of step j, the clients that took it count, by their samples (McMahan et al., arXiv 1602.05629, 2017, section 3).

    Args:
        into: a rule, which changes `state` in place, or a ledger, which remembers coefficients.
        state: of a rule.
        seed: the run seed.
        entry: the round.
    """
    rule = into.rule if isinstance(into, Ledger) else into
    for step, (taken, scalars, weights) in enumerate(by_step(entry.answers, rule.passed)):
        draws = [rule.draw(Place(seed, entry.round, entry.answers[i].client, step), 0, 0) for i in taken]
        into.descend(state, draws, rule.coefficients(scalars, weights), entry.lr)


def passed_on(rule: ScalarRule, answers: Sequence[Answer]) -> tuple[Answer, ...]:
    """Return what a server passes on of answers, each (steps · m,) of their (steps · n,) scalars."""
    if type(rule).pass_on is ScalarRule.pass_on:
        return tuple(answers)
    found: list[list[Tensor]] = [[] for _ in answers]
    for taken, scalars, weights in by_step(answers, rule.numbers):
        for i, row in zip(taken, rule.pass_on(scalars, weights), strict=True):
            found[i].append(row)
    return tuple(answer._replace(scalars=torch.cat(rows)) for answer, rows in zip(answers, found, strict=True))


def by_step(answers: Sequence[Answer], count: int) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Yield, for each step, (which answers took it, their scalars (N, count), their weights (N,), in sum 1)."""
    for step in range(max((len(answer.scalars) for answer in answers), default=0) // count):
        taken = [i for i, answer in enumerate(answers) if len(answer.scalars) >= (step + 1) * count]
        weights = torch.tensor([answers[i].weight for i in taken], dtype=torch.float64)
        scalars = torch.stack([answers[i].scalars.view(-1, count)[step] for i in taken])
        yield taken, scalars, (weights / weights.sum()).float()


def shared(server_round: int, lr: float, scalars: Tensor) -> ScalarRound:
    """Return a round in which all clients look along the same directions, of their joint answer (steps · n,)."""
    return ScalarRound(server_round, lr, (Answer(SHARED, 1.0, scalars),))


def rebuild(rule: ScalarRule, seed: int, params: Tensors, history: Iterable[ScalarRound]) -> Tensors:
    """Return the model after all rounds of a history; `params`, the model before the first, are owned from now on."""
    replica = Replica(rule, seed, params)
    for entry in history:
        replica.take(entry)
    return replica.current()


def fingerprint(params: Tensors) -> bytes:
    """Return 8 bytes of a hash of a model's values, by which two replicas know each other."""
    digest = blake2b(digest_size=FINGERPRINT)
    for key, p in params.items():
        digest.update(key.encode())
        digest.update(p.detach().cpu().contiguous().numpy())
    return digest.digest()
