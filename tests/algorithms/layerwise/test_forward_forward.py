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
from fedforward.algorithms.layerwise.goodness import embed, normalise_
from fedforward.algorithms.layerwise.negatives import hard_offsets, hybrids, partners
from fedforward.algorithms.models import mlp
from fedforward.algorithms.noise import seeds, signs
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


def local_loss(net, params, b, peer, pair=None):
    """Return (Σ_l L_l with every input detached, the new running means): equation by equation, for autograd."""
    true, wrong = pair or (labelled(b.x, b.y), labelled(b.x, (b.y + b.draws) % CLASSES))
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


def neutral_activity(net, params, x, label=0.1):
    x = x.clone().flatten(1)
    if label is not None:
        x[:, :CLASSES] = label
    a, kept = unit(x.view(-1, *SHAPE)), []
    for i in net.hidden:
        a = unit(run_block(net, i, params, a))
        if i > 0:
            kept.append(a.flatten(1))
    return torch.cat(kept, 1)


@pytest.mark.parametrize("negatives, label", [("label", 0.1), ("hard", 0.1), ("hybrid", None)])
@pytest.mark.parametrize("name", ["mlp", "lenet"])
def test_the_read_out_descends_its_cross_entropy_with_its_own_rate_and_decay(name, negatives, label):
    net = network(name)
    rule = ForwardForward(
        negatives=negatives,
        inference="one-pass",
        momentum=0.0,
        weight_decay=0.2,
        readout_weight_decay=0.05,
        lr=0.5,
    )
    state, b = double(rule.init(net, seed=1)), nonuniform(batch(rule))
    readout = state.params["readout.weight"].normal_(generator=torch.Generator().manual_seed(0)).clone()
    before = copied(state)
    step(rule, net, state, b, lr=0.25)
    weight = readout.clone().requires_grad_()  # read with the layers that the step has just updated
    loss = cross_entropy(neutral_activity(net, state.params, b.x, label) @ weight.T, b)
    (gradient,) = torch.autograd.grad(loss, weight)
    rate = 0.25 * rule.readout_lr / 0.5
    wanted = readout - rate * (gradient + 0.05 * readout)
    torch.testing.assert_close(state.params["readout.weight"], wanted, rtol=0, atol=1e-12)
    scores = neutral_activity(net, before.params, b.x, label) @ readout.T
    torch.testing.assert_close(rule.logits(net, before, b.x), scores, rtol=0, atol=1e-12)


PLACE = Place(1, 2, 3, 4)
HYBRID = ForwardForward(negatives="hybrid", inference="one-pass", **PLAIN)


def test_a_partner_is_another_sample_that_counts_whatever_does_not():
    drawn, weight = seeds(PLACE, 9), torch.tensor([1.0, 0, 2, 0.5, 0, 1, 1, 0, 0])
    found, counting = partners(weight, drawn), [0, 2, 3, 5, 6]
    assert all(int(found[j]) in counting and int(found[j]) != j for j in counting)
    kept = partners(weight[counting], drawn[counting])  # the others left out
    assert [counting[k] for k in kept] == found[counting].tolist()
    assert partners(torch.ones(1), drawn[:1]).tolist() == [0]
    assert partners(torch.tensor([0.0, 1.0, 0.0]), drawn[:3])[1] == 1
    assert partners(torch.zeros(3), drawn[:3]).shape == (3,)  # a batch of padding alone runs


def test_partners_are_uniform_over_the_others():
    count = torch.zeros(5, 5)
    for s in range(800):
        found = partners(torch.ones(5), seeds(PLACE._replace(step=s), 5))
        count[torch.arange(5), found] += 1
    assert not count.diagonal().any()
    chi_square = ((count[~torch.eye(5, dtype=bool)] - 200).square() / 200).sum()
    assert chi_square < 37.7  # 99.9 % of chi-square with 15 degrees of freedom


def smoothed(bits):
    """Return a mask of a sample's random signs, blurred six times in both directions, neighbour by neighbour."""
    rows, columns = bits.shape
    for _ in range(6):
        for r, c in ((1, 0), (0, 1)):
            old, bits = bits, torch.zeros_like(bits)
            for i in range(rows):
                for j in range(columns):
                    for step_, share in ((-1, 0.25), (0, 0.5), (1, 0.25)):
                        y, x = i + step_ * r, j + step_ * c
                        if 0 <= y < rows and 0 <= x < columns:
                            bits[i, j] += share * old[y, x]
    return bits > 0


