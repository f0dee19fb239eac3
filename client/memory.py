"""The memory meter: bytes of distinct tensor storages alive at the boundaries between operations.

Client memory is the largest sum, over the operations of a training step, of the bytes of all live storages: parameters,
optimizer and rule state, the batch, activations, gradients and temporaries, nothing rounded. The meter needs no
hardware and gives the same bytes on every machine. It does not see scratch memory inside one operation.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry


class PeakMemory(TorchDispatchMode):
    """Follow every storage that an operation inside the `with` block touches.

    Args:
        resident: tensors that are there before the block: parameters, state, the batch.

    Attributes:
        base: bytes of the resident storages.
        live: bytes alive now.
        peak: the largest `live` at a boundary between operations.
        peak_op: the operation after which the peak was first reached.
        flops: floating-point operations of matrix products and convolutions, forward and backward.
    """

    def __init__(self, resident: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self._sizes: dict[int, tuple[weakref.ref, int]] = {}
        self.live = self.flops = 0
        for tensor in resident:
            self._charge(tensor)
        self.base = self.peak = self.live
        self.peak_op = "start"

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        for leaf in tree_leaves((args, kwargs, out)):
            if isinstance(leaf, Tensor):
                self._charge(leaf)
        if self.live > self.peak:
            self.peak, self.peak_op = self.live, str(func)
        counter = flop_registry.get(func.overloadpacket)
        if counter is not None:
            self.flops += counter(*args, **kwargs, out_val=out)
        return out

    def _charge(self, tensor: Tensor) -> None:
        if tensor._is_zerotensor():  # forward-mode AD's symbolic zeros have a size and no memory
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes and self._sizes[key][0]() is not None:
            return
        size = storage.nbytes()
        self._sizes[key] = weakref.ref(storage, lambda _, key=key: self._release(key)), size
        self.live += size

    def _release(self, key: int) -> None:
        self.live -= self._sizes.pop(key)[1]
