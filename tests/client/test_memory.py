"""The memory meter against bytes counted by hand, and the promise that a step gives back what it took."""

import gc

import pytest
import torch
from cases import NETS, RULES, batch, leaves, network
from fedforward.algorithms import Backprop, Batch, MonoForward, Network
from fedforward.algorithms.models import mlp
from fedforward.algorithms.rule import cross_entropy
from fedforward.client.memory import PeakMemory

F32, I64 = 4, 8  # bytes


def metered(rule, net, state, b):
    """Take one step; return the meter after the step's own results are gone."""
    resident = [t for part in state for t in part.values()]
    resident += [b.x, b.y, b.weight] + ([b.draws] if isinstance(b.draws, torch.Tensor) else [])
    with torch.no_grad(), PeakMemory(resident) as meter:
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
    # The block's gradients, its output, its scores and their error; and the larger of the head's gradient (which comes
    # after dL/dz is gone) and dL/dz (which is there while the bias's gradient is made).
    kept = block + size * hidden + 2 * size * classes
    assert meter.peak == meter.base + F32 * (kept + max(head, size * hidden))


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


@pytest.mark.parametrize("rule", ["mono-forward", "forward-forward"])
def test_a_layerwise_rule_drops_a_block_before_it_runs_the_next(rule):
    rule, peaks = RULES[rule], []
    for hidden in ((64, 48), (64, 48, 16)):
        net = Network(lambda: mlp((200,), 10, hidden=hidden), (200,), 10)  # noqa: B023
        meter = metered(rule, net, rule.init(net, seed=0), batch(rule, 4, dtype=torch.float32, shape=(200,)))
        peaks.append(meter.peak - meter.base)
    first_block, second_block = 200 * 64 + 64, 64 * 48 + 48
    assert peaks[0] == peaks[1]  # the first block's alone
    # Gradients of the first block, once more for the weight decay, never the second's beside them.
    copies = 2 if rule.weight_decay else 1
    assert copies * first_block < peaks[0] / F32 < copies * first_block + second_block


@pytest.mark.parametrize("net", NETS)
def test_the_baseline_pays_what_plain_pytorch_pays(net):
    # A baseline that kept its graph would flatter every other rule.
    net, rule = network(net), Backprop()
    state, b = rule.init(net, seed=0), batch(rule, 32, dtype=torch.float32)
    params = leaves(state.params)
    with PeakMemory((*params.values(), b.x, b.y, b.weight)) as plain:
        loss, _ = cross_entropy(net.forward(params, b.x), b)
        grads = torch.autograd.grad(loss, list(params.values()))
    del grads
    ours = metered(rule, net, state, b)
    assert ours.base == plain.base and ours.flops == plain.flops
    assert ours.peak <= plain.peak + 16  # a handful of 0-dim numbers


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("rule", RULES)
def test_a_step_gives_back_every_byte_and_repeats_to_the_byte(rule, net):
    rule, net = RULES[rule], network(net)
    state, b = rule.init(net, seed=0), batch(rule, dtype=torch.float32)
    gc.collect()
    gc.disable()  # a reference cycle would keep tensors alive until some later collection
    try:
        first, second = metered(rule, net, state, b), metered(rule, net, state, b)
    finally:
        gc.enable()
    assert first.live == first.base == second.live
    assert (first.peak, first.peak_op, first.flops) == (second.peak, second.peak_op, second.flops)
    assert first.peak > first.base


def test_views_are_not_counted_twice_and_a_freed_tensor_is_given_back():
    x = torch.zeros(1000)
    with PeakMemory([x, x[:10], x.view(10, 100)]) as meter:
        assert meter.base == 4000
        y = x[::2] + 1
        assert meter.live == 4000 + 2000
        y.add_(1)
        z = y.view(2, -1)
        del y
        assert meter.live == 6000  # the view keeps the storage
        del z
        assert meter.live == 4000
    assert (meter.peak, meter.peak_op) == (6000, "aten.add.Tensor")


def test_a_view_is_charged_its_whole_storage():
    whole = torch.zeros(1000)
    assert PeakMemory([whole[:10]]).base == 4000


def test_symbolic_zeros_of_forward_differentiation_count_nothing():
    x, w, v = torch.rand(5, 20), torch.rand(20, 30), torch.rand(5, 20)
    with PeakMemory([x, w, v]) as meter:
        zero = torch._efficientzerotensor((1000,))
        zero + torch.zeros(())
        assert meter.live - meter.base <= F32 * 1000  # the sum is real, the zeros are not
    del zero
    with PeakMemory([x, w, v]) as meter:
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
