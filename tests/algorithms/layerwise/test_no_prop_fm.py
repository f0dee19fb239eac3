"""NoProp by flow matching against its loss written out, its inference, and embeddings that stay apart."""

from dataclasses import replace

import pytest
import torch
from cases import assert_close, batch, copied, descent, double, leaves, network, nonuniform, step
from denoised import EMBEDDINGS, NETS, SMALL, embeddings, gradients, output, train, unlike
from fedforward.algorithms.layerwise import no_prop_fm
from fedforward.algorithms.layerwise.denoising import chance
from fedforward.algorithms.layerwise.no_prop_fm import NoPropFM
from fedforward.algorithms.noise import normals

RULE = NoPropFM(steps=3, **SMALL)


def far(net, params, z):
    """Return −½ ‖z − u_c‖² of every class."""
    return -torch.stack([(z - u).square().sum(-1) for u in embeddings(net, params)], -1) / 2


def losses(net, params, b, sigma=0.1):
    found = []
    for i in range(len(b.y)):
        x, y, draws = b.x[i : i + 1], int(b.y[i]), b.draws[i : i + 1]
        t, u = chance(draws, 0, torch.float64)[0], embeddings(net, params)[y]
        start, noise = (normals(draws, stream, len(u), torch.float64)[0] for stream in (1, 2))
        z = t * u + (1 - t) * start + sigma * noise
        v = output(net, params, x, z[None], t)[0]
        loss = ((v - (u - start)) ** 2).mean()
        if "embedding" in params:
            end = z + (1 - t) * v
            loss = loss - (params["label.weight"] @ end + params["label.bias"]).log_softmax(0)[y]
        found.append(loss)
    return torch.stack(found)


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("embedding", EMBEDDINGS)
def test_one_step_subtracts_the_gradient_of_the_whole_loss(name, embedding):
    rule, net = replace(RULE, embedding=embedding, sigma=0.4), network(name)
    state, b = double(rule.init(net, seed=1)), nonuniform(batch(rule, 5))
    for key in state.params.keys() & {"label.weight"}:
        unlike(state, key)
    params = leaves(state.params)
    each = losses(net, params, b, 0.4)
    truth = gradients(each.dot(b.weight) / b.weight.sum(), params)
    z, t = torch.zeros(5, rule.size(net), dtype=torch.float64), torch.tensor(0.0, dtype=torch.float64)
    at_once = far(net, state.params, output(net, state.params, b.x, z, t)).argmax(1)
    stats = step(rule, net, copied(state), b)
    torch.testing.assert_close(stats.loss, each.dot(b.weight).detach(), rtol=0, atol=1e-9)
    assert stats.correct == (at_once == b.y).double().dot(b.weight)
    assert_close(descent(rule, net, state, b), truth, atol=1e-9)
    assert all(g.abs().max() > 1e-7 for g in truth.values())


@pytest.mark.parametrize("embedding", EMBEDDINGS)
def test_inference_follows_the_flow_to_the_nearest_embedding(embedding):
    rule, net = replace(RULE, embedding=embedding), network("lenet")
    state, b = double(rule.init(net, seed=1)), batch(rule)
    z = torch.zeros(6, rule.size(net), dtype=torch.float64)
    for k in range(3):
        z = z + output(net, state.params, b.x, z, torch.tensor(k / 3, dtype=torch.float64)) / 3
    wanted = far(net, state.params, z).log_softmax(1)
    torch.testing.assert_close(rule.logits(net, state, b.x).log_softmax(1), wanted, rtol=0, atol=1e-12)


def test_training_makes_the_loss_fall_and_inference_right():
    _, fall, (first, last), inferred = train(NoPropFM(lr=0.01), 120)
    assert fall < 0.7 and first < 0.4 and min(last, inferred) > 0.85


@pytest.mark.slow
def test_the_class_that_the_flow_ends_in_keeps_learned_embeddings_apart(monkeypatch):
    def nearest():
        state, _, _, inferred = train(NoPropFM(lr=0.01, embedding="learned"), 300)
        u = state.params["embedding"]
        return torch.cdist(u, u)[~torch.eye(10, dtype=torch.bool)].min(), inferred

    apart, right = nearest()
    monkeypatch.setattr(no_prop_fm, "cross_entropy", lambda scores, y, reduction: 0 * scores[:, 0])
    collapsed, chance = nearest()
    assert apart > 2 * collapsed and right > 0.85 > chance
