"""How a training step is made to fit a budget.

A step that needs too much is changed in ways that leave the update what it is, in this order: fewer directions abreast,
then smaller slices of them, then parts of the batch whose gradients add up, then, if a ladder of rules is given,
another rule. What does not fit even then is refused before it runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ..algorithms import LADDER
from ..algorithms.directions import BLOCK
from ..algorithms.rule import Rule
from .plan import MemoryPlan, Planner


class OverBudget(RuntimeError):
    """No way of training fits the device; the message says what is needed, and at which operation."""


@dataclass(frozen=True)
class Fit:
    """How a client trains.

    Attributes:
        rule: with the chunk, and the directions abreast, that fit.
        rank: 0 for the experiment's own rule, else its place in `algorithms.LADDER`, from 1.
        batch: samples in a step.
        micro_batch: samples in a part of it; 0 takes the batch whole.
        plan: of a training step.
        evaluation_batch: samples evaluated at a time, so that evaluation needs no more than training.
        peak: bytes, of training, of evaluation and of what is made of the update.
    """

    rule: Rule
    rank: int
    batch: int
    micro_batch: int
    plan: MemoryPlan
    evaluation_batch: int
    peak: int

    @property
    def abreast(self) -> int:
        """Directions looked along at once; 0 for a rule without."""
        return getattr(self.rule, "abreast", 0)

    @property
    def chunk(self) -> int:
        """Random signs drawn at a time; 0 for a rule without."""
        return getattr(self.rule, "chunk", 0)


def fit(
    planner: Planner,
    rule: Rule,
    batch: int,
    budget: int | None = None,
    *,
    micro_batch: int = 0,
    anchored: bool = False,
    projection: int = 0,
    ladder: Sequence[Rule] = (),
) -> Fit:
    """Return how `batch` samples a step are trained within `budget` bytes (None: as asked).

    Args:
        planner: knows what a step of the network needs.
        rule: the experiment's rule.
        batch: samples in a step.
        budget: bytes for tensors.
        micro_batch: samples in a part of a batch, at most; 0 leaves it whole if that fits.
        anchored: a second copy of the parameters is kept.
        projection: directions that the update is projected on; 0: it is not.
        ladder: rules to fall back to, the best first, of those that `algorithms.LADDER` names.

    Raises:
        OverBudget: if nothing fits, with the least that was found to be needed.
    """
    least: MemoryPlan | None = None
    for candidate in (rule, *ladder):
        size = 0 if candidate.unsplittable or micro_batch >= batch else micro_batch
        way = _Way(planner, candidate, batch, size, anchored)
        chosen = way if budget is None else way.within(budget)
        plan = (chosen or way.smallest()).plan()
        if chosen:
            evaluation = evaluation_batch(planner, chosen.rule, plan.peak)
            after = [planner.inference(chosen.rule, evaluation)]
            after += [planner.encoding(chosen.rule, projection)] if projection else []
            most = max(after, key=lambda each: each.peak)
            peak = max(plan.peak, most.peak)
            if budget is None or peak <= budget:
                rank = 0 if candidate is rule else LADDER.index(candidate.name) + 1
                return Fit(chosen.rule, rank, batch, chosen.micro_batch, plan, evaluation, peak)
            plan = most
        least = plan if least is None or plan.peak < least.peak else least
    remedy = f"; its batch cannot be split: {rule.unsplittable}" if rule.unsplittable and batch > 1 else ""
    raise OverBudget(f"needs {least.peak:,} B, has {budget:,} B (at {least.op}){remedy}")


@dataclass(frozen=True)
class _Way:
    """One way of taking a step."""

    planner: Planner
    rule: Rule
    batch: int
    micro_batch: int  # 0: whole
    anchored: bool

    def plan(self) -> MemoryPlan:
        return self.planner.step(self.rule, self.batch, self.micro_batch, anchored=self.anchored)

    def fits(self, budget: int) -> bool:
        return self.plan().peak <= budget

    def smallest(self) -> _Way:
        """Return the way that needs least: the smallest slices, and single samples if that is less than the batch."""
        way = self._with(chunk=BLOCK, abreast=1)
        single = way if way.rule.unsplittable or self.batch == 1 else replace(way, micro_batch=1)
        return min(way, single, key=lambda each: each.plan().peak)

    def within(self, budget: int) -> _Way | None:
        """Return the way nearest to this one that fits `budget` bytes, or None."""
        if self.fits(budget):
            return self
        if (most := getattr(self.rule, "abreast", 1)) > 1:
            if not self._with(abreast=1).fits(budget):
                return self._with(abreast=1).within(budget)
            return self._with(abreast=_largest(1, most, lambda n: self._with(abreast=n).fits(budget)))
        way = self._with(chunk=BLOCK)
        if not way.fits(budget):
            if way.rule.unsplittable or self.batch == 1 or not replace(way, micro_batch=1).fits(budget):
                return None
            most = (self.micro_batch or self.batch) - 1
            size = _largest(1, most, lambda size: replace(way, micro_batch=size).fits(budget))
            way = replace(way, micro_batch=size)
        if not hasattr(self.rule, "chunk"):
            return way
        blocks = _largest(1, max(self.rule.chunk // BLOCK, 1), lambda n: way._with(chunk=n * BLOCK).fits(budget))
        return way._with(chunk=blocks * BLOCK)

    def _with(self, **options: int) -> _Way:
        """Return this way with options of its rule changed, of those that the rule has."""
        known = {name: value for name, value in options.items() if hasattr(self.rule, name)}
        return replace(self, rule=replace(self.rule, **known))


def evaluation_batch(planner: Planner, rule: Rule, limit: int) -> int:
    """Return the largest of 1024, 512, … samples whose inference needs at most `limit` bytes; 1 may need more."""
    return 2 ** _largest(0, 10, lambda k: planner.inference(rule, 2**k).peak <= limit)


def _largest(low: int, high: int, fits: Callable[[int], bool]) -> int:
    """Return the largest number from `low`, which fits, to `high` that fits, if what is smaller needs less."""
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
