"""Packed activations: exact forward, the nearest step function backward, and nothing kept but its levels."""

import copy
import gc
import pickle
import weakref
from functools import partial

import pytest
import torch
from cases import CLASSES, SHAPE, assert_close, batch, copied, descent, double, network, nonuniform, step
from fedforward.algorithms import ApproxBackprop, Backprop, Batch, Network, RuleError
from fedforward.algorithms.backprop.approx import STEPS, PackedActivation, pack, packed, unpack
from fedforward.algorithms.models import cnn, mlp
from sklearn.datasets import load_digits
from torch import nn
from torch.func import functional_call, vjp, vmap

RULE = ApproxBackprop()
SMOOTH = [nn.GELU, nn.SiLU]


def step_function(kind, z):
    """Return Σ a_i [z > c_i], term by term."""
    steps, total = STEPS[kind], torch.zeros_like(z)
    for a, c in zip(steps.a, steps.c, strict=True):
        total += a * (z > c).to(z.dtype)
    return total


@pytest.mark.parametrize("kind", SMOOTH)
def test_the_coefficients_are_those_of_the_nearest_sum_of_three_relus(kind):
    steps, z = STEPS[kind], torch.linspace(-30, 30, 60_001, dtype=torch.float64)
    truth = kind()(z)

    def distance(c1, c2, c3, a1):
        """Return ∫ (Σ a_i max(z − c_i, 0) − f)², with a_2 and a_3 from Σ a_i = 1 and Σ a_i c_i = 0."""
        a3 = -(a1 * c1 + (1 - a1) * c2) / (c3 - c2)
        near = sum(a * (z - c).clamp_min(0) for a, c in ((a1, c1), (1 - a1 - a3, c2), (a3, c3)))
        return float((near - truth).square().mean())

    assert abs(sum(steps.a) - 1) < 1e-12 and abs(sum(a * c for a, c in zip(steps.a, steps.c, strict=True))) < 1e-12
    best = (*steps.c, steps.a[0])
    least = distance(*best)
    sizes = (3, 1, 3, 0.05)
    for i, size in enumerate(sizes):
        for part in (1e-2, -1e-2):
            moved = distance(*(x + part * size * (i == j) for j, x in enumerate(best)))
            assert moved > least
            nearby = distance(*(x + part / 10 * size * (i == j) for j, x in enumerate(best)))
            assert nearby > least * (1 - 5e-4)  # the paper's search stopped a hair away from the least


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", STEPS)
@pytest.mark.parametrize("shape", [(7,), (3, 5, 3), (2, 4, 4, 4)])
def test_forward_is_exact_and_backward_is_the_step_function(kind, dtype, shape):
    g = torch.Generator().manual_seed(0)
    z, pulled = (4 * torch.randn(shape, generator=g, dtype=dtype) for _ in range(2))
    z.view(-1)[0] = 0
    out, pull = vjp(PackedActivation(kind()), z)
    assert torch.equal(out, kind()(z))
    assert torch.equal(pull(pulled)[0], step_function(kind, z) * pulled)


def test_the_step_of_relu_is_its_derivative_in_every_bit():
    z, pulled = torch.randn(1000), torch.randn(1000)
    z[::7] = 0
    packed_pull, plain_pull = (vjp(f, z)[1] for f in (PackedActivation(nn.ReLU()), torch.relu))
    assert torch.equal(packed_pull(pulled)[0], plain_pull(pulled)[0])


def test_gelus_own_options_and_memory_are_respected():
    z = torch.randn(50)
    assert torch.equal(PackedActivation(nn.GELU(approximate="tanh"))(z), nn.GELU(approximate="tanh")(z))
    kept = z.clone()
    PackedActivation(nn.ReLU(inplace=True))(z)
    assert torch.equal(z, kept)


