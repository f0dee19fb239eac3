"""The memory meter: bytes of distinct tensor storages alive at the boundaries between operations.

Client memory is the largest sum, over the operations of a training step, of the bytes of all live storages: parameters,
rule and optimizer state, the batch, activations, gradients and temporaries. The meter needs no hardware and gives the
same bytes on every machine, for real tensors and for fake ones alike. It does not see scratch memory inside one
operation.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

# What the bytes of a peak belong to: held before the step, but for the last: all that the step makes itself.
PARTS = ("parameters", "state", "optimizer", "gradients", "batch", "activations")

# PyTorch's counters, and those of two operations that it has forgotten.
FLOPS = flop_registry | {
    torch.ops.aten.addmm_: flop_registry[torch.ops.aten.addmm],
    torch.ops.aten.baddbmm_: flop_registry[torch.ops.aten.baddbmm],
}


class MemoryBudgetExceeded(RuntimeError):
    """A step needs more memory than it may use.

    Attributes:
        op: the operation after which the budget was exceeded.
        needed: bytes alive then.
        budget: bytes allowed.
        index: how many operations came before it.
    """

    def __init__(self, op: str, needed: int, budget: int, index: int) -> None:
        super().__init__(f"needs {needed:,} B, has {budget:,} B (at {op}, operation {index})")
        self.op, self.needed, self.budget, self.index = op, needed, budget, index


class PeakMemory(TorchDispatchMode):
    """Follow every storage that an operation inside the `with` block touches; blocks of one meter add up.

    Args:
        resident: tensors that are there before the block, by what they are: one of `PARTS`.
        granule: bytes that a storage is rounded up to a multiple of, as an allocator does (512 on CUDA).
        budget: bytes that may be alive; None for any number.
        timeline: keep the bytes alive after every operation.

    Attributes:
        live: bytes alive now.
        base: bytes of the resident storages.
        peak: the largest `live` at a boundary between operations.
        op: the operation after which the peak was first reached; `index` operations came before it.
        parts: the bytes of the peak by what they belong to.
        flops: floating-point operations of matrix products and convolutions, forward and backward.
        timeline: (operation, bytes alive after it), if kept.

    Raises:
        MemoryBudgetExceeded: after the operation that exceeds the budget, whose effects stay: a state that it was
            changing is neither old nor new.
    """

    def __init__(
        self,
        resident: Mapping[str, Iterable[Tensor]] | None = None,
        *,
        granule: int = 1,
        budget: int | None = None,
        timeline: bool = False,
    ) -> None:
        super().__init__()
        self.granule, self.budget = granule, budget
        self._sizes: dict[int, tuple[weakref.ref, int, str]] = {}
        self._ops = -1
        self._live = dict.fromkeys(PARTS, 0)
        self.live = self.flops = 0
        for part, tensors in (resident or {}).items():
            self.hold(part, tensors)
        self.base = self.peak = self.live
        self.parts, self.op, self.index = dict(self._live), "start", 0
        self.timeline: list[tuple[str, int]] | None = [("start", self.live)] if timeline else None
        self._check("start")

    def hold(self, part: str, tensors: Iterable[Tensor]) -> None:
        """Count tensors that came from outside the block as `part`."""
        for tensor in tensors:
            self._charge(tensor, part)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func.namespace == "prim":  # a question that fake tensors are asked, and real ones are not
            return out
        for leaf in tree_leaves((args, kwargs, out)):
            if isinstance(leaf, Tensor):
                self._charge(leaf, "activations")
        self._ops += 1
        if self.live > self.peak:
            self.peak, self.op, self.index, self.parts = self.live, str(func), self._ops, dict(self._live)
        if self.timeline is not None:
            self.timeline.append((str(func), self.live))
        counter = FLOPS.get(func.overloadpacket)
        if counter is not None:
            self.flops += counter(*args, **kwargs, out_val=out)
        self._check(str(func))
        return out

    def _check(self, op: str) -> None:
        if self.budget is not None and self.live > self.budget:
            raise MemoryBudgetExceeded(op, self.live, self.budget, max(self._ops, 0))

    def _charge(self, tensor: Tensor, part: str) -> None:
        if tensor._is_zerotensor():  # forward-mode AD's symbolic zeros have a size and no memory
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes and self._sizes[key][0]() is not None:
            return
        size = -(-storage.nbytes() // self.granule) * self.granule
        self._sizes[key] = weakref.ref(storage, lambda _, key=key: self._release(key)), size, part
        self.live += size
        self._live[part] += size

    def _release(self, key: int) -> None:
        _, size, part = self._sizes.pop(key)
        self.live -= size
        self._live[part] -= size
