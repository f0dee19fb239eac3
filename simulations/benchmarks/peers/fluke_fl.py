"""fluke on the workload, in one process and in memory: FedAVG whose clients forget their model after a round.

fluke imports torchvision, and pip may bring one built for another PyTorch, which cannot be imported unless two of its
operators are declared. Nothing here calls them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

declared = torch.library.Library("torchvision", "FRAGMENT")
for name in ("nms", "qnms"):
    declared.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

# ruff: noqa: E402  (torchvision is imported from here on)
from fluke import FlukeENV
from fluke.algorithms.fedavg import FedAVG
from fluke.client import Client
from fluke.config import OptimizerConfigurator
from fluke.data import FastDataLoader
from fluke.server import Server
from shared import Work, bare
from torch import nn


class Planned(Server):
    """A server that samples the clients of the workload, each with its samples in the order of its batches."""

    def get_eligible_clients(self, eligible_perc: float) -> Sequence[Client]:
        """Return the clients of the next round."""
        first = bare.SAMPLED * len(work.done)
        for client, rows in zip(self.clients, work.visits[first : first + bare.SAMPLED], strict=False):
            client.train_set = loader(rows)
        return self.clients[: bare.SAMPLED]

    def aggregate(self, eligible, client_models) -> None:
        """Average, and note that the round is over."""
        super().aggregate(eligible, client_models)
        work.round_done()


def loader(rows) -> FastDataLoader:
    """Return the samples of one visit to a client."""
    return FastDataLoader(work.x[rows], work.y[rows], num_labels=bare.CLASSES, batch_size=bare.BATCH)


if __name__ == "__main__":
    work = Work()
    FlukeENV().set_inmemory(True)
    FlukeENV().set_eval_cfg(server=False, locals=False, pre_fit=False, post_fit=False)
    sgd, net = OptimizerConfigurator({"name": "SGD", "lr": bare.LR}), work.net()
    clients = [
        Client(i, loader(work.visits[0]), None, sgd, nn.CrossEntropyLoss(), local_epochs=1, persistency=False)
        for i in range(bare.CLIENTS)
    ]
    server = Planned(net, None, clients, weighted=True)
    FedAVG(bare.CLIENTS, None, {}, clients, server).run(bare.WARM_UP + work.rounds, bare.SAMPLED / bare.CLIENTS)
    work.tell("fluke 0.8.1", server.model.parameters())
