"""Forward-Forward against its local loss written out, and its two ways of inference against a hand computation."""

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
    leaves,
    network,
    nonuniform,
    run_block,
    step,
)
from cases import weighted_cross_entropy as cross_entropy
from fedforward.algorithms import ForwardForward, Network, RuleError
from fedforward.algorithms.layerwise.forward_forward import embed, normalise_
from fedforward.algorithms.models import mlp
from fedforward.algorithms.seeds import Place
from torch.nn.functional import binary_cross_entropy_with_logits

PLAIN = {"momentum": 0.0, "weight_decay": 0.0}
RULE = ForwardForward(**PLAIN)


def labelled(x, y):
    """Return x with the one-hot label y in its first inputs, one value at a time."""
    out = x.clone().flatten(1)
    for row, label in zip(out, y, strict=True):
        for c in range(CLASSES):
            row[c] = float(c == label)
    return out.view_as(x)


def unit(a):
    """Return a scaled to a root mean square of 1 per sample."""
    return a / (a.flatten(1).pow(2).mean(1).sqrt() + 1e-8).view(-1, *[1] * (a.dim() - 1))


def activity(net, i, params, x):
    """Return a block's output: for dense blocks the ReLU whose gradient is one everywhere, else the block's own."""
    if net.dense(i) is None:
        return run_block(net, i, params, x)
    w, b = (params[key] for key in net.keys(i))
    z = x.flatten(1) @ w.T + b
    return z + (z.relu() - z).detach()


def local_loss(net, params, b, peer):
    """Return (Σ_l L_l with every input detached, the new running means): equation by equation, for autograd."""
    true, wrong = labelled(b.x, b.y), labelled(b.x, (b.y + b.draws) % CLASSES)
    x, size = unit(torch.cat([true, wrong])), len(b.y)
    weight = torch.cat([b.weight, b.weight]) / (2 * b.weight.sum())
    target = torch.cat([torch.ones(size), torch.zeros(size)]).double()
    loss, means = 0.0, {}
    for i in net.hidden:
        a = activity(net, i, params, x.detach()).flatten(1)
        width = a.shape[1]
        losses = binary_cross_entropy_with_logits(a.pow(2).sum(1) - width, target, reduction="none")
        mean_activity = (b.weight[:, None] * a[:size]).sum(0) / b.weight.sum()
        mean = 0.9 * params[f"{i}.mean"].detach() + 0.1 * mean_activity
        loss = loss + (losses * weight).sum() + peer * (mean.mean() - mean).pow(2).mean()
        means[f"{i}.mean"] = mean.detach()
        x = unit(a.view(-1, *net.sizes[i]))
    return loss, means


def shrunk(state):
    """Return the state with weights so small that the sigmoids leave their flat ends."""
    for key, p in state.params.items():
        if key.endswith("weight"):
            p.mul_(0.5)
        elif key.endswith("bias"):
            p.add_(0.01)
    return state


@pytest.mark.parametrize("name", ["mlp", "flat", "lenet", "mlp-gelu", "cnn-group"])
@pytest.mark.parametrize("peer", [0.0, 0.03, 10.0])
def test_one_step_subtracts_the_gradient_of_the_local_losses(name, peer):
    net, rule = network(name), ForwardForward(peer=peer, **PLAIN)
    state, b = shrunk(double(rule.init(net, seed=1))), nonuniform(batch(rule))
    params = leaves(state.params)
    loss, means = local_loss(net, params, b, peer)
    learned = {key: p for key, p in params.items() if key not in means}
    truth = dict(zip(learned, torch.autograd.grad(loss, list(learned.values())), strict=True))
    got = descent(rule, net, state, b)
    assert_close({key: got[key] for key in truth}, truth, atol=1e-9)
    if not peer:  # without its term the means stand still
        means = {key: params[key].detach() for key in means}
    assert_close({key: state.params[key] for key in means}, means, atol=1e-12)
    assert all(g.abs().max() > 1e-5 for g in truth.values())


def test_the_peer_term_wakes_units_that_are_always_off():
    net, b = network("mlp"), batch(RULE)
    for peer, woken in ((0.0, False), (0.03, True)):
        rule = ForwardForward(peer=peer, **PLAIN)
        state = double(rule.init(net, seed=1))
        state.params["0.linear.bias"][3] = -100.0
        state.params["0.mean"][3] = 0.0
        moved = descent(rule, net, state, b)["0.linear.bias"][3]
        assert (moved < 0) == woken and (moved == 0) == (not woken)


def test_stats_are_the_mean_loss_of_true_and_wrong_labels():
    net, b = network("mlp"), nonuniform(batch(RULE))
    state = double(RULE.init(net, seed=1))
    loss, _ = local_loss(net, state.params, b, peer=0.0)
    stats = step(RULE, net, state, b)
    torch.testing.assert_close(stats.loss / stats.weight, loss, rtol=0, atol=1e-12)


