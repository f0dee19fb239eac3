"""Gradient-isolated modules: each descends its own loss alone, written out here in plain functions, and is dropped."""

import gc
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
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
from fedforward.algorithms import Network, RuleError
from fedforward.algorithms.layerwise import modules
from fedforward.algorithms.layerwise.aug_local import AugLocal
from fedforward.algorithms.layerwise.dgl import DGL
from fedforward.algorithms.layerwise.infopro import InfoPro
from fedforward.algorithms.layerwise.predsim import PredSim
from fedforward.algorithms.models import mlp, resnet
from fedforward.client.plan import Planner

RESNET = Network(partial(resnet, SHAPE, CLASSES, depth=14, channels=(4, 6, 8)), SHAPE, CLASSES)
NETS = {name: network(name) for name in ("mlp", "mlp-gelu", "lenet", "cnn-group")} | {"resnet": RESNET}
RULES = {
    "aug-local": AugLocal(momentum=0.0),
    "dgl": DGL(momentum=0.0),
    "dgl-3": DGL(momentum=0.0, local_modules=3),
    "predsim": PredSim(optimizer="sgd"),
    "infopro": InfoPro(momentum=0.0),
    "infopro-3": InfoPro(momentum=0.0, local_modules=3),
}
CASES = [(rule, net) for rule in RULES for net in NETS if net == "resnet" or "3" not in rule]


def residual(p, x, stride, groups):
    """He et al.'s block, its shortcut a strided convolution."""
    norm = lambda x, name: F.group_norm(x, groups, p[f"{name}.weight"], p[f"{name}.bias"])  # noqa: E731
    a = norm(F.conv2d(x, p["conv_1.weight"], stride=stride, padding=1), "norm_1").relu()
    a = norm(F.conv2d(a, p["conv_2.weight"], padding=1), "norm_2")
    if "shortcut.1.weight" in p:
        x = norm(F.conv2d(x, p["shortcut.1.weight"], stride=stride), "shortcut.2")
    return (a + x).relu()


def behind(p, prefix):
    """Return the parameters behind a prefix; there are some."""
    own = {key.removeprefix(prefix): value for key, value in p.items() if key.startswith(prefix)}
    assert own
    return own


def linear(p, name, x):
    return F.linear(x, p[f"{name}.weight"], p.get(f"{name}.bias"))


def aug_local(name, i, p, a, b):
    p = behind(p, f"{i}.auxiliary.")
    if name.startswith("mlp"):
        a = {"mlp": torch.relu, "mlp-gelu": F.gelu}[name](linear(p, "0.linear", a))
    elif name == "lenet":
        a = F.max_pool2d(F.conv2d(a, p["0.conv2d.weight"], p["0.conv2d.bias"], padding=2).relu(), 2)
    elif name == "cnn-group":
        a = F.conv2d(a, p["0.conv2d.weight"], p["0.conv2d.bias"], padding=1)
        a = F.max_pool2d(F.group_norm(a, 8, p["0.groupnorm.weight"], p["0.groupnorm.bias"]).relu(), 2)
    else:  # blocks 0 to 2 have maps of 8×8, 3 and 4 of 4×4, 5 and 6 of 2×2; of 4, 6 and 8 channels
        first, stride = {0: (3, 2), 1: (4, 1), 2: (4, 1), 3: (4, 1)}[i]
        a = F.avg_pool2d(a, 2) if a.shape[2] == 8 and first == 4 else a
        a = residual(behind(p, "0.residual."), a, stride, 1)  # 6 channels, in one group
        a = residual(behind(p, "1.residual."), F.avg_pool2d(a, 2), 1, 4)
    a = a.flatten(2).mean(2) if a.dim() == 4 else a
    return cross_entropy(linear(p, f"{2 if name == 'resnet' else 1}.linear", a), b)


def dgl(name, i, p, a, b):
    p, last = behind(p, f"{i}.auxiliary."), 2
    if a.dim() == 4:
        quarter = math.ceil(a.shape[2] / 4)
        a = F.adaptive_avg_pool2d(a, quarter)
        for k in range(3):
            a = F.conv2d(a, p[f"{k}.conv2d.weight"])
            a = F.group_norm(a, 1, p[f"{k}.groupnorm.weight"], p[f"{k}.groupnorm.bias"]).relu()
        a = F.adaptive_avg_pool2d(a, min(quarter, 2)).flatten(1)
        last = 5
    for k in (last - 2, last - 1):
        a = linear(p, f"{k}.linear", a).relu()
    return cross_entropy(linear(p, f"{last}.linear", a), b)


