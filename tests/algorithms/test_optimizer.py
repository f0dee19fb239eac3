"""The in-place optimizers walk torch.optim's trajectories."""

import pytest
import torch
from fedforward.algorithms import Backprop, RuleError, optimizer
from fedforward.algorithms.rule import State

REFERENCES = {
    "sgd": ("sgd", 0.0, 0.0, lambda p: torch.optim.SGD(p, lr=1)),
    "sgd-decay": ("sgd", 0.0, 0.1, lambda p: torch.optim.SGD(p, lr=1, weight_decay=0.1)),
    "momentum": ("sgd", 0.9, 0.0, lambda p: torch.optim.SGD(p, lr=1, momentum=0.9)),
    "momentum-decay": ("sgd", 0.9, 0.1, lambda p: torch.optim.SGD(p, lr=1, momentum=0.9, weight_decay=0.1)),
    "adam": ("adam", 0.0, 0.0, lambda p: torch.optim.Adam(p, lr=1)),
    "adam-decay": ("adam", 0.9, 0.1, lambda p: torch.optim.Adam(p, lr=1, weight_decay=0.1)),
}


@pytest.mark.parametrize("case", REFERENCES)
def test_twenty_steps_follow_torch(case):
    name, momentum, weight_decay, reference = REFERENCES[case]
    g = torch.Generator().manual_seed(0)
    start = {"a": torch.randn(5, 3, generator=g).double(), "b": torch.randn(3, generator=g).double()}
    theirs = {key: p.clone().requires_grad_() for key, p in start.items()}
    params = {key: p.clone() for key, p in start.items()}
    state = State(params, {}, optimizer.slots(name, momentum, params))
    optim = reference(list(theirs.values()))
    for step in range(20):
        lr = 0.1 / (step + 1)  # the rate changes from step to step
        optim.param_groups[0]["lr"] = lr
        for key in params:
            grad = torch.randn(params[key].shape, generator=g).double() + params[key]
            theirs[key].grad = grad.clone()
            optimizer.update(name, momentum, weight_decay, state, key, grad, lr)
        optim.step()
        for key in params:
            torch.testing.assert_close(params[key], theirs[key].detach(), rtol=0, atol=1e-12)
    assert all((params[key] - start[key]).abs().min() > 1e-3 for key in params)


def test_slots_hold_what_each_optimizer_needs_and_no_more():
    params = {"a": torch.zeros(4, 5)}
    assert optimizer.slots("sgd", 0.0, params) == {}
    assert {key: s.shape for key, s in optimizer.slots("sgd", 0.9, params).items()} == {"a.velocity": (4, 5)}
    adam = {key: tuple(s.shape) for key, s in optimizer.slots("adam", 0.9, params).items()}
    assert adam == {"a.mean": (4, 5), "a.square": (4, 5), "a.steps": ()}


def test_an_unknown_optimizer_is_refused_with_the_known_ones():
    with pytest.raises(RuleError, match="unknown optimizer 'lion': use one of sgd, adam"):
        Backprop(optimizer="lion")
