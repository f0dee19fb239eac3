"""pfl-research on the workload, in one process: FederatedAveraging on its SimulatedBackend, no evaluation."""

from __future__ import annotations

from itertools import count

import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.pytorch import PyTorchTensorDataset
from pfl.hyperparam.base import NNTrainHyperParams
from pfl.metrics import Metrics
from pfl.model.pytorch import PyTorchModel
from shared import Work, bare
from torch import Tensor, nn


class Learner(nn.Sequential):
    """The network, with the loss that pfl asks for; it is never evaluated, and has no metrics."""

    def loss(self, x: Tensor, y: Tensor, eval: bool = False) -> Tensor:
        """Return the mean cross-entropy."""
        return nn.functional.cross_entropy(self(x), y)

    def metrics(self, x: Tensor, y: Tensor) -> dict:
        """Return nothing."""
        return {}


class Clock(TrainingProcessCallback):
    """Notes when each round is over."""

    def after_central_iteration(self, aggregate_metrics, model, *, central_iteration):
        """Note the time and go on."""
        work.round_done()
        return False, Metrics()


if __name__ == "__main__":
    work = Work()
    net, visits = Learner(*work.net()), count()

    def dataset(visit: int) -> PyTorchTensorDataset:
        """Return the samples of one visit to a client."""
        rows = work.visits[visit % len(work.visits)]  # pfl may ask for more than it trains
        return PyTorchTensorDataset((work.x[rows], work.y[rows]))

    users = FederatedDataset(dataset, lambda: next(visits))
    FederatedAveraging().run(
        NNAlgorithmParams(
            central_num_iterations=bare.WARM_UP + work.rounds,
            evaluation_frequency=10**9,
            train_cohort_size=bare.SAMPLED,
            val_cohort_size=0,
        ),
        SimulatedBackend(users, users),
        PyTorchModel(net, torch.optim.SGD, torch.optim.SGD(net.parameters(), lr=1.0)),
        NNTrainHyperParams(local_batch_size=bare.BATCH, local_num_epochs=1, local_learning_rate=bare.LR),
        callbacks=[Clock()],
        send_metrics_to_platform=False,  # it would print them
    )
    work.tell("pfl-research 0.6", net.parameters())
