"""The hand-written loops that engines are compared with: one workload, plain FedAvg, and nothing else around it.

100 clients hold 60 synthetic 28×28 images of 10 classes each; 10 clients a round take one local epoch of batches of 20
with SGD 0.1, and the server takes the mean of their weights. A loop is a function (x, y, rounds) -> (seconds, weights):
it runs `WARM_UP` rounds, times the `rounds` that follow, and returns the weights that all of them led to. Clients and
batches come from `schedule`, so all loops over one model end in the same weights: to 1e-12 in float64, and to 2e-6 in
float32, but for the CNN, where rounding decides near ties of max-pooling and each decision moves weights by some 1e-5.

    plain         nn.Module, autograd, torch.optim.SGD: what anybody would write first
    by_hand       MLP: the step's formulas in place, without a graph; gradients are added to the weights as products
    cpu_aware     CNN: channels last, ReLU after pooling, autograd.grad, one fused update, no optimizer
    two_workers   CPU: two pinned processes with the steps of the two before, shared weights, one partial sum a worker
    bmm           MLP: the ten clients of a round as one program of batched products
    vmap          the ten clients of a round as one program made by torch.func.vmap

Nothing here is FedForward's own, and none of it is tuned for the sake of losing.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch import multiprocessing as processes
from torch.nn import functional as F

CLIENTS, SAMPLES, SAMPLED, BATCH, LR, WARM_UP = 100, 60, 10, 20, 0.1, 5
SHAPE, CLASSES = (1, 28, 28), 10

Weights = list[Tensor]  # in the order of nn.Module.parameters()
Model = Callable[[Sequence[int], int], nn.Sequential]
Step = Callable[[Weights, Tensor, Tensor], None]  # learns from one batch, in place


def mlp(shape: Sequence[int], classes: int) -> nn.Sequential:
    """Return a network of one hidden layer, 784-200-10 on the workload."""
    width = int(np.prod(shape))
    return nn.Sequential(nn.Flatten(), nn.Linear(width, 200), nn.ReLU(), nn.Linear(200, classes))


def cnn(shape: Sequence[int], classes: int) -> nn.Sequential:
    """Return two blocks of convolution, ReLU and pooling, and a linear output."""
    size = 32 * (shape[1] // 4) * (shape[2] // 4)
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(shape[0], 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        nn.Sequential(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        nn.Sequential(nn.Flatten(), nn.Linear(size, classes)),
    )


def synthetic() -> tuple[Tensor, Tensor]:
    """Return the images (6000, 1, 28, 28) and labels of all clients, one client after the other."""
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.standard_normal((CLIENTS * SAMPLES, *SHAPE), dtype=np.float32))
    return x, torch.from_numpy(rng.integers(0, CLASSES, CLIENTS * SAMPLES))


def initial(model: Model, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Weights:
    """Return the weights that every loop starts from."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return [p.detach().to(device, dtype) for p in model(SHAPE, CLASSES).parameters()]


def schedule(rounds: int) -> Iterator[list[Tensor]]:
    """Yield each round's clients, warm-up included: of each the rows of its batches (3, 20)."""
    rng = np.random.default_rng(0)
    for _ in range(WARM_UP + rounds):
        clients = rng.choice(CLIENTS, SAMPLED, replace=False)
        orders = (client * SAMPLES + rng.permutation(SAMPLES) for client in clients)
        yield [torch.from_numpy(order).view(-1, BATCH) for order in orders]


def plain(x: Tensor, y: Tensor, rounds: int, model: Model = mlp) -> tuple[float, Weights]:
    """Train as the manual says."""
    net = model(SHAPE, CLASSES).to(x.device, x.dtype)
    optimizer = torch.optim.SGD(net.parameters(), lr=LR)

    def step(local: Weights, x: Tensor, y: Tensor) -> None:
        with torch.enable_grad():
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimizer.step()

    return fed_avg(step, x, y, rounds, initial(model, x.dtype, x.device), [p.detach() for p in net.parameters()])


