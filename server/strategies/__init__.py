"""Aggregations by name: Flower's own, unchanged, and ours, each a Flower Strategy."""

from flwr.serverapp.strategy import (
    FedAdam,
    FedAvg,
    FedAvgM,
    FedMedian,
    FedProx,
    FedTrimmedAvg,
    FedYogi,
    Krum,
    Strategy,
)

from .fedprojection import FedProjection
from .fedscalar import FedScalar

STRATEGIES: dict[str, type[Strategy]] = {
    "fedavg": FedAvg,
    "fedavgm": FedAvgM,
    "fedadam": FedAdam,
    "fedyogi": FedYogi,
    "fedprox": FedProx,
    "fedmedian": FedMedian,
    "fedtrimmedavg": FedTrimmedAvg,
    "krum": Krum,
    "fedscalar": FedScalar,
    "fedprojection": FedProjection,
}

# Options where Flower's own default makes a strategy another one: with 0 both are FedAvg.
DEFAULTS: dict[str, dict[str, float]] = {
    "fedprox": {"proximal_mu": 0.1},
    "fedavgm": {"server_momentum": 0.9},  # Hsu, Qi & Brown, arXiv 1909.06335, 2019
}

__all__ = ["DEFAULTS", "STRATEGIES", "FedProjection", "FedScalar"]
