"""The way back is backpropagation's where it goes through the forward weights, and a pseudo-loss's where not."""

import numpy as np
import pytest
import torch
from cases import NETS, SHAPE, assert_close, batch, double, leaves, network, nonuniform
from cases import weighted_cross_entropy as cross_entropy
from fedforward.algorithms import Backprop, Batch, Network, RuleError, State
from fedforward.algorithms.blocks import CONVOLUTIONS
from fedforward.algorithms.feedback.fixed import uniform, xavier
from fedforward.algorithms.feedback.transport import learn
from fedforward.algorithms.feedback.ways import check, ways
from fedforward.algorithms.optimizer import made
from torch import nn
from torch.func import functional_call

# What the ready-made networks have not: strides, groups, dilation, layers before the weighted one, more dimensions.
ODD = {
    "strided": lambda: nn.Sequential(
        nn.Conv2d(1, 4, 3, stride=2, padding=1),
        nn.Tanh(),
        nn.Conv2d(4, 6, 3, padding=2, dilation=2, groups=2, bias=False),
        nn.ReLU(),
        nn.Conv2d(6, 6, 2, stride=2),
        nn.GroupNorm(2, 6),
        nn.GELU(),
        nn.AdaptiveMaxPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 10),
    ),
    "rows": lambda: nn.Sequential(  # of an image, each mapped by itself, then a convolution along them
        nn.Flatten(1, 2),
        nn.Linear(8, 7),
        nn.ReLU(),
        nn.Linear(7, 6),
        nn.LayerNorm(6),
        nn.SiLU(),
        nn.Conv1d(8, 5, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(20, 10),
    ),
    "pool-before": lambda: nn.Sequential(
        nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU()),
        nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(4, 5, 3, padding=1), nn.ReLU()),
        nn.Sequential(nn.Flatten(), nn.Linear(45, 10)),
    ),
}


def any_network(name):
    return network(name) if name in NETS else Network(ODD[name], SHAPE, 10)


def apply(layer, matrix, x):
    """Return what the layer would make of x with `matrix` for its weights and no bias."""
    return x @ matrix.T if isinstance(layer, nn.Linear) else layer._conv_forward(x, matrix, None)


def pseudo_gradients(net, params, b, stand_in):
    """Return autograd's gradients of a network that runs as `net` does, while the error passes it otherwise.

    Below a weighted layer of block i ≥ 1 the error is what it would be if `stand_in(i, layer, x, params)` had made the
    layer's output of its input.
    """
    params, x = leaves(params), b.x
    for i, block in enumerate(net.blocks):
        for name, layer in block.named_children():
            own = {key: params[f"{i}.{name}.{key}"] for key, _ in layer.named_parameters()}
            if i > 0 and isinstance(layer, (nn.Linear, *CONVOLUTIONS)):
                other = stand_in(i, layer, x, params)
                x = functional_call(layer, own, (x.detach(),)) + other - other.detach()
            else:
                x = functional_call(layer, own, (x,))
    grads = torch.autograd.grad(cross_entropy(x, b), list(params.values()))
    return dict(zip(params, grads, strict=True))


def learned(net, params, b, matrix_of):
    """Return what `learn` hands to its update, where the error of block i goes below through `matrix_of(i)`."""
    found = {}
    stats = learn(
        net,
        State(params, {}, {}),
        b,
        send=lambda i, crossing, grads: crossing.through(matrix_of(i)),
        update=lambda grads: found.update({key: made(grad).clone() for key, grad in grads.items()}),
    )
    return found, stats


def assert_side_by_side_as_alone(rule, net):
    """Assert that replicas that are stacked learn what each learns alone, with draws of its own."""
    alone = [double(rule.init(net, seed)) for seed in range(3)]
    fixed = alone[0].fixed  # the same for all
    params, slots = (
        {key: torch.stack([part[key] for part in parts]) for key in parts[0]}
        for parts in ([state.params for state in alone], [state.slots for state in alone])
    )
    for s in range(2):
        batches = [nonuniform(batch(rule, 5, step=s, client=c)) for c in range(3)]
        x, y, weight = (torch.stack([b[i] for b in batches]) for i in range(3))
        draws = None if batches[0].draws is None else torch.stack([b.draws for b in batches])
        stats = rule.step(net, State(params, fixed, slots), Batch(x.flatten(2), y, weight, draws), 0.1)
        for c, b in enumerate(batches):
            found = rule.step(net, alone[c]._replace(fixed=fixed), b, 0.1)
            assert_close({n: v[c] for n, v in stats._asdict().items()}, found._asdict(), atol=1e-12)
            assert_close({key: p[c] for key, p in params.items()}, alone[c].params, atol=1e-12)
            assert_close({key: p[c] for key, p in slots.items()}, alone[c].slots, atol=1e-12)


