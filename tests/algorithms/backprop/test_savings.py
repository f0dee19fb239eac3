"""What the savers save, by the meter: bytes counted by hand, and an order that holds on every network."""

import gc
from functools import cache, partial

import pytest
import torch
from cases import RULES, batch, network
from fedforward.algorithms import (
    ApproxBackprop,
    Backprop,
    Batch,
    CheckpointedBackprop,
    FusedBackprop,
    Network,
    SelectiveBackprop,
)
from fedforward.algorithms.models import cnn, lenet, mlp
from fedforward.client.memory import PeakMemory
from torch._subclasses.fake_tensor import FakeTensorMode

F32, CLASSES = 4, 10  # bytes of a number
LATE = CheckpointedBackprop(fused=False)

NETWORKS = {
    "mlp": (partial(mlp, hidden=(256,) * 4), (1, 28, 28)),
    "lenet": (lenet, (1, 28, 28)),
    "cnn": (cnn, (3, 32, 32)),
    "cnn-group": (partial(cnn, norm="group"), (3, 32, 32)),
}
ALL = [(name, activation) for name in NETWORKS for activation in ("relu", "gelu")]


def peak_over(state, b, work):
    """Return the peak bytes of `work` above the bytes of state and batch."""
    resident = [t for part in state for t in part.values()] + [b.x, b.y, b.weight]
    with torch.no_grad(), PeakMemory({"parameters": resident}) as meter:
        work()
    assert meter.live == meter.base  # nothing outlives the step
    return meter.peak - meter.base


def step_peak(rule, net, b):
    state = rule.init(net, seed=0)
    return peak_over(state, b, lambda: rule.step(net, state, b, rule.lr))


@cache
def peak(rule, name, activation):
    """Return the peak of a step on 64 samples, of inference if there is no rule, on tensors without memory."""
    build, shape = NETWORKS[name]
    net = Network(lambda: build(shape, CLASSES, activation=activation), shape, CLASSES)
    with FakeTensorMode(allow_non_fake_inputs=True):
        b = Batch(torch.empty(64, *shape), torch.zeros(64, dtype=torch.int64), torch.ones(64))
        if rule is not None:
            return step_peak(rule, net, b)
        state = Backprop().init(net, seed=0)
        return peak_over(state, b, lambda: net.forward(state.params, b.x))


@pytest.mark.parametrize("name, activation", ALL)
def test_each_saver_needs_less_than_backpropagation_and_more_than_inference(name, activation):
    rules = (Backprop(), FusedBackprop(), CheckpointedBackprop(), LATE, SelectiveBackprop())
    plain, fused, checkpointed, late, selective = (peak(rule, name, activation) for rule in rules)
    assert peak(None, name, activation) < checkpointed <= fused < plain
    assert checkpointed <= late <= plain
    assert peak(None, name, activation) < selective < plain


@pytest.mark.parametrize("name, activation", ALL)
def test_packing_never_costs_a_hundredth_and_saves_where_activations_rule(name, activation):
    plain, approx = (peak(rule, name, activation) for rule in (Backprop(), ApproxBackprop()))
    assert approx <= 1.01 * plain
    if activation == "gelu" and name != "mlp":
        assert approx < 0.8 * plain


def test_the_savings_are_of_the_size_that_is_promised():
    # Weights rule the dense network's bytes, activations the convolutional one's.
    assert peak(FusedBackprop(), "mlp", "relu") < 0.53 * peak(Backprop(), "mlp", "relu")
    assert peak(FusedBackprop(), "lenet", "relu") > 0.99 * peak(Backprop(), "lenet", "relu")
    for activation in ("relu", "gelu"):
        assert peak(CheckpointedBackprop(), "lenet", activation) < 0.7 * peak(Backprop(), "lenet", activation)


