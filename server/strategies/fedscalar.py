"""FedScalar: clients send scalars along seeded directions, the server descends along them and passes them on.

The averaging of FedSGD (McMahan et al., arXiv 1602.05629, 2017, section 3) carried over to scalars, as BAFFLE
(arXiv 2301.12195) and DeComFL (arXiv 2405.15861, ICLR 2025) use it. With s_i,j the scalars of client i in local step j
and n_i its samples, over the clients that took step j:

    s̄_j = Σ_i n_i s_i,j / Σ_i n_i            w ← descend(w, directions of (seed, round, j), s̄_j)      j = 0, 1, …

Where clients share directions their mean (or a robust mean) is all that anybody needs; where each has its own, all
answers count, and of each what the rule passes on. No model travels in either direction unless it is the shortest way:
a client is told of the rounds it missed, or given the ledger (see `server.scalars` and `algorithms.replica`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from logging import getLogger
from typing import Literal

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg
from torch import Tensor

from ... import protocol
from ...algorithms import LADDER
from ...algorithms.replica import Answer, Replica, ScalarRound, fingerprint, passed_on, shared
from ...algorithms.rule import RuleError, Tensors
from ...algorithms.scalar_rule import ScalarRule
from ...scalar_wire import UNSAID, Garbled
from ..scalars import UNKNOWN, History, average, krum, median, most_worth_telling, trimmed

log = getLogger("fedforward")
STABLE = 1.5  # η √(d/K) above which runs were seen to diverge


class FedScalar(FedAvg):
    """Aggregate scalars, descend, and tell clients what they missed.

    Args:
        rule: the scalar rule that all clients run.
        seed: the run seed, from which directions are made.
        aggregate: how shared scalars become one: "mean" by samples, "median", "trimmed-mean" or "krum".
        trim: of a trimmed mean, the part of the clients that is cut off at either end.
        byzantine: of Krum, how many clients may be bad.
        clip: scalars are cut to ± this; 0: they are not.
        normalize: scalars are divided by their root mean square over the round, so that all steps are equally long,
            η √(d/K), however steep the loss is.
        limit: an answer with a scalar beyond ± this is refused; 0: none is.
        ema: γ of the running average of models that is evaluated, E ← γ E + (1 − γ) w after each round, kept as
            coefficients of a pool, and begun anew with it; 0: the model itself is evaluated.
        known: every client can make the initial model itself, of the run seed.
        **fedavg: FedAvg's own options (fractions, minimum nodes, ...).

    Attributes:
        taken: the last round, or None if nobody answered.
        shown: the averaged model, if there is one.

    Raises:
        RuleError: if the options do not go together.
    """

    exchange = "scalars"

    def __init__(
        self,
        rule: ScalarRule,
        seed: int,
        *,
        aggregate: Literal["mean", "median", "trimmed-mean", "krum"] = "mean",
        trim: float = 0.2,
        byzantine: int = 1,
        clip: float = 0.0,
        normalize: bool = False,
        limit: float = 1e6,
        ema: float = 0.0,
        known: bool = True,
        **fedavg,
    ) -> None:
        super().__init__(**fedavg)
        self.rule, self.seed, self.known = rule, seed, known
        self.aggregate, self.trim, self.byzantine = aggregate, trim, byzantine
        self.clip, self.normalize, self.limit, self.ema = clip, normalize, limit, ema
        self._check()
        self.taken: ScalarRound | None = None
        self.shown: ArrayRecord | None = None
        self.replica: Replica | None = None
        self.history: History | None = None
        self.held: dict[int, int] = {}  # by node, the round whose model it is known to hold
        self._mean: tuple[int, float, Tensor] | None = None  # of the averaged model: pool, coefficients of w₀ and pool

    def _check(self) -> None:
        if self.aggregate not in ("mean", "median", "trimmed-mean", "krum"):
            raise RuleError(f"unknown aggregate '{self.aggregate}': use mean, median, trimmed-mean or krum")
        if self.aggregate != "mean" and self.rule.own:
            raise RuleError(f"{self.aggregate} compares scalars along the same directions: leave rule.own out")
        if not 0 <= self.trim < 0.5 or self.byzantine < 0 or self.clip < 0 or self.limit < 0:
            raise RuleError("trim must be at least 0 and below 0.5; byzantine, clip and limit at least 0")
        if not 0 <= self.ema < 1 or (self.ema and not self.rule.pool):
            raise RuleError("ema must be at least 0 and below 1, and needs a pool to be kept in: set rule.pool")

    # ---- down --------------------------------------------------------------------------------------------------------

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask clients to train, and tell each what it missed."""
        self._begin(server_round, arrays, float(config["lr"]))
        return self._told(super().configure_train(server_round, arrays, config, grid))

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask clients to evaluate the model after the round, and tell each what it missed."""
        return self._told(super().configure_evaluate(server_round, arrays, config, grid))

    def _begin(self, server_round: int, arrays: ArrayRecord, lr: float) -> None:
        """Note a round, at the beginning of all where the model is the initial one."""
        self._sent, self._lr, self._round = arrays, lr, server_round
        if self.replica is None:
            params = protocol.decode_params(arrays)
            self.replica = Replica(self.rule, self.seed, params)
            self.history = History(self.rule, params, self.known)
            self._warn(sum(p.numel() for p in params.values()), lr)
        self._print = UNSAID

    def _warn(self, dimension: int, lr: float) -> None:
        """Say so if the run will hardly be stable: ‖ĝ‖ is about √(d/K) ‖g‖, so η √(d/K) is what counts."""
        directions = self.rule.directions * (self.min_train_nodes if self.rule.own else 1)
        number = lr * math.sqrt(dimension / directions)
        estimates = type(self.rule).coefficients is ScalarRule.coefficients and not self.normalize
        if estimates and self.rule.linear and number > STABLE:
            log.warning(
                "lr √(d/K) = %.2g with %d parameters and %d directions a step: above %g runs diverge, often late;"
                " lower --lr to %.2g, or raise rule.directions",
                number, dimension, directions, STABLE, STABLE * lr / number,
            )  # fmt: skip

    def _told(self, messages: Iterable[Message]) -> Iterable[Message]:
        """Yield messages that cross a wire as news, the same for all who hold the same."""
        news: dict[int, object] = {}
        for message in messages:
            held = self.held.get(message.metadata.dst_node_id, UNKNOWN)
            if held not in news:
                replica = self.replica
                replica.state.params.update(protocol.params_of(message.content[protocol.ARRAYS]))
                news[held] = self.history.news(held, replica, message.content)
            yield protocol.send(message, news[held])
        self.replica.state.params.clear()  # or every checkpoint would hold the model twice

    # ---- up ----------------------------------------------------------------------------------------------------------

    def refuse(self, reply: Message) -> str | None:
        """Return why an answer to a train message does not count, or None; and note what its sender holds now."""
        node = protocol.sender(reply)
        if reply.has_error():
            if reply.error.code == protocol.OUT_OF_STEP:
                self.held.pop(node, None)
            return None
        try:
            measured = protocol.measured(reply)
            numbers = [float(measured[name]) for name in ("steps", self.weighted_by_key, protocol.PARTITION)]
            reason = self._objection(*protocol.scalars_of(reply), *numbers) or _unrecordable(measured)
        except Garbled as error:
            reason = str(error)
        except (KeyError, TypeError, ValueError):
            reason = "it does not say how many steps and samples there were"
        if reason:
            self.held.pop(node, None)
        else:
            self.held[node] = self._round - 1
        return reason and f"answer refused: {reason}"

    def _objection(
        self, server_round: int, found_at: bytes, scalars: Tensor, steps: float, samples: float, client: float
    ) -> str | None:
        whole = all(map(float.is_integer, (steps, samples, client)))  # and what a wire's float32 and int32 can say
        if not (whole and steps >= 1 and 1 <= samples <= 2**24 and 0 <= client < 2**31):
            return f"client {client:g} cannot have taken {steps:g} steps on {samples:g} samples"
        if server_round != self._round:
            return f"it answers round {server_round}"
        if found_at != UNSAID and found_at != self._fingerprint():
            return "it was found at another model than the server's"
        if len(scalars) != self.rule.numbers * steps:
            return f"{len(scalars)} scalars, where {int(steps)} steps give {self.rule.numbers * int(steps)}"
        if not scalars.isfinite().all():
            return f"{int((~scalars.isfinite()).sum())} of {len(scalars)} scalars are not finite"
        if self.limit and scalars.abs().max() > self.limit:
            return f"a scalar of {float(scalars.abs().max()):.3g} is beyond strategy.limit ({self.limit:g})"
        return None

    def _fingerprint(self) -> bytes:
        if self._print == UNSAID:
            self._print = fingerprint(protocol.params_of(self._sent))
        return self._print

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Return the model after the round, and the clients' metrics averaged by samples.

        Answers that `refuse` would refuse are left out, and so is a second answer of the same client.
        """
        self.taken = None
        valid, _ = self._check_and_log_replies(replies, is_train=True, validate=False)
        first: dict[int, Message] = {}
        for reply in valid:
            if self.refuse(reply) is None:
                first.setdefault(protocol.sender(reply), reply)
        valid = list(first.values())
        sent, self._sent = self._sent, None  # or every checkpoint would hold the model twice
        if not valid:
            self._go_on(ScalarRound(server_round, self._lr, ()))
            return None, None
        entry = ScalarRound(server_round, self._lr, self._joined([self._answer(reply) for reply in valid]))
        self.replica.state.params.update(protocol.decode_params(sent))
        self._go_on(entry)
        self.taken = entry
        new = dict(self.replica.current())
        self._show(new)
        self.replica.state.params.clear()
        metrics = self.train_metrics_aggr_fn([reply.content for reply in valid], self.weighted_by_key)
        return protocol.encode_params(new), metrics

    def _go_on(self, entry: ScalarRound) -> None:
        self.replica.take(entry)
        self.history.add(entry, most_worth_telling(self.replica))

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Average metrics as FedAvg does; who has evaluated the model holds it."""
        replies = list(replies)
        self.held |= {protocol.sender(reply): self.history.done for reply in replies if reply.has_content()}
        return super().aggregate_evaluate(server_round, replies)

    def _answer(self, reply: Message) -> Answer:
        measured = protocol.measured(reply)
        scalars = protocol.scalars_of(reply)[2]
        scalars = scalars.clamp(-self.clip, self.clip) if self.clip else scalars
        return Answer(int(measured[protocol.PARTITION]), float(measured[self.weighted_by_key]), scalars)

    def _joined(self, answers: list[Answer]) -> tuple[Answer, ...]:
        """Return what of a round's answers is applied and passed on."""
        if self.rule.own:
            return passed_on(self.rule, self._scaled(answers))
        joined = {
            "mean": average,
            "median": median,
            "trimmed-mean": lambda answers: trimmed(answers, self.trim),
            "krum": lambda answers: krum(answers, self.byzantine),
        }
        return passed_on(self.rule, self._scaled(shared(0, 0.0, joined[self.aggregate](answers)).answers))

    def _scaled(self, answers: Sequence[Answer]) -> Sequence[Answer]:
        """Return answers of root mean square 1, if that is wanted."""
        if not self.normalize:
            return answers
        square = torch.cat([answer.scalars for answer in answers]).double().square().mean()
        scale = float(square.sqrt().clamp_min(1e-12))
        return [answer._replace(scalars=answer.scalars / scale) for answer in answers]

    def _show(self, new: Tensors) -> None:
        """Move the averaged model on, if there is one: E ← γ E + (1 − γ) A, on coefficients alone."""
        if not self.ema:
            return
        ledger, gamma = self.replica.ledger, self.ema
        weights = torch.from_numpy(ledger.weights)
        began = self._mean and self._mean[0] == ledger.base
        _, c, mean = self._mean if began else (ledger.base, ledger.c, weights.clone())
        c, mean = gamma * c + (1 - gamma) * ledger.c, mean.lerp(weights, 1 - gamma)
        self._mean = ledger.base, c, mean
        shown = {key: torch.empty_like(p) for key, p in new.items()}
        ledger.write(shown, mean.numpy(), c)
        self.shown = protocol.encode_params(shown)


def _unrecordable(measured: Mapping[str, float | Sequence[float]]) -> str | None:
    """Return why a client's metrics cannot be recorded, or None."""
    if missing := [name for name in protocol.TRAIN_METRICS if name not in measured]:
        return f"it does not say its {', '.join(missing)}"
    fit = measured["fit"]
    if not isinstance(fit, Sequence) or len(fit) != len(protocol.FIT) or not 0 <= fit[-1] <= len(LADDER):
        return f"its fit has other numbers than {', '.join(protocol.FIT)}: give both one version of this package"
    counts = [*fit, *(measured[name] for name in ("batch", "flops", "peak-bytes"))]
    return None if all(map(math.isfinite, counts)) else "what it measured is not finite"
