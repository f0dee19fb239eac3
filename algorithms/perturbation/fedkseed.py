"""FedKSeed: every step of every client goes along one of a fixed pool of directions.

Z. Qin, D. Chen, B. Qian, B. Ding, Y. Li, S. Deng, "Federated Full-Parameter Tuning of Billion-Sized Language Models
with Communication Cost under 18 Kilobytes", arXiv 2312.06353, ICML 2024. With a pool z_1 … z_P of the run, a client's
step t takes the candidate p(t) that its place has drawn:

    s_t = (L(w + σ z_p) − L(w − σ z_p)) / 2σ        w ← w − η s_t z_p

so that any model of the run is w_0 − Σ_p A_p z_p, with one accumulator A_p = Σ η s_t over the steps that took p.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..rule import RuleError
from .spsa import SPSA


@dataclass(frozen=True)
class FedKSeed(SPSA):
    """SPSA inside the span of a pool: a replica that comes late needs P numbers, however many steps it has missed.

    In this house the method is a wire more than a rule: its steps are `spsa`'s with `own` and a `pool`, any rule of
    scalars may have these, and the ledger that makes P numbers of a run is the pool's (`algorithms.ledger`).

    Stores and costs what SPSA does; a step sends 4 bytes.

    Steps stay in a subspace of P of the d dimensions. Of a gradient in no preferred direction that holds the share
    √(P/d) of its length: 18 % for 1024 candidates and 30,000 parameters. `rebase` draws a new pool from time to time.

    Departs from the paper: a client sends the scalars of its steps, and not (seed, scalar) pairs or P accumulators:
    which candidate a step took follows from its place (seed, round, client, step), so it is not sent, and accumulators
    follow from the scalars. η is in them, where the code's hold the bare s and so bear no change of η. Directions are
    signs. FedKSeed-Pro's sampling of candidates by how much they have moved so far is left out: then a step's candidate
    would no longer follow from its place alone.

    Attributes:
        lr: η; as in `SPSA`.
        pool: P, candidates that all clients of a run draw from.
        sigma, dropout, directions, own, rebase, chunk: see `SPSA` and `ScalarRule`; several directions are several
            different candidates a step, and without `own` all clients take the same.
    """

    name: ClassVar[str] = "fedkseed"
    paper: ClassVar[str] = "Qin et al., arXiv 2312.06353, 2024"

    own: bool = True
    pool: int = 1024

    def __post_init__(self) -> None:
        if not self.pool:
            raise RuleError("fedkseed draws from a pool: use rule.pool ≥ 1, or spsa for new directions in every step")
        super().__post_init__()