def test_a_hybrid_is_two_samples_under_a_smooth_mask():
    drawn, weight = seeds(PLACE, 4), torch.tensor([1.0, 1, 0, 1])
    x = torch.rand(4, 3, 8, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    bits, found = next(signs(drawn, 1, 1, 48, torch.float64)).view(4, 8, 6), partners(weight, drawn)
    for mixed, own, other, b in zip(hybrids(x, weight, drawn), x, x[found], bits, strict=True):
        mask = smoothed(b)
        assert torch.equal(mixed, torch.where(mask, own, other))
        assert 0 < mask.sum() < 48
    assert torch.equal(hybrids(x.float(), weight, drawn), hybrids(x, weight, drawn).float()), "masks do not round"


def test_masks_take_half_of_each_sample_in_patches():
    drawn = seeds(PLACE, 400)
    x = torch.zeros(400, 1, 28, 28)
    x[::2] = 1
    mask = hybrids(x, torch.tensor([1.0, 0] * 200), drawn)  # partners are ones
    assert mask[::2].all()
    x, own = torch.arange(400.0).view(-1, 1, 1, 1).expand(-1, 1, 28, 28), torch.arange(400.0).view(-1, 1, 1)
    mask = hybrids(x, torch.ones(400), drawn)[:, 0] == own
    parts = mask.float().mean((1, 2))
    assert abs(parts.mean() - 0.5) < 4 * parts.std() / 20
    near, far = ((mask[:, :, d:] == mask[:, :, :-d]).float().mean() for d in (1, 14))
    assert near > 0.8 and abs(far - 0.5) < 0.03


@pytest.mark.parametrize("name", ["mlp", "lenet"])
@pytest.mark.parametrize("peer", [0.0, 10.0])
def test_layers_learn_to_tell_samples_from_hybrids_without_labels(name, peer):
    net, rule = network(name), ForwardForward(negatives="hybrid", inference="one-pass", peer=peer, **PLAIN)
    state, b = shrunk(double(rule.init(net, seed=1))), nonuniform(batch(rule))
    others = copied(state), copied(state)
    params = leaves(state.params)
    loss, means = local_loss(net, params, b, peer, (b.x, hybrids(b.x, b.weight, b.draws)))
    learned = {key: p for key, p in params.items() if key not in means and key != "readout.weight"}
    truth = dict(zip(learned, torch.autograd.grad(loss, list(learned.values())), strict=True))
    got = descent(rule, net, state, b)
    assert_close({key: got[key] for key in truth}, truth, atol=1e-9)
    assert all(g.abs().max() > 1e-5 for g in truth.values())
    for other, shift in zip(others, (0, 3), strict=True):
        step(rule, net, other, b._replace(y=(b.y + shift) % CLASSES))
    same = {key for key in params if torch.equal(others[0].params[key], others[1].params[key])}
    assert same == set(params) - {"readout.weight"}


def test_hard_labels_are_drawn_by_their_scores_and_never_right():
    n, scores = 90_000, torch.tensor([2.0, 1.0, 5.0, 0.0, -1.0], dtype=torch.float64)
    uniform = ForwardForward(negatives="hard").draw(PLACE, n, 5)
    assert uniform.min() >= 0 and uniform.max() < 1 and uniform.dtype == torch.float32
    y = torch.full((n,), 2)
    counts = ((y + hard_offsets(scores.expand(n, -1), y, uniform)) % 5).bincount(minlength=5)
    odds = scores.exp() * torch.tensor([1, 1, 0, 1, 1])
    expected = n * odds / odds.sum()
    assert counts[2] == 0
    assert ((counts - expected).square() / expected.clamp_min(1e-9)).sum() < 16.3  # 99.9 %, 3 degrees of freedom
    for extreme in (
        torch.eye(5) * 1e4,
        -torch.eye(5) * 1e4,
        torch.zeros(5, 5),
    ):  # the right label is sure, or not at all
        for u in (0.0, 1 - 2**-24):
            offset = hard_offsets(extreme, torch.arange(5), torch.full((5,), u))
            assert set(offset.tolist()) <= {1, 2, 3, 4}
    assert hard_offsets(torch.zeros(1, 2), torch.tensor([1]), torch.zeros(1)).tolist() == [1]
    sure = torch.tensor([[1e4, 0.0, 50.0], [1e4, 50.0, 0.0], [0.0, -1e4, 0.0]])  # of the others one is out of question
    assert hard_offsets(sure, torch.zeros(3, dtype=torch.int64), torch.tensor([0.5, 0.5, 0.0])).tolist() == [2, 1, 2]


@pytest.mark.parametrize("inference", ["sweep", "one-pass"])
def test_a_step_on_hard_labels_is_one_on_the_labels_that_the_read_out_confuses(inference):
    net, rule = network("mlp"), ForwardForward(negatives="hard", inference=inference, **PLAIN)
    state, b = double(rule.init(net, seed=1)), nonuniform(batch(rule, 12))
    readout = state.params["readout.weight"].normal_(generator=torch.Generator().manual_seed(0))
    scores = neutral_activity(net, state.params, b.x) @ readout.T
    wanted = copied(state)
    blind = ForwardForward(inference="one-pass", **PLAIN)
    told = b._replace(draws=hard_offsets(scores, b.y, b.draws))
    assert torch.equal(rule.logits(net, state, b.x), ForwardForward(inference=inference).logits(net, state, b.x))
    a, c = step(rule, net, state, b), step(blind, net, wanted, told)
    assert_close(state.params, wanted.params, atol=1e-12)
    assert_close(a._asdict(), c._asdict(), atol=1e-12)
    drawn = hard_offsets(torch.zeros_like(scores), b.y, b.draws)
    assert not torch.equal(told.draws, drawn), "the scores matter"


def test_what_cannot_be_split_says_why():
    assert (
        "two samples" in HYBRID.unsplittable
        and "two samples" in ForwardForward(negatives="hybrid", inference="one-pass", peer=0.0).unsplittable
    )
    for rule in (ForwardForward(negatives="hard", peer=0.0), ForwardForward(inference="one-pass", peer=0.0)):
        assert rule.unsplittable == "the read-out learns at a rate of its own"


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
    with pytest.raises(RuleError, match="use one of label, hybrid, hard"):
        ForwardForward(negatives="easy")
    with pytest.raises(RuleError, match=r"use rule\.inference=one-pass"):
        ForwardForward(negatives="hybrid")
    nine = Network(lambda: mlp((9,), CLASSES, hidden=(8, 8)), (9,), CLASSES)
    with pytest.raises(RuleError, match=r"use rule\.negatives=label"):
        HYBRID.check(nine)
    HYBRID.check(Network(lambda: mlp((1, 9), CLASSES, hidden=(8, 8)), (1, 9), CLASSES))
