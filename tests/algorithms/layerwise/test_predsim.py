"""Similarity matching: its matrix, what a masked sample has to do with it, and what it stores."""

import pytest
import torch
from cases import CLASSES, SHAPE, assert_close, batch, copied, double, network, step
from fedforward.algorithms import Network
from fedforward.algorithms.layerwise.predsim import Deviation, PredSim, decoder, similarity
from fedforward.algorithms.models import mlp
from fedforward.algorithms.softmax import onehot
from fedforward.client.plan import Planner


def test_similarity_is_the_correlation_of_features_and_of_labels_is_one_or_less_than_none():
    h = torch.randn(7, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(similarity(h), torch.corrcoef(h), rtol=0, atol=1e-12)
    torch.testing.assert_close(similarity(3 * h + 5), similarity(h), rtol=0, atol=1e-12)
    y = torch.tensor([0, 2, 2, 3])
    wanted = torch.where(y[:, None] == y, 1.0, torch.tensor(-1 / 3, dtype=torch.float64))
    torch.testing.assert_close(similarity(onehot(y, 4, torch.float64)), wanted, rtol=0, atol=1e-12)


def test_features_that_are_all_the_same_are_like_nothing_and_have_a_gradient():
    for make in (lambda: torch.zeros(3, 5), lambda: torch.ones(3, 4, 2, 2)):
        h = make().requires_grad_()
        alike = similarity(Deviation()(h) if h.dim() == 4 else h)
        assert not alike.any()
        (gradient,) = torch.autograd.grad((alike - 1).square().sum(), h)
        assert gradient.isfinite().all()


@pytest.mark.parametrize("net", ["mlp", "lenet"])
def test_a_blank_sample_that_is_masked_changes_nothing(net):
    rule, net = PredSim(), network(net)
    state = double(rule.init(net, seed=1))
    other, plain = copied(state), batch(rule, 5)
    longer = plain._replace(
        x=torch.cat([plain.x, torch.zeros(3, *SHAPE, dtype=torch.float64)]),
        y=torch.cat([plain.y, plain.y[:3]]),
        weight=torch.cat([plain.weight, torch.zeros(3, dtype=torch.float64)]),
    )
    for _ in range(2):
        step(rule, net, state, plain)
        step(rule, net, other, longer)
    assert_close(other.params, state.params, atol=1e-12)


def test_a_decoder_begins_at_0_and_reads_no_more_than_it_may():
    linear = decoder((6, 9, 9), CLASSES, 100)[-1]
    assert not linear.weight.any() and linear.in_features == 6 * 4 * 4  # 5×5 positions would be 150 numbers
    assert decoder((500,), CLASSES, 100)[-1].in_features == 500


def test_pairs_of_samples_are_stored_and_pairs_of_blocks_are_not():
    def activations(size, hidden):
        net = Network(lambda: mlp((8,), 4, hidden=hidden), (8,), 4)
        return Planner(net).step(PredSim(), size).parts["activations"]

    assert activations(100, (8,) * 6) == activations(100, (8,) * 3)
    assert activations(200, (8,) * 3) - 2 * activations(100, (8,) * 3) > 2 * 100 * 100 * 4  # 200² is twice 2 · 100²
