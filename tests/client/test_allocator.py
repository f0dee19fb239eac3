"""The meter against PyTorch's own allocator, as its profiler reports it, with oneDNN's hidden formats off.

What the allocator sees and the meter does not is scratch inside one operation. Without oneDNN there are two kinds:

    numbers        a Python number in an expression becomes a tensor for the time of the operation: 16 bytes at most
    columns        a convolution unfolds its input, C k² values for each position of its output: of one sample at a
                   time in the backward pass, and of all samples in the forward pass of batches below 16 (larger ones
                   are NNPACK's, whose memory is not the allocator's)
"""

import math

import pytest
import torch
from fedforward.algorithms import RULES, Batch, ForwardForward
from fedforward.algorithms.layerwise.modules import Isolated
from fedforward.algorithms.seeds import Place
from fedforward.client.memory import PeakMemory
from fedforward.client.step import residents, take_step
from test_plan import SIZED, few, network
from torch.profiler import ProfilerActivity, profile

NUMBERS, F32 = 16, 4  # bytes


def allocated(work):
    """Return (peak, what is left) of the bytes that the allocator handed out during `work`."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak, live


def columns(rule, net, rows):
    """Return the bytes of the largest unfolded input of a convolution, and its bias beside it."""
    modules = rule.modules(net) if isinstance(rule, Isolated) else ()
    sizes = [0]
    for each in (net, *(auxiliary.net for module in modules for auxiliary in module.auxiliaries.values())):
        x = (1, *each.shape)
        for layer in (layer for block in each.blocks for layer in block):
            a = layer(torch.empty(x, device="meta"))
            if isinstance(layer, torch.nn.Conv2d):
                unfolded = layer.in_channels * math.prod(layer.kernel_size) * math.prod(a.shape[2:])
                sizes.append(F32 * (unfolded * (rows if rows < 16 else 1) + layer.out_channels))
            x = a.shape
    return max(sizes)


@pytest.mark.parametrize("rule, model, size", SIZED)
def test_the_allocator_agrees_with_the_meter(rule, model, size):
    rule, net = few(RULES[rule]()), network(model)
    state, g = rule.init(net, seed=1), torch.Generator().manual_seed(2)
    x, y = torch.rand(size, *net.shape, generator=g), torch.randint(10, (size,), generator=g)
    batch = Batch(x, y, torch.ones(size), rule.draw(Place(1, 2, 3, 4), size, 10))
    work = lambda: take_step(rule, net, state, iter([batch]), 0.01)  # noqa: E731
    with torch.backends.mkldnn.flags(enabled=False):
        work()  # what the first step alone allocates is not the step's
        peak, left = allocated(work)
        meter = PeakMemory(residents(state, {}))  # inside too: channels come last for oneDNN alone
        take_step(rule, net, state, iter([batch]), 0.01, meter)  # like the step that is profiled, while the batch stays
    unseen = peak - meter.parts["activations"]
    assert left == 0
    rows = 2 * size if isinstance(rule, ForwardForward) else size  # true and wrong labels
    drawing = rule.name == "forward-gradient" and size == 1  # its peak, where NumPy has bits that the meter counts
    assert (-rule.chunk if drawing else 0) <= unseen <= max(NUMBERS, columns(rule, net, rows))
    if model == "mlp":
        assert unseen <= NUMBERS
