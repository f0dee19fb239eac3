"""FedProjection: clients train as they like and send K numbers of what they have learned.

Ferret (Shu et al., arXiv 2409.06277, ICML 2025): a client's change Δ_i of the model is projected on seeded directions
that all share, and the server makes the mean of the changes of the mean of the numbers. With the codec of
`algorithms.projection`, signs of (seed, round) and n_i samples of client i,

    s_i = encode(w_i − w)        s̄ = Σ_i n_i s_i / Σ_i n_i        w ← decode(w, s̄)

Up travel 4 K bytes and a constant. Down travels the model: a rule with optimizer state needs no more than that to
begin, and a client none of the history. A client keeps a copy of the model it was sent, as with FedProx: 4 d bytes.

The projection of a change is √(d/K) times shorter than the change, at a cosine of √(K/d) with it: with K ≪ d next to
nothing is learned. The unbiased estimate is √(d/K) times longer, and diverges at learning rates that suit FedAvg. By
default decoding keeps the length.

Departs from the paper: see the codec; directions of a round are new ones, a direction a block, dealt to tensors by
their size and not by what they changed, which would differ from client to client; and decoding keeps the length where
the paper's is unbiased, with a learning rate of the server to be found.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg

from ... import protocol
from ...algorithms.directions import layout_of
from ...algorithms.projection import basis, decode, pieces_of
from ...algorithms.replica import Answer, ScalarRound, shared
from ...algorithms.rule import RuleError
from ...scalar_wire import Garbled
from ..scalars import average

POWERS = {"projection": 0.0, "length": 0.5, "unbiased": 1.0}  # of the size of a piece


class FedProjection(FedAvg):
    """Average the projections of what clients have learned.

    Args:
        seed: the run seed, from which directions are made.
        directions: K, at least one a tensor.
        keep: what decoding keeps of a change: its "length", its "projection" or, on average, all of it ("unbiased").
        **fedavg: FedAvg's own options (fractions, minimum nodes, ...).

    Attributes:
        taken: the last round, or None if nobody answered.

    Raises:
        RuleError: if an option is impossible.
    """

    def __init__(
        self,
        seed: int,
        *,
        directions: int = 512,
        keep: Literal["length", "projection", "unbiased"] = "length",
        **fedavg,
    ) -> None:
        super().__init__(**fedavg)
        if directions < 1:
            raise RuleError("fedprojection needs strategy.directions ≥ 1")
        if keep not in POWERS:
            raise RuleError(f"unknown strategy.keep '{keep}': use {', '.join(POWERS)}")
        self.seed, self.projection, self.keep = seed, directions, keep
        self.taken: ScalarRound | None = None

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask clients to train, and to answer with so many numbers."""
        self._sent, self._round, self._lr = arrays, server_round, float(config["lr"])
        layout = layout_of(protocol.params_of(arrays))
        self._numbers = sum(pieces_of(layout, self.projection).values())
        config["projection"] = self.projection
        return super().configure_train(server_round, arrays, config, grid)

    def refuse(self, reply: Message) -> str | None:
        """Return why an answer to a train message does not count, or None."""
        if reply.has_error():
            return None
        try:
            server_round, _, numbers = protocol.scalars_of(reply)
        except Garbled as error:
            return f"answer refused: {error}"
        if server_round != self._round:
            return f"answer refused: it answers round {server_round}"
        if len(numbers) != self._numbers:
            return f"answer refused: {len(numbers)} numbers, where the model's change is {self._numbers}"
        return None if numbers.isfinite().all() else "answer refused: not all of its numbers are finite"

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Return the model after the round, and the clients' metrics averaged by samples."""
        self.taken = None
        valid, _ = self._check_and_log_replies(replies, is_train=True, validate=False)
        valid = [reply for reply in valid if self.refuse(reply) is None]
        sent, self._sent = self._sent, None  # or every checkpoint would hold the model twice
        if not valid:
            return None, None
        mean, params = average([self._answer(reply) for reply in valid]), protocol.decode_params(sent)
        decode(params, mean, basis(self.seed, server_round), self.projection, POWERS[self.keep])
        self.taken = shared(server_round, self._lr, mean)
        metrics = self.train_metrics_aggr_fn([reply.content for reply in valid], self.weighted_by_key)
        return protocol.encode_params(params), metrics

    def _answer(self, reply: Message) -> Answer:
        measured = protocol.measured(reply)
        samples = float(measured[self.weighted_by_key])
        return Answer(int(measured[protocol.PARTITION]), samples, protocol.scalars_of(reply)[2])
