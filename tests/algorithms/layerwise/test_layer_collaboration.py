"""Layer collaboration against its losses written out: every layer's own goodness learns, the others' is a constant."""

import pytest
import torch
from cases import (
    CLASSES,
    SHAPE,
    assert_close,
    batch,
    copied,
    descent,
    double,
    equal,
    leaves,
    network,
    nonuniform,
    run_block,
    step,
)
from fedforward.algorithms import ForwardForward, Network, RuleError
from fedforward.algorithms.layerwise.layer_collaboration import LayerCollaboration
from fedforward.algorithms.models import mlp
from fedforward.client.plan import Planner
from torch.nn.functional import binary_cross_entropy_with_logits

PLAIN = {"momentum": 0.0, "weight_decay": 0.0}
DEEP = Network(lambda: mlp(SHAPE, CLASSES, hidden=(14, 12, 8)), SHAPE, CLASSES)


def labelled(x, y):
    """Return x with the one-hot label y in its first inputs."""
    out = x.clone().flatten(1)
    out[:, :CLASSES] = torch.nn.functional.one_hot(y, CLASSES).to(x.dtype)
    return out.view_as(x)


def unit(a):
    return a / (a.flatten(1).pow(2).mean(1).sqrt() + 1e-8).view(-1, *[1] * (a.dim() - 1))


def activities(net, params, x):
    """Return every hidden block's output, each with a graph of its own."""
    x, found = unit(x), []
    for i in net.hidden:
        found.append(run_block(net, i, params, x.detach()))
        x = unit(found[-1])
    return found


def excess(a):
    """Return goodness above the layer's threshold."""
    return a.flatten(1).pow(2).sum(1) - a[0].numel()


def local_loss(net, params, b, gamma):
    """Return Σ_l L_l, the others' goodness cut off, as it is in the same state for all layers."""
    x = torch.cat([labelled(b.x, b.y), labelled(b.x, (b.y + b.draws) % CLASSES)])
    found = [excess(a) for a in activities(net, params, x)]
    target = torch.cat([torch.ones(len(b.y)), torch.zeros(len(b.y))]).double()
    weight, loss = torch.cat([b.weight, b.weight]) / (2 * b.weight.sum()), 0.0
    for i, own in enumerate(found):
        others = found[:i] if gamma == "below" else found[:i] + found[i + 1 :]
        logit = own + sum(other.detach() for other in others)
        loss = loss + (binary_cross_entropy_with_logits(logit, target, reduction="none") * weight).sum()
    return loss


def shrunk(state):
    """Return the state with weights so small that the sigmoids leave their flat ends."""
    for key, p in state.params.items():
        if key.endswith("weight"):
            p.mul_(0.5)
    return state


def near(net, state, x):
    """Return the state with each layer's goodness near its threshold, so that the sum of all of them is near 0."""
    for i in net.hidden:
        a = activities(net, state.params, x)[i]
        scale = (a[0].numel() / a.flatten(1).pow(2).sum(1).mean()).sqrt()
        for key in net.keys(i):
            if state.params[key].dim() > 1 or key.endswith("bias"):
                state.params[key].mul_(scale)
    return state


@pytest.mark.parametrize("net", [network(name) for name in ("mlp", "mlp-gelu", "lenet", "cnn-group")] + [DEEP])
@pytest.mark.parametrize("gamma", ["all", "below"])
def test_one_step_subtracts_the_gradient_of_the_shared_losses(net, gamma):
    rule = LayerCollaboration(gamma=gamma, peer=0.0, **PLAIN)
    b = nonuniform(batch(rule))
    state = near(net, double(rule.init(net, seed=1)), b.x)
    params = leaves(state.params)
    loss = local_loss(net, params, b, gamma)
    learned = {key: p for key, p in params.items() if not key.endswith("mean")}
    truth = dict(zip(learned, torch.autograd.grad(loss, list(learned.values())), strict=True))
    before = copied(state)
    got = descent(rule, net, state, b)
    assert_close({key: got[key] for key in truth}, truth, atol=1e-9)
    assert all(g.abs().max() > 1e-4 for g in truth.values())
    stats = step(rule, net, before, b)
    torch.testing.assert_close(stats.loss / stats.weight, loss.detach(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("gamma, alike", [("all", ()), ("below", ("0.",))])
def test_collaboration_changes_what_forward_forward_learns_but_where_there_is_nobody_to_ask(gamma, alike):
    b = batch(ForwardForward())
    start = shrunk(double(ForwardForward().init(DEEP, seed=1)))
    plain, shared = copied(start), copied(start)
    step(ForwardForward(), DEEP, plain, b)
    step(LayerCollaboration(gamma=gamma), DEEP, shared, b)
    for key, p in plain.params.items():
        if not key.endswith("mean"):
            assert torch.equal(shared.params[key], p) == key.startswith(alike or "none")


def test_a_layer_alone_is_forward_forwards():
    net, b = Network(lambda: mlp(SHAPE, CLASSES, hidden=(14,)), SHAPE, CLASSES), batch(ForwardForward())
    start = double(ForwardForward().init(net, seed=1))
    for gamma in ("all", "below"):
        plain, shared = copied(start), copied(start)
        a, c = step(ForwardForward(), net, plain, b), step(LayerCollaboration(gamma=gamma), net, shared, b)
        assert equal(plain.params, shared.params) and a == c


def test_the_goodness_of_all_layers_predicts():
    rule = LayerCollaboration()
    state, x = double(rule.init(DEEP, seed=1)), batch(rule).x
    columns = []
    for c in range(CLASSES):
        found = activities(DEEP, state.params, labelled(x, torch.full((len(x),), c)))
        columns.append(sum(a.pow(2).sum(1) for a in found))
    torch.testing.assert_close(rule.logits(DEEP, state, x), torch.stack(columns, 1), rtol=0, atol=1e-10)


@pytest.mark.parametrize("gamma", ["all", "below"])
def test_a_layer_more_costs_no_activation(gamma):
    width, size, peaks = 64, 32, []
    for depth in (3, 6, 12):
        net = Network(lambda: mlp((width,), CLASSES, hidden=(width,) * depth), (width,), CLASSES)  # noqa: B023
        plans = [Planner(net).step(rule, size) for rule in (LayerCollaboration(gamma=gamma), ForwardForward())]
        peaks.append(plans[0].parts["activations"])
        few = 6 * 4 * 2 * size  # numbers a row
        assert peaks[-1] - plans[1].parts["activations"] <= few + (4 * 2 * size * width if gamma == "all" else 0)
        forwards = sum(2 * 2 * size * width * width for _ in net.hidden)
        assert plans[0].flops - plans[1].flops == (forwards if gamma == "all" else 0)
    assert peaks[0] == peaks[1] == peaks[2]


def test_refusals_name_the_remedy():
    with pytest.raises(RuleError, match="unknown gamma 'above': use all or below"):
        LayerCollaboration(gamma="above")
    with pytest.raises(RuleError, match="layer-collaboration needs two hidden blocks or more, and this model has 1"):
        LayerCollaboration().check(Network(lambda: mlp(SHAPE, CLASSES, hidden=(8,)), SHAPE, CLASSES))