def by_hand(x: Tensor, y: Tensor, rounds: int) -> tuple[float, Weights]:
    """Train the MLP by its formulas."""
    return fed_avg(step_by_hand, x, y, rounds, initial(mlp, x.dtype, x.device))


def cpu_aware(x: Tensor, y: Tensor, rounds: int) -> tuple[float, Weights]:
    """Train the CNN with the kernels that a CPU is fast at."""
    local = [w.clone(memory_format=_last(w)).requires_grad_() for w in initial(cnn, x.dtype, x.device)]
    return fed_avg(step_cpu_aware, x, y, rounds, initial(cnn, x.dtype, x.device), local)


def step_by_hand(local: Weights, x: Tensor, y: Tensor) -> None:
    """Take one step of the MLP: with e = softmax − onehot, dW₂ = eᵀa and dW₁ = (e W₂ · [a > 0])ᵀ x."""
    w1, b1, w2, b2 = local
    x, rate = x.flatten(1), -LR / len(y)
    a = torch.addmm(b1, x, w1.T).relu_()
    e = torch.addmm(b2, a, w2.T).softmax(1)
    e[torch.arange(len(y), device=y.device), y] -= 1
    d = (e @ w2).mul_(a > 0)
    w2.addmm_(e.T, a, alpha=rate)
    b2.add_(e.sum(0), alpha=rate)
    w1.addmm_(d.T, x, alpha=rate)
    b1.add_(d.sum(0), alpha=rate)


def step_cpu_aware(local: Weights, x: Tensor, y: Tensor) -> None:
    """Take one step of the CNN."""
    w1, b1, w2, b2, w3, b3 = local
    with torch.enable_grad():
        a = F.max_pool2d(F.conv2d(x.contiguous(memory_format=torch.channels_last), w1, b1, padding=1), 2).relu_()
        a = F.max_pool2d(F.conv2d(a, w2, b2, padding=1), 2).relu_()
        loss = F.cross_entropy(F.linear(a.flatten(1), w3, b3), y)
    torch._foreach_add_(local, torch.autograd.grad(loss, local), alpha=-LR)


def fed_avg(
    step: Step, x: Tensor, y: Tensor, rounds: int, weights: Weights, local: Weights | None = None
) -> tuple[float, Weights]:
    """Run the rounds one client after the other; `local` is what `step` trains, a copy of `weights` by default."""
    local = local or [w.clone() for w in weights]
    total = [torch.empty_like(w) for w in weights]
    with torch.no_grad():
        for t, clients in enumerate(schedule(rounds)):
            if t == WARM_UP:
                started = now(x)
            _visit(step, x, y, clients, weights, local, total)
            weights, total = total, weights
    return now(x) - started, weights


def _visit(
    step: Step, x: Tensor, y: Tensor, clients: list[Tensor], weights: Weights, local: Weights, total: Weights
) -> None:
    """Train every client from `weights`, and leave the sum of their weights / `SAMPLED` in `total`."""
    torch._foreach_zero_(total)
    for client in clients:
        torch._foreach_copy_(local, weights)
        for rows in client:
            step(local, x[rows], y[rows])
        torch._foreach_add_(total, local, alpha=1 / SAMPLED)