@pytest.mark.parametrize("rule", [FusedBackprop(), CheckpointedBackprop()])
@pytest.mark.parametrize("size, inputs, hidden", [(7, 53, 61), (3, 101, 70), (16, 200, 80)])
def test_two_layers_cost_the_bytes_counted_by_hand(rule, size, inputs, hidden):
    net = Network(lambda: mlp((inputs,), CLASSES, hidden=(hidden,)), (inputs,), CLASSES)
    b = batch(rule, size, dtype=torch.float32, shape=(inputs,))
    # The first layer's output, dL/da of it, the error and the last bias's gradient, and three stats. No gradient of a
    # weight.
    assert step_peak(rule, net, b) == F32 * (2 * size * hidden + size * CLASSES + CLASSES + 3)


@pytest.mark.parametrize("rule", [FusedBackprop(), CheckpointedBackprop()])
def test_a_dense_layer_more_costs_its_activation_alone(rule):
    peaks = []
    for depth in (1, 2, 3):
        net = Network(lambda: mlp((300,), CLASSES, hidden=(40,) * depth), (300,), CLASSES)  # noqa: B023
        peaks.append(step_peak(rule, net, batch(rule, 8, dtype=torch.float32, shape=(300,))))
    assert peaks[2] - peaks[1] == peaks[1] - peaks[0] == F32 * 8 * 40


@pytest.mark.parametrize("rule", [FusedBackprop(), CheckpointedBackprop()])
def test_a_layer_more_costs_nothing_while_the_first_layers_gradient_is_the_peak(rule):
    peaks = set()
    for depth in (1, 2, 3):
        net = Network(lambda: mlp((300,), CLASSES, hidden=(40,) * depth, activation="gelu"), (300,), CLASSES)  # noqa: B023
        peaks.add(step_peak(rule, net, batch(rule, 8, dtype=torch.float32, shape=(300,))))
    assert peaks == {F32 * (300 * 40 + 40 + 8 * 40 + 3 + 1)}  # its two gradients, dL/dz, stats, the graph's end


def test_a_layer_more_stores_two_activations_one_or_one_and_two_bits():
    size, width, more = 128, 16, {}
    rules = (Backprop(), ApproxBackprop(), CheckpointedBackprop())
    for rule in rules:
        peaks = []
        for depth in (4, 5):
            net = Network(lambda: mlp((width,), CLASSES, hidden=(width,) * depth, activation="gelu"), (width,), CLASSES)  # noqa: B023
            peaks.append(step_peak(rule, net, batch(rule, size, dtype=torch.float32, shape=(width,))))
        more[rule.name] = peaks[1] - peaks[0]
    activation = F32 * size * width
    assert more == {
        "backprop": 2 * activation,  # of GELU its input and its output, the next layer's input
        "backprop-approx": activation + size * width // 4,
        "backprop-checkpointed": activation,
    }


@pytest.mark.parametrize("frozen", [1, 2])
def test_a_frozen_layer_more_costs_nothing(frozen):
    size, width, peaks = 64, 32, []
    for more in (0, 1):
        net = Network(lambda: mlp((width,), CLASSES, hidden=(width,) * (3 + more)), (width,), CLASSES)  # noqa: B023
        rule = SelectiveBackprop(frozen=frozen + more)
        peaks.append(step_peak(rule, net, batch(rule, size, dtype=torch.float32, shape=(width,))))
    assert peaks[0] == peaks[1]


@pytest.mark.parametrize("net", ["mlp", "mlp-gelu", "lenet", "cnn-group"])
@pytest.mark.parametrize("rule", [name for name in RULES if name.startswith("backprop")])
def test_tensors_without_memory_cost_the_same_bytes(rule, net):
    rule, net = RULES[rule], network(net)
    b = batch(rule, dtype=torch.float32)
    gc.disable()  # a reference cycle would keep tensors alive until some later collection
    try:
        real = step_peak(rule, net, b)
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fake = b._replace(x=mode.from_tensor(b.x), y=mode.from_tensor(b.y), weight=mode.from_tensor(b.weight))
            assert step_peak(rule, net, fake) == real
        assert step_peak(rule, net, b) == real
    finally:
        gc.enable()