def predsim(name, i, p, a, b):
    decoded = cross_entropy(linear(behind(p, f"{i}.decoder."), "0.linear", a.flatten(1)), b)
    own = behind(p, f"{i}.similarity.0.")
    if a.dim() == 4:
        h = F.conv2d(a, own["conv2d.weight"], padding=1).flatten(2)
        h = (h - h.mean(2, keepdim=True)).square().sum(2).div(h.shape[2] - 1).sqrt() if h.shape[2] > 1 else h.flatten(1)
    else:
        h = linear(own, "linear", a)
    loss = 0.0
    for j in range(len(b.y)):
        for k in range(len(b.y)):
            u, v = (h[m] - h[m].mean() for m in (j, k))
            target = 1.0 if b.y[j] == b.y[k] else -1 / (CLASSES - 1)
            error = (u @ v / (u.norm() * v.norm()) - target).square()
            loss = loss + error * b.weight[j] * b.weight[k] / b.weight.sum() ** 2
    return 0.01 * decoded + 0.99 * loss


def infopro(name, i, p, a, b, isolated):
    ratio = isolated.index(i) / (len(isolated) - 1) if len(isolated) > 1 else 0
    read, drawn = behind(p, f"{i}.classifier."), behind(p, f"{i}.decoder.")
    seen = a
    if a.dim() == 4:
        stride = 2 if a.shape[1] < 64 else 1
        seen = F.conv2d(a, read["0.conv2d.weight"], stride=stride, padding=1)
        assert seen.shape[1] == (2 * a.shape[1] if stride == 2 else a.shape[1])
        seen = F.group_norm(seen, 1, read["0.groupnorm.weight"], read["0.groupnorm.bias"]).relu().flatten(2).mean(2)
        a = F.interpolate(a, (8, 8), mode="bilinear", align_corners=True)
        a = F.conv2d(a, drawn["0.conv2d.weight"], drawn["0.conv2d.bias"], padding=1)
        a = F.group_norm(a, 1, drawn["0.groupnorm.weight"], drawn["0.groupnorm.bias"]).relu()
        pixels = F.conv2d(a, drawn["1.conv2d.weight"], drawn["1.conv2d.bias"], padding=1).flatten(1)
        read = {f"{int(key[0]) - 1}{key[1:]}": value for key, value in read.items()}
    else:
        pixels = linear(drawn, "1.linear", linear(drawn, "0.linear", a).relu())
    scores = linear(read, "1.linear", linear(read, "0.linear", seen).relu())
    x = b.x.flatten(1)
    x = (x - x.amin(1, keepdim=True)) / (x.amax(1, keepdim=True) - x.amin(1, keepdim=True))
    bce = -(x * pixels.sigmoid().log() + (1 - x) * (1 - pixels.sigmoid()).log()).mean(1)
    drawing = (bce * b.weight).sum() / b.weight.sum()
    return (5 * (1 - ratio) + 0.2 * ratio) * drawing + cross_entropy(scores, b)


def cut(rule, net):
    """Return the blocks of each module."""
    hidden = len(net.hidden)
    if isinstance(rule, AugLocal):
        alone = 4 if net is RESNET else 1
        return [[i] for i in range(alone)] + [list(range(alone, hidden + 1))]
    if isinstance(rule, PredSim):
        return [[i] for i in range(hidden + 1)]
    if rule.local_modules:
        return [[0, 1], [2, 3], [4, 5, 6, 7]]  # seven hidden blocks in three, and the output
    return [[i] for i in range(hidden - 1)] + [[hidden - 1, hidden]]


