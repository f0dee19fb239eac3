"""The gradient of the cross-entropy against autograd, and batches of nothing."""

import torch
from cases import CLASSES, batch
from fedforward.algorithms import Backprop
from fedforward.algorithms.softmax import cross_entropy, softmax_error


def test_the_softmax_error_is_the_gradient_of_the_cross_entropy():
    b = batch(Backprop())._replace(weight=torch.tensor([1.0, 0, 2, 1, 0.5, 1]).double())
    scores = torch.randn(6, CLASSES, dtype=torch.float64, requires_grad=True)
    loss, stats = cross_entropy(scores, b)
    (truth,) = torch.autograd.grad(loss, scores)
    torch.testing.assert_close(softmax_error(scores.detach(), b), truth, rtol=0, atol=1e-12)
    assert stats.weight == 5.5 and abs(stats.loss - 5.5 * loss) < 1e-12


def test_a_batch_of_padding_alone_has_no_share_and_no_nan():
    b = batch(Backprop())._replace(weight=torch.zeros(6).double())
    assert not b.share().any()
    assert not softmax_error(torch.randn(6, CLASSES).double(), b).any()
