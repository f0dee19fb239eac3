"""ZO-SGD-Sign: of every scalar the sign alone is applied.

T. Feng et al., "ZeroFlow: Overcoming Catastrophic Forgetting is Easier than You Think", arXiv 2501.01045, ICML 2025,
after S. Liu, P.-Y. Chen, X. Chen, M. Hong, "signSGD via Zeroth-Order Oracle", ICLR 2019:

    ĝ = s z        w ← w − η sign(ĝ) = w − η sign(s) z        for one direction of ±1
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from .spsa import SPSA


@dataclass(frozen=True)
class ZOSign(SPSA):
    """SPSA whose step has one length, η √(d/K) or so, however steep the loss.

    The clients send their differences, and what is applied is the sign of their average: one bit a direction.
    Stores and costs what SPSA does.

    The estimate (1/K) Σ_k sign(s_k) z_k is biased in length alone, as far as a slope s_k = g·z_k is near normal: its
    mean is √(2/π) g/‖g‖. Its cosine with the gradient is √(K / (K − 1 + π d/2)) or so, where SPSA's is
    √(K / (K − 1 + d)): signs are worth π/2 times fewer directions.

    Departs from the paper for K > 1: there the sign is taken of each coordinate of ĝ, here of each scalar, so that no
    more than K bits stand for a step. For K = 1 the two are the same.

    Attributes:
        lr: η, the change of each parameter in a step with K = 1; it alone decides how near to a minimum steps come, so
            let it fall (`lr_schedule`).
        sigma, dropout, directions, own, pool, chunk, abreast: see `SPSA`.
    """

    name: ClassVar[str] = "zo-sign"
    paper: ClassVar[str] = "Feng et al., arXiv 2501.01045, 2025; Liu et al., ICLR 2019"

    lr: float = 0.005
    directions: int = 1

    def coefficients(self, scalars: Tensor, weights: Tensor) -> Tensor:
        """Return the signs of answers (N, K), each divided by K and multiplied by what its row weighs."""
        return super().coefficients(scalars.sign(), weights)