@pytest.fixture(params=[*NETS, *ODD])
def problem(request):
    net = any_network(request.param)
    check(net, "this rule")
    return net, double(Backprop().init(net, seed=1)).params, nonuniform(batch(Backprop()))


def test_through_the_forward_weights_it_is_backpropagation(problem):
    net, params, b = problem
    variables = leaves(params)
    loss = cross_entropy(net.forward(variables, b.x), b)
    truth = dict(zip(params, torch.autograd.grad(loss, list(variables.values())), strict=True))
    found, stats = learned(net, params, b, lambda i: params[ways(net)[i].weight])
    assert_close({key: found[key] for key in params}, truth, atol=1e-9)
    assert abs(stats.loss - loss * b.weight.sum()) < 1e-9 and stats.weight == b.weight.sum()


def test_through_other_matrices_it_is_the_gradient_of_a_pseudo_loss(problem):
    net, params, b = problem
    g = torch.Generator().manual_seed(3)
    others = {i: torch.randn(params[way.weight].shape, generator=g).double() for i, way in enumerate(ways(net))}
    truth = pseudo_gradients(net, params, b, lambda i, layer, x, _: apply(layer, others[i], x))
    found, _ = learned(net, params, b, others.get)
    assert_close({key: found[key] for key in params}, truth, atol=1e-9)
    exact, _ = learned(net, params, b, lambda i: params[ways(net)[i].weight])
    first = ways(net)[0].weight
    assert (found[first] - exact[first]).abs().max() > 1e-4, "another way back is another gradient"


def test_it_changes_no_bit_and_no_parameter(problem):
    net, params, b = problem
    before = {key: p.clone() for key, p in params.items()}
    runs = [learned(net, params, b, lambda i: params[ways(net)[i].weight])[0] for _ in range(2)]
    assert all(torch.equal(runs[0][key], runs[1][key]) for key in params)
    assert all(torch.equal(before[key], params[key]) for key in params)


def test_every_block_has_one_weighted_layer_named():
    assert {way.weight for way in ways(network("lenet"))} < set(network("lenet").init(0))
    assert ways(network("lenet")) is ways(network("lenet")), "found once"


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(12, 12)

    def forward(self, x):
        return x + self.inner(x)


SAME = nn.ReLU()


def blocks(*middle):
    """Return a network whose second block is `middle`, from 12 units to 12."""
    return Network(
        nn.Sequential(
            nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.ReLU()),
            nn.Sequential(*middle),
            nn.Sequential(nn.Linear(12, 10)),
        ),
        SHAPE,
        10,
    )


def padded(**options):
    return Network(
        nn.Sequential(
            nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.ReLU()),
            nn.Sequential(nn.Conv2d(2, 2, 3, **options), nn.ReLU()),
            nn.Sequential(nn.Flatten(), nn.Linear(128, 10)),
        ),
        SHAPE,
        10,
    )


@pytest.mark.parametrize(
    "net, why",
    [
        (blocks(nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 12)), "one weighted layer a block, and block 1 .* has 2"),
        (blocks(nn.ReLU()), "block 1 .* has 0: make a block of each"),
        (blocks(Residual()), "block 1 .* has none: use backprop-fused"),
        (blocks(nn.LayerNorm(12), nn.Linear(12, 12)), "put norms after the weighted layer"),
        (blocks(nn.Linear(12, 12), SAME, SAME), "no layer there twice"),
        (padded(padding="same"), "zero padding, and block 1 .* pads otherwise: give a number"),
        (padded(padding=1, padding_mode="circular"), "pads otherwise"),
    ],
)
def test_what_it_cannot_go_through_is_refused_in_one_line(net, why):
    with pytest.raises(RuleError, match=f"this rule .*{why}") as refused:
        check(net, "this rule")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("layer", [nn.Linear(30, 70), nn.Conv2d(6, 10, 5), nn.Conv2d(8, 12, 3, groups=4)])
def test_glorots_size_is_pytorchs(layer):
    shape = layer.weight.shape
    drawn = nn.init.xavier_normal_(torch.empty(shape), generator=torch.Generator().manual_seed(0))
    assert float(drawn.square().mean() ** 0.5) == pytest.approx(xavier(shape), rel=0.1)


def test_uniform_numbers_have_the_size_that_is_asked_for():
    drawn = uniform(np.random.default_rng(0), torch.Size((100, 100)), 0.25)
    assert drawn.dtype == torch.float32 and abs(drawn.mean()) < 0.01
    assert float(drawn.square().mean() ** 0.5) == pytest.approx(0.25, rel=0.02)
    assert 0.99 < drawn.abs().max() / (0.25 * 3**0.5) <= 1
