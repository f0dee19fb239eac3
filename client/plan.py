"""What a training step will need, without data, without weights, in milliseconds.

The step runs on PyTorch's fake tensors, which have shapes and no memory, under the same meter that watches real steps.
Live bytes are a function of shapes alone, so the planned peak is the real one, to the byte: `Trainer` audits that. A
fake operation takes a millisecond or two, whatever its size: a small step runs on zeros, in a fifth of the time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from .. import message_bytes
from ..algorithms.directions import Directions, Part
from ..algorithms.network import Network
from ..algorithms.projection import basis, encode
from ..algorithms.repeats import watched
from ..algorithms.rule import Batch, Rule, State, Tensors
from ..algorithms.scalar_rule import ScalarRule
from ..algorithms.seeds import Place
from .memory import PeakMemory
from .step import accumulators, load_parts, residents, score, take_step

SMALL = 2**18  # numbers in a network's parameters, a batch and its activations


@dataclass(frozen=True)
class MemoryPlan:
    """What one step needs.

    Attributes:
        peak: bytes at the most demanding operation.
        op: that operation.
        parts: the bytes of the peak by what they belong to, see `memory.PARTS`.
        flops: of the step; `forward_flops` are those of one forward pass over the same batch.
        bytes_down, bytes_up: payload of the messages of a round of one step.
        timeline: (operation, bytes alive after it), if asked for.
    """

    peak: int
    op: str
    parts: dict[str, int]
    flops: int
    forward_flops: int = 0
    bytes_down: int = 0
    bytes_up: int = 0
    timeline: tuple[tuple[str, int], ...] = ()


class Planner:
    """Plans steps and inference of one network; every plan is made once.

    Args:
        net: the network.
        granule: bytes that every storage is rounded up to a multiple of (512 on CUDA).
    """

    def __init__(self, net: Network, granule: int = 1) -> None:
        self.net, self.granule = net, granule
        # Rules and models of users may mix real constants into a step.
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._states: dict[str, State] = {}
        self._params = sum(p.numel() for block in net.blocks for p in block.parameters())
        self._sample = sum(torch.Size(size).numel() for size in (net.shape, *net.sizes))
        self._plans: dict[tuple, MemoryPlan] = {}

    def step(
        self, rule: Rule, batch: int, micro_batch: int = 0, *, anchored: bool = False, timeline: bool = False
    ) -> MemoryPlan:
        """Return the plan of a training step.

        Args:
            rule: the learning rule.
            batch: samples in the batch.
            micro_batch: samples in a part of it; 0 takes the batch whole.
            anchored: a second copy of the parameters is kept, as FedProx and projections do.
            timeline: keep the bytes alive after every operation.
        """
        key = (repr(rule), batch, micro_batch, anchored, timeline)
        if key not in self._plans:
            self._plans[key] = self._step(rule, batch, micro_batch, anchored, timeline)
        return self._plans[key]

    def inference(self, rule: Rule, batch: int) -> MemoryPlan:
        """Return the plan of evaluating the rule's model on `batch` samples."""
        key = (repr(rule), "inference", batch)
        if key not in self._plans:

            def work(state: State) -> PeakMemory:
                meter = PeakMemory(residents(state._replace(slots={}), {}), granule=self.granule)
                with _few(meter):
                    score(rule, self.net, state, *self._load(range(batch)), meter)
                return meter

            self._plans[key] = _plan_of(self._dry(rule, batch, work))
        return self._plans[key]

    def encoding(self, rule: Rule, directions: int) -> MemoryPlan:
        """Return the plan of projecting what was learned on so many directions, after the last step."""
        key = (repr(rule), "encoding", directions)
        if key not in self._plans:

            def work(state: State) -> PeakMemory:
                anchor = {key: torch.empty_like(p) for key, p in state.params.items()}
                meter = PeakMemory(residents(state._replace(slots={}), anchor), granule=self.granule)
                draws = _DryDirections(**vars(basis(0, 0)), meter=meter)
                with torch.no_grad(), meter:
                    encode(state.params, anchor, draws, directions)
                return meter

            self._plans[key] = _plan_of(self._dry(rule, 1, work))
        return self._plans[key]

    def forward(self, batch: int) -> MemoryPlan:
        """Return the plan of one pass of the plain network: what inference costs a device that does not train.

        The batch is that of a training step, labels and weights included, so that the two compare.
        """
        key = ("forward", batch)
        if key not in self._plans:
            with self._without_memory(batch), torch.no_grad():
                params = self.net.init(0)
                meter = PeakMemory({"parameters": params.values()}, granule=self.granule)
                x, *others = *self._load(range(batch)), torch.ones(batch)
                meter.hold("batch", (x, *others))
                with meter:
                    self.net.forward(params, x)
            self._plans[key] = _plan_of(meter)
        return self._plans[key]

    def params(self, rule: Rule) -> Tensors:
        """Return the parameters that a rule trains, whatever their values."""
        with self._without_memory(1) as fake:
            return self._replica(rule, fake).params

    def _step(self, rule: Rule, batch: int, micro_batch: int, anchored: bool, timeline: bool) -> MemoryPlan:
        def work(state: State) -> PeakMemory:
            anchor = {key: torch.empty_like(p) for key, p in state.params.items()} if anchored else {}
            if micro_batch:
                state = state._replace(gradients=accumulators(rule, state.params))
            meter = PeakMemory(residents(state, anchor), granule=self.granule, timeline=timeline)
            draws = rule.draw(Place(0, 0, 0, 0), batch, self.net.classes)
            if isinstance(draws, Directions):
                draws = _DryDirections(**vars(draws), meter=meter)
            with nullcontext() if timeline else _few(meter):
                take_step(rule, self.net, state, self._parts(batch, draws, micro_batch, meter), rule.lr, meter)
            return meter

        params = self.params(rule)
        scalars = rule.numbers if isinstance(rule, ScalarRule) else 0
        up = message_bytes.scalar_uplink_bytes(scalars) if scalars else message_bytes.model_uplink_bytes(params)
        return replace(
            _plan_of(self._dry(rule, batch, work)),
            forward_flops=self.forward(batch).flops,
            bytes_down=message_bytes.news_bytes(rule.passed) if scalars else message_bytes.model_downlink_bytes(params),
            bytes_up=up,
        )

    def _without_memory(self, batch: int) -> AbstractContextManager:
        """Make tensors fake, unless what is done to a batch is small."""
        return nullcontext() if self._params + batch * self._sample <= SMALL else self._fake

    def _dry(self, rule: Rule, batch: int, work: Callable[[State], PeakMemory]) -> PeakMemory:
        """Return the meter of some work on a batch, on a replica without memory or on a small one.

        A rule that asks for values, which fake tensors have not, gets a real replica and zeros for data: its plan takes
        memory here, and holds as long as its memory does not depend on the values.
        """
        try:
            with self._without_memory(batch) as fake:
                return work(self._replica(rule, fake))
        except Exception:  # in as many ways as values can be asked for; what else is wrong is so on real tensors too
            return work(rule.init(self.net, 0))

    def _parts(self, batch: int, draws: Any, micro_batch: int, meter: PeakMemory) -> Iterator[Batch]:
        """Yield a batch in parts, but of equal ones the first two alone: the others cost what the second does."""
        alike = max(batch // micro_batch - 2, 0) if micro_batch else 0
        flops = [0]
        for part in load_parts(self._load, range(batch - alike * micro_batch), draws, micro_batch):
            yield part
            del part
            flops.append(meter.flops)
        if alike:
            meter.flops += alike * (flops[2] - flops[1])

    def _replica(self, rule: Rule, fake: FakeTensorMode | None) -> State:
        """Return a new replica, or the one without memory: what a step writes there is forgotten, it has no values."""
        if fake is None:
            return rule.init(self.net, 0)
        if repr(rule) not in self._states:
            self._states[repr(rule)] = rule.init(self.net, 0)
        return self._states[repr(rule)]

    def _load(self, rows: range) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.zeros(len(rows), *self.net.shape), torch.zeros(len(rows), dtype=torch.int64)


@dataclass(frozen=True, kw_only=True)
class _DryDirections(Directions):
    """Directions of which a step sees two, or two full groups and what is left over, in the slices that need most."""

    meter: PeakMemory

    def together(self, count: int, abreast: int) -> Iterator[range]:
        """Yield two full groups, of which the others cost what the second does, and what is left of the directions."""
        groups, full = list(super().together(count, abreast)), count // abreast
        for i, group in enumerate(groups):
            if i < 2 or i == full:
                before = self.meter.flops
                yield group
            if i == 1 and full > 2:
                self.meter.flops += (full - 2) * (self.meter.flops - before)

    def visited(self, groups: list[list[Part]]) -> list[list[Part]]:
        """Return the groups with most signs, and with most signs and products of signs together."""
        signs = [sum(part.signs for part in group) for group in groups]
        products = [max(part.size for part in group) for group in groups]
        places = range(len(groups))
        chosen = {max(places, key=lambda i: signs[i]), max(places, key=lambda i: signs[i] + products[i])}
        return [groups[i] for i in sorted(chosen)]


def _few(meter: PeakMemory) -> AbstractContextManager:
    """Let three of repetitions that are alike run, and count the others as what the third takes."""

    def watch(repeats: range) -> Iterator[int]:
        before = meter.flops
        for i in repeats[:3]:
            before = meter.flops
            yield i
        meter.flops += max(len(repeats) - 3, 0) * (meter.flops - before)

    return watched(watch)


def _plan_of(meter: PeakMemory) -> MemoryPlan:
    return MemoryPlan(meter.peak, meter.op, meter.parts, meter.flops, timeline=tuple(meter.timeline or ()))
