"""The memory meter against bytes counted by hand, and the promise that a step gives back what it took."""

import gc
import itertools
import math

import pytest
import torch
from cases import NETS, RULES, batch, leaves, mostly, network, taken
from fedforward.algorithms import MODELS, Backprop, Batch, ForwardForward, MonoForward, Network
from fedforward.algorithms.models import mlp
from fedforward.algorithms.softmax import cross_entropy
from fedforward.client.memory import PeakMemory
from fedforward.client.plan import Planner

F32, I64 = 4, 8  # bytes


def metered(rule, net, state, b):
    """Take one step; return the meter after the step's own results are gone."""
    resident = [t for part in state for t in part.values()]
    resident += [b.x, b.y, b.weight] + ([b.draws] if isinstance(b.draws, torch.Tensor) else [])
    with torch.no_grad(), PeakMemory({"parameters": resident}) as meter:
        stats = rule.step(net, state, b, rule.lr)
    del stats
    return meter


def two_layers(rule, size, inputs, hidden, classes):
    net = Network(lambda: mlp((inputs,), classes, hidden=(hidden,)), (inputs,), classes)
    b = batch(rule, size, dtype=torch.float32, shape=(inputs,), classes=classes)
    return metered(rule, net, rule.init(net, seed=0), b)


# batch, inputs, hidden, classes: the first layer's weights are larger than everything else
SIZES = [(7, 53, 31, 10), (3, 101, 17, 5), (16, 200, 40, 12)]


@pytest.mark.parametrize("size, inputs, hidden, classes", SIZES)
def test_backpropagation_of_two_layers_costs_the_bytes_counted_by_hand(size, inputs, hidden, classes):
    meter = two_layers(Backprop(), size, inputs, hidden, classes)
    params = inputs * hidden + hidden + hidden * classes + classes
    assert meter.base == F32 * (params + size * inputs + size) + I64 * size
    # The peak is the last gradient: all gradients, dL/dz of the hidden layer (its activity is already freed) and five
    # numbers: the loss, its cotangent and three stats.
    assert meter.peak == meter.base + F32 * (params + size * hidden + 5)


@pytest.mark.parametrize("size, inputs, hidden, classes", SIZES)
def test_mono_forward_of_one_block_costs_the_bytes_counted_by_hand(size, inputs, hidden, classes):
    meter = two_layers(MonoForward(), size, inputs, hidden, classes)
    block, head = inputs * hidden + hidden, hidden * classes
    assert meter.base == F32 * (block + head + size * inputs + size) + I64 * size
    # The block's output and dL/da, its scores and their error, and the bias's gradient. The gradients of weights and
    # head are never made.
    assert meter.peak == meter.base + F32 * (2 * size * hidden + 2 * size * classes + hidden)


@pytest.mark.parametrize("hidden", [3, 6])
def test_depth_costs_backpropagation_activities_and_mono_forward_nothing(hidden):
    size, width = 64, 32
    peaks = {}
    for depth in (hidden, hidden + 1):
        net = Network(lambda: mlp((width,), 10, hidden=(width,) * depth), (width,), 10)  # noqa: B023
        for rule in (Backprop(), MonoForward()):
            b = batch(rule, size, dtype=torch.float32, shape=(width,))
            meter = metered(rule, net, rule.init(net, seed=0), b)
            peaks[rule.name, depth] = meter.peak - meter.base
    more = {rule: peaks[rule, hidden + 1] - peaks[rule, hidden] for rule in ("backprop", "mono-forward")}
    assert more["backprop"] == F32 * size * width
    assert more["mono-forward"] == 0


WIDTHS = [(784, 256, 256, 256, 256), (100, 30, 400, 20, 60), (50, 200, 40), (300, 20, 30, 200)]


@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_mono_forwards_peak_is_the_largest_pair_of_neighbours(widths, momentum):
    size, classes, peaks = 64, 10, []
    net = Network(lambda: mlp(widths[:1], classes, hidden=widths[1:]), widths[:1], classes)
    rule = MonoForward(momentum=momentum)
    meter = metered(rule, net, rule.init(net, 0), batch(rule, size, dtype=torch.float32, shape=widths[:1]))
    for i, (before, width) in enumerate(itertools.pairwise(widths)):
        pair = size * width + (size * before if i else 0)  # the first input is the batch
        scores = size * classes * (3 if i else 2)  # of the block, their error, the sum of the blocks before
        peaks.append(F32 * (pair + size * width + scores + width))  # dL/da, and the bias's gradient
    assert meter.peak - meter.base == max(peaks)


@pytest.mark.parametrize("widths", WIDTHS)
def test_forward_forwards_peak_is_the_largest_pair_of_neighbours_twice(widths):
    size, rows, peaks = 64, 128, []  # two rows a sample
    net = Network(lambda: mlp(widths[:1], 10, hidden=widths[1:]), widths[:1], 10)
    rule = ForwardForward()  # with momentum and weight decay
    meter = metered(rule, net, rule.init(net, 0), batch(rule, size, dtype=torch.float32, shape=widths[:1]))
    peaks.append(1.5 * rows * widths[0])  # copies of the batch with labels written in, and the squares of half of them
    for before, width in itertools.pairwise(widths):
        peaks.append(rows * (before + width) + rows * width)  # true and wrong labels; and dL/da
    few = 4 * rows + 4 * size + 2 * max(widths[1:])
    assert max(peaks) < (meter.peak - meter.base) / F32 <= max(peaks) + few