@pytest.mark.parametrize("rule, name", CASES)
def test_a_step_descends_the_local_losses_and_nothing_passes_between_modules(rule, name):
    written = {"aug-local": aug_local, "dgl": dgl, "predsim": predsim, "infopro": infopro}[rule.removesuffix("-3")]
    rule, net = RULES[rule], NETS[name]
    state, b = double(rule.init(net, seed=1)), nonuniform(batch(rule))
    for p in state.params.values():
        if not p.any():  # what begins at 0 would hide what hangs on it
            p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0), dtype=p.dtype))
    params, x, loss = leaves(state.params), b.x, 0.0
    *isolated, last = cut(rule, net)
    if written is infopro:
        written = partial(infopro, isolated=[blocks[-1] for blocks in isolated])
    for blocks in isolated:
        for i in blocks:
            x = run_block(net, i, params, x)
        loss, x = loss + written(name, blocks[-1], params, x, b), x.detach()
    for i in last:
        x = run_block(net, i, params, x)
    wanted = cross_entropy(x, b)
    truth = dict(zip(params, torch.autograd.grad(loss + wanted, list(params.values())), strict=True))
    stats = step(rule, net, copied(state), b)
    assert_close(descent(rule, net, state, b), truth, atol=1e-9)
    assert all(g.abs().max() > 1e-9 for g in truth.values())
    torch.testing.assert_close(stats.loss, wanted.detach() * b.weight.sum(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("rule", ["aug-local", "dgl", "predsim", "infopro"])
def test_auxiliary_nets_have_weights_of_their_own_and_no_part_in_inference(rule):
    rule, b = RULES[rule], batch(RULES[rule])
    state = double(rule.init(RESNET, seed=1))
    own = {key for i in range(len(RESNET.blocks)) for key in RESNET.keys(i)}
    assert list(state.params)[: len(own)] == list(RESNET.init(1)) and set(RESNET.init(1)) == own
    storages = {p.untyped_storage().data_ptr() for p in state.params.values()}
    assert len(storages) == len(state.params) > len(own)
    scores = rule.logits(RESNET, state, b.x)
    for key, p in state.params.items():
        if key not in own:
            p.zero_()
    assert torch.equal(rule.logits(RESNET, state, b.x), scores)
    assert torch.equal(scores, RESNET.forward(state.params, b.x))


@pytest.mark.parametrize("rule", ["aug-local", "dgl", "predsim", "infopro"])
def test_no_two_auxiliary_nets_begin_alike(rule):
    params = RULES[rule].init(RESNET, seed=1).params
    seen = [p for p in params.values() if p.numel() > 8 and p.std() > 0]
    assert len(seen) > 20
    assert len({tuple(p.flatten()[:4].tolist()) for p in seen}) == len(seen)


def test_modules_are_made_once_and_go_with_their_network():
    net, rule = Network(partial(mlp, SHAPE, CLASSES), SHAPE, CLASSES), DGL()
    assert rule.modules(net) is DGL().modules(net) is not DGL(local_modules=2).modules(net)
    before = len(modules._MADE)
    del net
    gc.collect()
    assert len(modules._MADE) == before - 1


@pytest.mark.parametrize("rule", [AugLocal(), DGL(), PredSim(), InfoPro()], ids=lambda rule: rule.name)
def test_twice_the_depth_needs_no_more_activations(rule):
    nets = [Network(partial(mlp, (16,), 4, hidden=(16,) * depth), (16,), 4) for depth in (5, 10, 20)]
    assert len({Planner(net).step(rule, 32).parts["activations"] for net in nets}) == 1


@pytest.mark.slow
@pytest.mark.parametrize("rule", [AugLocal(aux_depth=1), DGL(), PredSim(), InfoPro()], ids=lambda rule: rule.name)
def test_twice_as_many_residual_blocks_need_no_more_activations(rule):
    shape = (1, 12, 12)
    nets = [Network(partial(resnet, shape, 4, depth=depth, channels=(4, 6)), shape, 4) for depth in (10, 18)]
    first, second = (Planner(net).step(rule, 8).parts["activations"] for net in nets)
    assert second == first


@pytest.mark.parametrize("rule, net", [(rule, net) for rule in ("dgl", "infopro") for net in ("mlp", "lenet")])
def test_two_hidden_blocks_make_two_modules_and_more_cannot_be_asked_for(rule, net):
    made = RULES[rule].modules(network(net))
    assert [list(m.blocks) for m in made] == [[0], [1, 2]] and not made[1].auxiliaries
    with pytest.raises(RuleError, match=r"asked for 3 modules, and this model has 2 hidden blocks: use rule\."):
        RULES[f"{rule}-3"].check(network(net))


@pytest.mark.parametrize("hidden", range(2, 9))
def test_modules_are_of_equal_size_and_hold_every_block(hidden):
    net = Network(partial(mlp, (5,), 3, hidden=(4,) * hidden), (5,), 3)
    for count in range(2, hidden + 1):
        cut = modules.stretches(net, count, "dgl")
        assert [i for blocks, _ in cut for i in blocks] == list(range(hidden + 1))
        sizes = [len(blocks) for blocks, _ in cut]
        sizes[-1] -= 1  # the output block
        assert len(cut) == count and max(sizes) - min(sizes) <= 1
        assert cut[0][1] == 0 and (count == 2 or cut[-2][1] == 1)


@pytest.mark.parametrize("rule", [AugLocal(), DGL(), InfoPro()], ids=lambda rule: rule.name)
def test_what_cannot_be_isolated_is_refused(rule):
    with pytest.raises(RuleError, match="this model has 1 of the 2 that this takes: add a layer before the output"):
        rule.check(Network(partial(mlp, (5,), 3, hidden=(4,)), (5,), 3))
    with pytest.raises(RuleError, match="this model has 0 of the 1 that this takes"):
        PredSim().check(Network(partial(mlp, (5,), 3, hidden=()), (5,), 3))


def test_impossible_settings_are_refused():
    for wrong in (
        partial(AugLocal, aux_depth=0), partial(AugLocal, pyramid=1.5), partial(DGL, local_modules=1),
        partial(InfoPro, ixx_1=-1), partial(InfoPro, local_modules=1), partial(PredSim, beta=2),
        partial(PredSim, dim_in_decoder=0),
    ):  # fmt: skip
        with pytest.raises(RuleError, match=r"needs .*rule\."):
            wrong().check(network("cnn-group"))