def two_workers(x: Tensor, y: Tensor, rounds: int, model: Model = mlp) -> tuple[float, Weights]:
    """Train with two persistent processes; this one only adds their partial sums."""
    context = processes.get_context("spawn")  # a fork server would be there before our engines say what it is to import
    weights = [w.share_memory_() for w in initial(model, x.dtype, x.device)]
    partial = [[torch.empty_like(w).share_memory_() for w in weights] for _ in range(2)]
    pipes = [context.Pipe() for _ in range(2)]
    workers = [
        context.Process(target=_work, args=(k, x, y, rounds, model, weights, partial[k], pipes[k][1]), daemon=True)
        for k in range(2)
    ]
    try:
        for worker in workers:
            worker.start()
        for _, end in pipes:
            end.close()  # the worker's alone now, so that its death is seen here
        for t in range(WARM_UP + rounds):
            if t == WARM_UP:
                started = time.perf_counter()
            for pipe, _ in pipes:
                pipe.send(t)
            for pipe, _ in pipes:
                pipe.recv()
            for w, one, other in zip(weights, *partial, strict=True):
                torch.add(one, other, out=w)
        return time.perf_counter() - started, weights
    finally:
        for pipe, _ in pipes:
            pipe.close()
        for worker in workers:
            worker.join()


def _work(k: int, x: Tensor, y: Tensor, rounds: int, model: Model, weights: Weights, partial: Weights, pipe) -> None:
    """Be worker k: train every other client of each round as soon as it is told to begin."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[k % len(cores)]})
    torch.set_num_threads(1)
    step = step_by_hand if model is mlp else step_cpu_aware
    local = [w.clone(memory_format=_last(w)).requires_grad_(model is cnn) for w in weights]
    with torch.no_grad():
        for clients in schedule(rounds):
            pipe.recv()
            _visit(step, x, y, clients[k::2], weights, local, partial)
            pipe.send(k)


def bmm(x: Tensor, y: Tensor, rounds: int) -> tuple[float, Weights]:
    """Train the MLPs of a round's clients together, in batched products (10, …, …)."""

    def step(local: Weights, x: Tensor, y: Tensor) -> None:
        w1, b1, w2, b2 = local
        x, rate = x.flatten(2), -LR / BATCH
        a = torch.baddbmm(b1[:, None], x, w1.mT).relu_()
        e = torch.baddbmm(b2[:, None], a, w2.mT).softmax(2)
        e.sub_(F.one_hot(y, CLASSES))
        d = (e @ w2).mul_(a > 0)
        w2.baddbmm_(e.mT, a, alpha=rate)
        b2.add_(e.sum(1), alpha=rate)
        w1.baddbmm_(d.mT, x, alpha=rate)
        b1.add_(d.sum(1), alpha=rate)

    return _together(step, x, y, rounds, initial(mlp, x.dtype, x.device))


def vmap(x: Tensor, y: Tensor, rounds: int, model: Model = mlp) -> tuple[float, Weights]:
    """Train the networks of a round's clients together, as PyTorch batches one client's loss."""
    with torch.device("meta"):
        net = model(SHAPE, CLASSES)
    names = [name for name, _ in net.named_parameters()]

    def loss(local: Weights, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(torch.func.functional_call(net, dict(zip(names, local, strict=True)), (x,)), y)

    gradients = torch.func.vmap(torch.func.grad(loss))

    def step(local: Weights, x: Tensor, y: Tensor) -> None:
        torch._foreach_add_(local, gradients(local, x, y), alpha=-LR)

    return _together(step, x, y, rounds, initial(model, x.dtype, x.device))


def _together(step: Step, x: Tensor, y: Tensor, rounds: int, weights: Weights) -> tuple[float, Weights]:
    """Run the rounds with all clients of a round in one step: weights (10, …), batches (10, 20, …)."""
    local = [w.new_empty(SAMPLED, *w.shape) for w in weights]
    with torch.no_grad():
        for t, clients in enumerate(schedule(rounds)):
            if t == WARM_UP:
                started = now(x)
            for many, w in zip(local, weights, strict=True):
                many.copy_(w)
            for rows in torch.stack(clients, 1):
                step(local, x[rows], y[rows])
            weights = [many.mean(0) for many in local]
    return now(x) - started, weights


def now(x: Tensor) -> float:
    """Return the time at which all is done that was asked of the tensor's device."""
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    return time.perf_counter()


def _last(weight: Tensor) -> torch.memory_format:
    return torch.channels_last if weight.dim() == 4 else torch.contiguous_format
