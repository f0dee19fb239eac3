"""What the NoProp rules share: noise that leaves as it should, and blocks that see what the network's output sees."""

from itertools import pairwise

import pytest
import torch
from cases import NETS, SHAPE, assert_close, batch, network
from denoised import EMBEDDINGS, unlike
from fedforward.algorithms import Network, RuleError
from fedforward.algorithms.layerwise.denoising import Denoiser, chance, noised, onward
from fedforward.algorithms.layerwise.no_prop import NoProp, cosine
from fedforward.algorithms.layerwise.no_prop_ct import NoPropCT
from fedforward.algorithms.layerwise.no_prop_fm import NoPropFM
from torch import nn


@pytest.mark.parametrize("steps", [1, 4, 10])
def test_with_a_right_guess_each_level_is_drawn_from_q(steps):
    # Of one number u = 1: with noise of variance c beside, z_t has q's mean √ᾱ_t and variance 1 − ᾱ_t all along.
    levels = cosine(steps)
    for s, t in [*pairwise(levels), (levels[0], levels[-1])]:
        c = (1 - t) * (1 - s / t) / (1 - s)
        z, dz = torch.tensor([s**0.5, (1 - s) ** 0.5], dtype=torch.float64)
        mean, spread = onward(z, 1.0, s, t), onward(dz, 0.0, s, t)
        assert abs(float(mean) - t**0.5) < 1e-12
        assert abs(float(spread) ** 2 + c - (1 - t)) < 1e-12 and c > 0
        one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
        assert float(noised(one, s, zero)) == s**0.5 and abs(float(noised(zero, s, one)) - (1 - s) ** 0.5) < 1e-15


def test_levels_rise_like_a_cosine_and_reach_neither_end():
    for steps in (1, 4, 10):
        levels = torch.tensor(cosine(steps), dtype=torch.float64)
        assert len(levels) == steps + 1 and levels[0] > 0 and levels.diff().min() > 0
        angles = levels.sqrt().acos().diff()  # equal steps of the angle
        torch.testing.assert_close(angles, angles[:1].expand(steps), rtol=0, atol=1e-12)
        torch.testing.assert_close(levels + levels.flip(0), torch.ones(steps + 1).double(), rtol=0, atol=1e-12)


def test_times_are_uniform_each_sample_s_own_and_the_same_in_any_accuracy():
    draws = batch(NoProp(), 4000).draws
    times = chance(draws, 0, torch.float64)
    assert times.min() > 0 and times.max() < 1 and len(times.unique()) > 3990
    counts = torch.histc(times, 10, 0, 1)
    assert (counts - 400).abs().max() < 4 * (4000 * 0.09) ** 0.5
    assert torch.equal(chance(draws, 0, torch.float32).double(), times)
    apart = torch.corrcoef(torch.stack([times, chance(draws, 1, torch.float64)]))[0, 1]
    assert abs(apart) < 4 / 4000**0.5


@pytest.mark.parametrize("name", NETS)
def test_features_are_what_the_network_s_output_layer_reads(name):
    net = network(name)
    params, x = net.init(1), torch.rand(5, *SHAPE)
    weight, bias = (params[key] for key in net.keys(net.output))
    scores = Denoiser(net, 4, 3, 2, False).features(params, x) @ weight.T + bias
    torch.testing.assert_close(scores, net.forward(params, x))


def test_without_hidden_blocks_and_with_an_output_of_any_kind_a_block_sees_all_there_is():
    flat = Network(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), SHAPE, 10)
    wide = Network(nn.Sequential(nn.Conv2d(1, 10, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()), SHAPE, 10)
    x = torch.rand(5, *SHAPE)
    for net in (flat, wide):
        for like_x in (False, True):
            block = Denoiser(net, 64, 7, 2, like_x)
            params = block.init(0)
            assert torch.equal(block.features(params, x), x.flatten(1))
            assert block.output(params, x.flatten(1), torch.rand(5, 64)).shape == (5, 2)


@pytest.mark.parametrize("rule", [NoProp, NoPropCT, NoPropFM])
def test_embeddings_are_of_one_length_at_right_angles_where_they_fit_and_of_the_seed(rule):
    net = network("mlp")
    assert "embedding" not in rule().init(net, 1).params
    for own, size in ((rule(embedding="learned", dim=12), 12), (rule(embedding="prototype"), 64)):
        u = own.init(net, 1).params["embedding"]
        assert u.shape == (10, size)
        torch.testing.assert_close(u @ u.T, 4 * torch.eye(10), rtol=0, atol=1e-5)
        assert not torch.allclose(u, own.init(net, 2).params["embedding"])
    u = rule(embedding="learned", dim=6).init(net, 1).params["embedding"]
    torch.testing.assert_close(u.norm(dim=1), 2 * torch.ones(10))
    assert not rule().init(net, 1).fixed


def test_a_prototype_is_seen_through_hidden_blocks_of_its_own():
    net = network("lenet")
    params = NoPropCT(embedding="prototype").init(net, 1).params
    for key in (key for i in net.hidden for key in net.keys(i)):
        assert params[key].shape == params[f"z.{key}"].shape and not torch.equal(params[key], params[f"z.{key}"])
    assert not any(key.startswith("z.0") for key in NoPropCT().init(net, 1).params)


@pytest.mark.parametrize("rule", [NoProp, NoPropCT, NoPropFM])
@pytest.mark.parametrize("embedding", EMBEDDINGS)
def test_inference_is_a_function_of_the_model_and_of_each_sample_alone(rule, embedding):
    net, own = network("mlp"), rule(embedding=embedding, steps=3)
    state, x = own.init(net, 1), torch.rand(6, *SHAPE)
    for key in [key for key in state.params if key.startswith("label")]:
        unlike(state, key)
    whole = own.logits(net, state, x)
    assert_close({"": torch.cat([own.logits(net, state, one) for one in x.split(1)])}, {"": whole}, atol=1e-5)
    assert whole.std(0).min() > 0


@pytest.mark.parametrize("rule", [NoProp, NoPropCT, NoPropFM])
def test_impossible_settings_are_refused(rule):
    with pytest.raises(RuleError, match="unknown embedding 'onehot': use one of one-hot, learned, prototype"):
        rule(embedding="onehot")
    for wrong in ({"steps": 0}, {"dim": 0}, {"width": 0}):
        with pytest.raises(RuleError, match=f"{rule.name} needs rule.steps, dim and width ≥ 1"):
            rule(**wrong)
    with pytest.raises(RuleError, match=r"rule\.sigma ≥ 0" if rule is NoPropFM else r"rule\.eta above 0"):
        rule(**({"sigma": -0.1} if rule is NoPropFM else {"eta": 0.0}))
