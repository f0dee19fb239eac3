"""Rules whose answers are scalars: a client says how the loss changes along directions that all can make again.

`step` has two halves: `probe` runs on the client and returns a few numbers, `apply` turns numbers into an update and is
all that the server needs.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from torch import Tensor

from .directions import SHARED, Directions
from .rule import Batch, Rule, RuleError, State, Stats, Tensors
from .seeds import Place

if TYPE_CHECKING:
    from .network import Network


@dataclass(frozen=True)
class ScalarRule(Rule):
    """A rule whose clients answer with a few scalars a step, along directions that every replica can make again.

    A step is four functions. A client probes and sends what it found; the server passes on what others need of it;
    whoever knows that turns it into coefficients c_ik of an estimate ĝ = Σ_ik c_ik z_ik, and descends along it:

        probe(net, state, batch, lr)       -> scalars (n,), stats
        pass_on(scalars, weights)          -> scalars (N, m), as they are unless a rule needs fewer
        coefficients(scalars, weights)     -> c (N, K)
        descend(state, draws, c, lr)       in place, with the same bits on every machine

    `draw` makes a step's directions of its place alone: the server makes them again.

    Attributes:
        directions: K, along which a client looks in a step.
        own: every client has directions of its own, so that N clients see N·K of them; else all share K. The answers
            of the others then travel one by one, where of shared ones the mean is enough.
        pool: the directions of a step are some of this many candidates, the same all along, so that a run is a sum of
            that many directions; 0 takes new ones in every step.
        rebase: rounds after which the pool is drawn anew; 0: never.
        momentum: heavy-ball momentum of what the server makes of a pool's answers; not of a client's own steps.
        weight_decay: L2 penalty, likewise.
        chunk: parameters perturbed at a time, about 10 bytes each (signs, their bits, a product);
            changes no bit of the result.
        abreast: directions looked along at once, as one batched program, as far as a device's budget allows; each
            takes a copy of the parameters and of a pass's activations: what a rule says that it stores is for 1. The
            same numbers within rounding.
    """

    exchange: ClassVar[Literal["weights", "scalars"]] = "scalars"
    travels: ClassVar[str] = "scalars"
    linear: ClassVar[bool] = True  # `descend` is w ← w − η ĝ: then coefficients alone can stand for a model

    directions: int = 32
    own: bool = False
    pool: int = 0
    rebase: int = 0
    momentum: float = 0.0
    weight_decay: float = 0.0
    chunk: int = 4096
    abreast: int = 1

    def __post_init__(self) -> None:
        if self.directions < 1 or self.chunk < 1 or self.abreast < 1:
            raise RuleError(f"{self.name or type(self).__name__} needs directions, chunk and abreast ≥ 1")
        if self.pool and not self.linear:
            raise RuleError(f"{self.name} does more with directions than add them up: it cannot have a pool of them")
        if self.pool and self.pool < self.directions:
            raise RuleError(f"a pool of {self.pool} has not {self.directions} directions: use rule.pool ≥ directions")
        if not self.pool and (self.rebase or self.momentum or self.weight_decay):
            raise RuleError("rebase, momentum and weight_decay work on the coefficients of a pool: set rule.pool too")
        if self.rebase < 0 or not 0 <= self.momentum < 1 or self.weight_decay < 0:
            raise RuleError("rule.rebase and weight_decay must be ≥ 0, and momentum at least 0 and below 1")

    @property
    def numbers(self) -> int:
        """The scalars that a client sends for one step."""
        return self.directions

    @property
    def passed(self) -> int:
        """The scalars of an answer that are passed on for one step."""
        return self.numbers

    def init(self, net: Network, seed: int) -> State:
        """Return the network's own initial weights."""
        params = net.init(seed)
        return State(params, {}, self.slots(params))

    def draw(self, place: Place, batch_size: int, classes: int) -> Directions:
        """Return the step's directions; of a rule whose clients share them, the same for every client."""
        client = place.client if self.own else SHARED
        return Directions.at(place._replace(client=client), self.directions, self.pool, self.base(place.round))

    def slots(self, params: Tensors) -> Tensors:
        """Return what `descend` keeps beside `params`, as it begins; every replica keeps it from round to round."""
        return {}

    def base(self, server_round: int) -> int:
        """Return which pool a round (from 1) draws from."""
        return max(server_round - 1, 0) // self.rebase if self.rebase else 0

    @abstractmethod
    def probe(self, net: Network, state: State, batch: Batch, lr: float) -> tuple[Tensor, Stats]:
        """Return (scalars (n,) float32, n = `numbers`, along the directions `batch.draws`, stats).

        Parameters end as they began, within rounding. If the rule is splittable, the scalars of the parts of a batch
        add up to the batch's.
        """

    def pass_on(self, scalars: Tensor, weights: Tensor) -> Tensor:
        """Return what is passed on (N, m), m = `passed`, of answers (N, n) that weigh (N,), in sum 1.

        An answer that all clients share in (their mean) is one row of weight 1.
        """
        return scalars

    def coefficients(self, scalars: Tensor, weights: Tensor) -> Tensor:
        """Return the coefficients (N, K) of the estimate, from what is passed on of answers that weigh (N,)."""
        return scalars * (weights / self.directions).unsqueeze(1)

    def descend(self, state: State, draws: Sequence[Directions], coefficients: Tensor, lr: float) -> None:
        """Step w ← w − η c_ik z_ik, in place on `state`, row after row and k after k, each rounding once."""
        steps = coefficients * -lr
        for i, own in enumerate(draws):
            for k in own.each(self.directions):
                own.add(state.params, k, steps[i, k], self.chunk)

    def apply(self, state: State, draws: Directions, scalars: Tensor, lr: float) -> None:
        """Descend along one answer."""
        alone = scalars.new_ones(1)
        self.descend(state, [draws], self.coefficients(self.pass_on(scalars.unsqueeze(0), alone), alone), lr)

    def step(self, net: Network, state: State, batch: Batch, lr: float) -> Stats:
        """Probe, then descend along one's own scalars."""
        scalars, stats = self.probe(net, state, batch, lr)
        self.apply(state, batch.draws, scalars, lr)
        return stats