def test_label_sweep_adds_the_goodness_of_all_layers_but_the_first():
    net = Network(lambda: mlp(SHAPE, CLASSES, hidden=(14, 12, 8)), SHAPE, CLASSES)
    state, x = double(RULE.init(net, seed=1)), batch(RULE).x
    wanted = torch.zeros(len(x), CLASSES, dtype=torch.float64)
    for c in range(CLASSES):
        a = unit(labelled(x, [c] * len(x))).flatten(1)
        for i in net.hidden:
            a = (a @ state.params[f"{i}.linear.weight"].T + state.params[f"{i}.linear.bias"]).relu()
            if i > 0:
                wanted[:, c] += a.pow(2).sum(1)
            a = unit(a)
    torch.testing.assert_close(RULE.logits(net, state, x), wanted, rtol=0, atol=1e-10)


def test_the_goodness_of_the_first_layer_is_not_counted():
    net = network("mlp")
    state, x = double(RULE.init(net, seed=1)), batch(RULE).x
    before = RULE.logits(net, state, x)
    for key in net.keys(0):
        state.params[key].mul_(7.0)  # 49 times its goodness; its normalised output stays
    torch.testing.assert_close(RULE.logits(net, state, x), before, rtol=1e-6, atol=1e-6)


def test_wrong_labels_are_never_right_and_uniform_over_the_others():
    n, y = 90_000, 3
    wrong = (y + RULE.draw(Place(1, 2, 3, 4), n, CLASSES)) % CLASSES
    counts = wrong.bincount(minlength=CLASSES)
    assert counts[y] == 0
    expected = n / (CLASSES - 1)
    chi_square = sum((count - expected) ** 2 / expected for c, count in enumerate(counts.tolist()) if c != y)
    assert chi_square < 26.1  # 99.9 % of chi-square with 8 degrees of freedom
    assert set(RULE.draw(Place(1, 2, 3, 4), 50, 2).tolist()) == {1}


def test_a_label_replaces_the_first_inputs_and_length_is_normalised():
    b = batch(RULE)
    other = (b.y + 1) % CLASSES
    assert torch.equal(embed(b.x, (b.y,), CLASSES), labelled(b.x, b.y))
    both = embed(b.x, (b.y, other), CLASSES)
    assert torch.equal(both, torch.cat([labelled(b.x, b.y), labelled(b.x, other)]))
    torch.testing.assert_close(normalise_(b.x.clone()), unit(b.x), rtol=0, atol=1e-15)
    torch.testing.assert_close(normalise_(1000 * b.x), normalise_(b.x.clone()), rtol=0, atol=1e-7)
    maps = torch.rand(3, 4, 5, 6).to(memory_format=torch.channels_last)
    torch.testing.assert_close(normalise_(maps.clone()), unit(maps))
    assert not normalise_(torch.zeros(2, 5)).any()  # a silent layer stays silent and finite


def neutral_activity(net, params, x):
    x = x.clone().flatten(1)
    x[:, :CLASSES] = 0.1
    a, kept = unit(x.view(-1, *SHAPE)), []
    for i in net.hidden:
        a = unit(run_block(net, i, params, a))
        if i > 0:
            kept.append(a.flatten(1))
    return torch.cat(kept, 1)


@pytest.mark.parametrize("name", ["mlp", "lenet"])
def test_the_read_out_descends_its_cross_entropy_with_its_own_rate_and_decay(name):
    net = network(name)
    rule = ForwardForward(inference="one-pass", momentum=0.0, weight_decay=0.2, readout_weight_decay=0.05, lr=0.5)
    state, b = double(rule.init(net, seed=1)), nonuniform(batch(rule))
    readout = state.params["readout.weight"].normal_(generator=torch.Generator().manual_seed(0)).clone()
    before = copied(state)
    step(rule, net, state, b, lr=0.25)
    weight = readout.clone().requires_grad_()  # read with the layers that the step has just updated
    loss = cross_entropy(neutral_activity(net, state.params, b.x) @ weight.T, b)
    (gradient,) = torch.autograd.grad(loss, weight)
    rate = 0.25 * rule.readout_lr / 0.5
    wanted = readout - rate * (gradient + 0.05 * readout)
    torch.testing.assert_close(state.params["readout.weight"], wanted, rtol=0, atol=1e-12)
    scores = neutral_activity(net, before.params, b.x) @ readout.T
    torch.testing.assert_close(rule.logits(net, before, b.x), scores, rtol=0, atol=1e-12)


def test_a_block_with_a_norm_starts_alive():
    # Norms are one-dimensional weights: zeroed like biases they would silence the block for ever.
    net = network("cnn-group")
    state, b = double(RULE.init(net, seed=1)), batch(RULE)
    assert net.block(0, state.params, b.x).abs().max() > 0.1
    assert descent(RULE, net, state, b)["0.conv2d.weight"].abs().max() > 1e-4


def test_refusals_name_the_remedy():
    with pytest.raises(RuleError, match="this model has 1: add a layer"):
        RULE.check(Network(lambda: mlp(SHAPE, CLASSES, hidden=(8,)), SHAPE, CLASSES))
    with pytest.raises(RuleError, match="into the first 10 inputs, and there are only 9"):
        RULE.check(Network(lambda: mlp((9,), CLASSES, hidden=(8, 8)), (9,), CLASSES))
    with pytest.raises(RuleError, match="use sweep or one-pass"):
        ForwardForward(inference="both")