@pytest.mark.parametrize("bits", [1, 2])
@pytest.mark.parametrize("count", [1, 3, 4, 7, 8, 9, 64])
def test_packing_is_lossless_and_as_small_as_it_says(bits, count):
    levels = torch.randint(2**bits, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(count))
    whole = pack(levels, bits)
    assert whole.dtype == torch.uint8 and whole.shape == (-(-count * bits // 8),)
    assert torch.equal(unpack(whole, bits, levels.shape), levels)


@pytest.mark.parametrize("norm", ["none", "group"])
def test_with_relu_it_is_backpropagation(norm):
    for build in (partial(cnn, SHAPE, CLASSES, channels=(8, 8), norm=norm), partial(mlp, SHAPE, CLASSES)):
        net = Network(build, SHAPE, CLASSES)
        state, b = RULE.init(net, seed=1), nonuniform(batch(RULE, dtype=torch.float32))
        wanted, got = (copied(state), state)
        assert step(RULE, net, got, b) == step(Backprop(), net, wanted, b)
        assert all(torch.equal(got.params[key], wanted.params[key]) for key in wanted.params)


@pytest.mark.parametrize("kind", SMOOTH)
def test_one_step_follows_the_step_functions(kind):
    # Written out for two dense layers: dW_1 = (e W_2 · s(z))ᵀ x.
    net = Network(lambda: mlp(SHAPE, CLASSES, hidden=(13,), activation=kind.__name__.lower()), SHAPE, CLASSES)
    state, b = double(RULE.init(net, seed=1)), nonuniform(batch(RULE))
    p, x = copied(state).params, b.x.flatten(1)
    z = x @ p["0.linear.weight"].T + p["0.linear.bias"]
    a = kind()(z)
    scores = a @ p["1.linear.weight"].T + p["1.linear.bias"]
    error = (scores.softmax(1) - torch.nn.functional.one_hot(b.y, CLASSES)) * (b.weight / b.weight.sum())[:, None]
    dz = error @ p["1.linear.weight"] * step_function(kind, z)
    truth = {"0.linear.weight": dz.T @ x, "0.linear.bias": dz.sum(0)}
    truth |= {"1.linear.weight": error.T @ a, "1.linear.bias": error.sum(0)}
    assert_close(descent(RULE, net, state, b), truth, atol=1e-12)


@pytest.mark.parametrize("kind", STEPS)
def test_clients_under_vmap_are_packed_each_by_itself(kind):
    activation = PackedActivation(kind())
    z, pulled = torch.randn(3, 5, 7), torch.randn(3, 5, 7)
    got = vmap(lambda z, pulled: vjp(activation, z)[1](pulled)[0])(z, pulled)
    assert torch.equal(got, step_function(kind, z) * pulled)


def test_the_gradient_comes_near_the_true_one_as_the_network_learns():
    net = Network(lambda: mlp(SHAPE, CLASSES, activation="gelu"), SHAPE, CLASSES)
    rule, state = ApproxBackprop(lr=0.1), RULE.init(net, seed=0)
    x, y = (torch.from_numpy(a) for a in load_digits(return_X_y=True))
    x = x.float().view(-1, *SHAPE) / 16
    rows, g = torch.arange(1437), torch.Generator().manual_seed(0)

    def cosines():
        b = Batch(x[rows], y[rows], torch.ones(len(rows)))
        true, ours = (descent(r, net, copied(state), b) for r in (Backprop(), rule))
        return [float(torch.cosine_similarity(true[k].flatten(), ours[k].flatten(), dim=0)) for k in true]

    first = cosines()
    for _ in range(5):
        for part in torch.randperm(len(rows), generator=g).split(16):
            step(rule, net, state, Batch(x[part], y[part], torch.ones(len(part))))
    assert first[4:] == pytest.approx([1, 1])  # the output layer comes after the last activation
    assert 0.6 < first[0] < 0.8 and 0.6 < first[2] < 0.8 and min(cosines()) > 0.98


def test_the_packed_network_is_made_once_and_dies_with_its_own():
    net = Network(lambda: mlp(SHAPE, CLASSES, activation="gelu"), SHAPE, CLASSES)
    twin = packed(net)
    assert packed(net) is twin and [twin.keys(i) for i in range(3)] == [net.keys(i) for i in range(3)]
    assert not any(isinstance(m, PackedActivation) for block in net.blocks for m in block.modules())
    assert all(p is q for a, b in zip(net.blocks, twin.blocks, strict=True)
               for p, q in zip(a.parameters(), b.parameters(), strict=True))  # fmt: skip
    dead = weakref.ref(twin)
    del net, twin
    gc.collect()
    assert dead() is None


def test_activations_are_found_at_any_depth_and_wherever_they_are_shared():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(64, 64), nn.GELU())

        def forward(self, x):
            return x + self.inner(x)

    act = nn.SiLU()
    first = nn.Sequential(nn.Flatten(), Residual(), act, nn.Linear(64, 20), act)
    net = Network(nn.Sequential(first, nn.Sequential(nn.Linear(20, CLASSES))), SHAPE, CLASSES)
    twin = packed(net)
    assert sum(isinstance(m, PackedActivation) for _, m in twin.blocks[0].named_modules(remove_duplicate=False)) == 3
    state, b = double(RULE.init(net, seed=1)), batch(RULE)
    own = {key.partition(".")[2]: state.params[key] for key in net.keys(0)}
    assert torch.equal(functional_call(twin.blocks[0], own, (b.x,)), functional_call(net.blocks[0], own, (b.x,)))
    assert net.forward(state.params, b.x).equal(RULE.logits(net, state, b.x))
    step(RULE, net, state, b)


def test_refusals_name_what_can_be_packed():
    with pytest.raises(
        RuleError, match=r"packs the derivatives of gelu, silu and relu, .* --set model.activation=gelu"
    ):
        RULE.check(network("mlp-tanh"))
    RULE.check(network("mlp-gelu"))


def test_the_rule_is_still_a_value():
    assert pickle.loads(pickle.dumps(RULE)) == copy.deepcopy(RULE) == ApproxBackprop()