@pytest.mark.parametrize("name, shape", [("lenet", (1, 28, 28)), ("cnn", (3, 32, 32))])
def test_a_layerwise_rule_needs_one_convolution_block_at_a_time(name, shape):
    size = 64
    net = Network(lambda: MODELS[name](shape, 10), shape, 10)
    inputs = [F32 * size * math.prod(each) for each in (shape, *net.sizes)]
    mono, forward = [], []
    for i in net.hidden:
        pooled = inputs[i + 1]
        whole = 4 * pooled  # the map before pooling, and dL/dz of it
        few = 4 * pooled  # the map after it, dL/dz of that, and where each maximum was: eight bytes a place
        mono.append((inputs[i] if i else 0) + 2 * whole + few)
        forward.append(2 * (inputs[i] + 2 * whole + few + pooled))  # true and wrong labels; and dL/da
    for rule, blocks in ((MonoForward(), mono), (ForwardForward(), forward)):
        above = Planner(net).step(rule, size).parts["activations"]
        assert max(blocks) < above < 1.005 * max(blocks)


@pytest.mark.parametrize("net", NETS)
def test_the_baseline_pays_what_plain_pytorch_pays(net):
    # A baseline that kept its graph would flatter every other rule.
    net, rule = network(net), Backprop()
    state, b = rule.init(net, seed=0), batch(rule, 32, dtype=torch.float32)
    params = leaves(state.params)
    with PeakMemory({"parameters": params.values(), "batch": (b.x, b.y, b.weight)}) as plain:
        loss, _ = cross_entropy(net.forward(params, b.x), b)
        grads = torch.autograd.grad(loss, list(params.values()))
    del grads
    ours = metered(rule, net, state, b)
    assert ours.base == plain.base and ours.flops == plain.flops
    assert ours.peak <= plain.peak + 16  # a handful of 0-dim numbers


@pytest.mark.parametrize("net", ["mlp", "mlp-gelu", "lenet"])
@pytest.mark.parametrize("rule", mostly(RULES))
def test_a_step_gives_back_every_byte_and_repeats_to_the_byte(rule, net):
    rule, net = RULES[rule], taken(RULES[rule], net)
    state, b = rule.init(net, seed=0), batch(rule, dtype=torch.float32)
    gc.disable()  # a reference cycle would keep tensors alive until some later collection
    try:
        first, second = metered(rule, net, state, b), metered(rule, net, state, b)
    finally:
        gc.enable()
    assert first.live == first.base == second.live
    assert (first.peak, first.op, first.flops) == (second.peak, second.op, second.flops)
    assert first.peak > first.base


def test_views_are_not_counted_twice_and_a_freed_tensor_is_given_back():
    x = torch.zeros(1000)
    with PeakMemory({"batch": [x, x[:10], x.view(10, 100)]}) as meter:
        assert meter.base == 4000
        y = x[::2] + 1
        assert meter.live == 4000 + 2000
        y.add_(1)
        z = y.view(2, -1)
        del y
        assert meter.live == 6000  # the view keeps the storage
        del z
        assert meter.live == 4000
    assert (meter.peak, meter.op) == (6000, "aten.add.Tensor")


def test_a_view_is_charged_its_whole_storage():
    whole = torch.zeros(1000)
    assert PeakMemory({"batch": [whole[:10]]}).base == 4000


def test_symbolic_zeros_of_forward_differentiation_count_nothing():
    x, w, v = torch.rand(5, 20), torch.rand(20, 30), torch.rand(5, 20)
    with PeakMemory({"batch": [x, w, v]}) as meter:
        zero = torch._efficientzerotensor((1000,))
        zero + torch.zeros(())
        assert meter.live - meter.base <= F32 * 1000  # the sum is real, the zeros are not
    del zero
    with PeakMemory({"batch": [x, w, v]}) as meter:
        out, tangent = torch.func.jvp(lambda x: (x @ w).sin(), (x,), (v,))
    # z, its tangent, sin z, cos z and their product: never more than five of (5, 30), and no zeros of w's size
    assert out.shape == tangent.shape and meter.peak <= meter.base + 5 * F32 * 5 * 30


@pytest.mark.parametrize("size, inputs, hidden, classes", SIZES)
def test_flops_are_two_per_multiply_and_add_forward_and_backward(size, inputs, hidden, classes):
    # First layer: forward and dL/dW; second layer or head: forward, dL/dW and dL/da.
    wanted = 2 * size * (2 * inputs * hidden + 3 * hidden * classes)
    for rule in (Backprop(), MonoForward()):
        assert two_layers(rule, size, inputs, hidden, classes).flops == wanted
    linear, x = torch.nn.Linear(inputs, hidden), torch.rand(size, inputs, requires_grad=True)
    with PeakMemory() as meter:
        linear(x).sum().backward()
    assert meter.flops == 3 * 2 * size * inputs * hidden


def test_metering_changes_no_bit():
    rule, net = Backprop(), network("lenet")
    with_meter, without = rule.init(net, seed=0), rule.init(net, seed=0)
    b = Batch(*batch(rule, dtype=torch.float32))
    metered(rule, net, with_meter, b)
    with torch.no_grad():
        rule.step(net, without, b, rule.lr)
    assert all(torch.equal(p, without.params[key]) for key, p in with_meter.params.items())
