"""Forward-Forward: each layer learns to be active for true labels and quiet for false ones.

G. Hinton, "The Forward-Forward Algorithm: Some Preliminary Investigations", arXiv 2212.13345, 2022, with the settings
of the public PyTorch version that reaches the paper's error (loeweX/Forward-Forward). The label is written one-hot
into the first C inputs. Layer l of n_l units sees length-normalised input x̂ and has

    z = W x̂ + b      a = ReLU(z)      goodness G = Σ_j a_j²      p = σ(G − n_l)      (threshold: the width)
    L = BCE(p, s) + λ mean_j (mean(m) − m_j)²,      s = 1 for the true label, 0 for a wrong one
    da = 2 (p − s) a / N + λ (2/n_l) (1 − μ) (m − mean(m)) / B      (the second term for true labels only)

where m_j ← μ m_j + (1 − μ) mean_B a_j is a running mean of each unit's activity on true labels. The gradient passes
the ReLU unchanged, which matters to the second term alone: it wakes units that are always off.

What a layer is to be quiet for need not be a label drawn blindly. A label may be drawn as likely as it is mistaken for
the right one, p_c ∝ softmax(read-out under the neutral label)_c; or there are no labels at all, and a sample is told
from a hybrid with another, x⁻ = m x + (1 − m) x', whose smooth mask m of 0 and 1 keeps what is near together and
breaks what is far.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import softplus

from ..network import Network
from ..rule import Batch, GradientRule, RuleError, State, Stats, Tensors
from ..seeds import Place
from ..softmax import softmax_error
from .goodness import add_peer_term, demand_goodness, embed, initial, neutral_activity, normalise_
from .negatives import NEGATIVES, chances, demand_room, hard_offsets, hybrids


@dataclass(frozen=True)
class ForwardForward(GradientRule):
    """Layer-local contrast of goodness between right and wrong labels.

    Stores during a step: one layer's input and output for true and wrong labels together (2B rows), and that layer's
    gradients. No graph where the block is linear with an activation; elsewhere a graph inside the block alone, and
    there the gradient does not pass a closed ReLU. What is read out is stored of all layers but the first.

    Departs from the reference: the running means m are exchanged and averaged like weights, so that a federation shares
    one; the goodness of a convolution is summed over its whole map. Of hybrids, the paper trains the read-out
    afterwards and names no number of blurs: here it learns beside, and there are 6.

    Attributes:
        peer: λ, the weight of the peer term.
        negatives: "label" draws wrong labels evenly, "hard" as likely as the read-out finds them; "hybrid" uses no
            labels but in the read-out, wants maps and "one-pass", and a sample alone in its batch is its own negative.
        inference: "sweep" tries every label and adds the goodness of all layers but the first; "one-pass" writes a
            neutral label, if any, and reads the normalised activities of the same layers with a softmax learned beside.
        readout_lr: learning rate of that softmax; the round's schedule scales it too.
        readout_weight_decay: its weight decay.
    """

    name: ClassVar[str] = "forward-forward"
    family: ClassVar[str] = "layerwise"
    paper: ClassVar[str] = "Hinton, arXiv 2212.13345, 2022"
    travels: ClassVar[str] = "weights and activity means"
    autograd: ClassVar[str] = "inside a block"
    first_counted: ClassVar[int] = 1  # the first hidden layer whose goodness counts in a prediction

    lr: float = 1e-3
    momentum: float = 0.9
    weight_decay: float = 3e-4
    peer: float = 0.03
    negatives: Literal["label", "hybrid", "hard"] = "label"
    inference: Literal["sweep", "one-pass"] = "sweep"
    readout_lr: float = 1e-2
    readout_weight_decay: float = 3e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.inference not in ("sweep", "one-pass"):
            raise RuleError(f"unknown inference '{self.inference}': use sweep or one-pass")
        if self.negatives not in NEGATIVES:
            raise RuleError(f"unknown negatives '{self.negatives}': use one of {', '.join(NEGATIVES)}")
        if self.negatives == "hybrid" and self.inference == "sweep":
            raise RuleError("hybrids leave no label to sweep over: use rule.inference=one-pass")

    @property
    def reads_out(self) -> bool:
        """Whether there is a read-out."""
        return self.inference == "one-pass" or self.negatives == "hard"

    @property
    def unsplittable(self) -> str:
        """Why parts of a batch do not add up: what is not a sum over samples."""
        if self.negatives == "hybrid":
            return "a hybrid is made of two samples of the batch"
        if self.reads_out:
            return "the read-out learns at a rate of its own"
        if self.peer:
            return "the peer term follows means over the whole batch (without it, --set rule.peer=0.0, they add up)"
        return ""

    def check(self, net: Network) -> None:
        """Demand two hidden blocks (the first one's goodness is not counted) and room for the label."""
        demand_goodness(net, self.name)
        demand_room(self.negatives, net)

    def draw(self, place: Place, batch_size: int, classes: int) -> Tensor:
        """Return what the negatives of a batch are made of."""
        return chances(self.negatives, place, batch_size, classes)

    def init(self, net: Network, seed: int) -> State:
        """Return weights N(0, 1/n_out), zero biases, unit norms, and running means "{l}.mean" of the hidden blocks."""
        params = initial(net, seed)
        if self.reads_out:
            width = sum(torch.Size(net.sizes[i]).numel() for i in net.hidden[1:])
            params["readout.weight"] = torch.zeros(net.classes, width)
        return State(params, {}, self.slots(params))

    def learned(self, params: Tensors) -> Tensors:
        """Return all but the running means."""
        return {key: p for key, p in params.items() if not key.endswith(".mean")}

    def step(self, net: Network, state: State, batch: Batch, lr: float) -> Stats:
        """Update layer after layer on true and wrong labels; correct counts samples whose last goodness tells them."""
        x = normalise_(self._contrasted(net, state, batch))
        share = batch.share().repeat(2) / 2
        target = torch.cat([torch.ones_like(batch.weight), torch.zeros_like(batch.weight)])
        loss = torch.zeros_like(batch.weight)
        logit = self._before(net, state, x)
        for i in net.hidden:
            a, pull = net.block_vjp(i, state.params, x, open_relu=True)
            flat = a.flatten(1)
            logit = self._logit(flat.square().sum(1) - flat.shape[1], logit)
            gradient = (2 * share * (logit.sigmoid() - target))[:, None] * flat
            if self.peer:
                add_peer_term(gradient, flat, state.params[f"{i}.mean"], batch.share(), self.peer)
            del flat  # of a map with its channels last it is a copy
            grads = pull(gradient.view_as(a))
            del pull, gradient
            self.update(state, grads, lr)
            del grads
            true, false = logit.chunk(2)
            loss = loss + (softplus(-true) + softplus(false)) / 2
            x = normalise_(a)
            del a
        if self.reads_out:
            self._train_readout(net, state, batch, lr)
        correct = (true > false).to(batch.weight.dtype)
        return Stats((loss * batch.weight).sum(), (correct * batch.weight).sum(), batch.weight.sum())

    def goodness(self, net: Network, state: State, batch: Batch) -> Iterator[tuple[int, tuple[Tensor, Tensor]]]:
        """Yield each hidden block's goodness (B,) of the samples and of the negatives that this batch trains on."""
        x = normalise_(self._contrasted(net, state, batch))
        for i in net.hidden:
            x = net.block(i, state.params, x)
            yield i, x.flatten(1).square().sum(1).chunk(2)
            x = normalise_(x)

    def _before(self, net: Network, state: State, x: Tensor) -> Tensor | None:
        """Return what `_logit` takes for the logit before the first layer's, of inputs x (2B, ...)."""

    def _logit(self, own: Tensor, before: Tensor | None) -> Tensor:
        """Return a layer's logit (2B,), of its goodness above its threshold and the logit of the layer before."""
        return own

    def _contrasted(self, net: Network, state: State, batch: Batch) -> Tensor:
        """Return what the layers tell apart (2B, *shape): the samples, and then a negative of each."""
        if self.negatives == "hybrid":
            return torch.cat([batch.x, hybrids(batch.x, batch.weight, batch.draws)])
        offset = batch.draws
        if self.negatives == "hard":
            scores = self._activity(net, state, batch.x) @ state.params["readout.weight"].T
            offset = hard_offsets(scores, batch.y, batch.draws)
        return embed(batch.x, (batch.y, (batch.y + offset) % net.classes), net.classes)

    def logits(self, net: Network, state: State, x: Tensor) -> Tensor:
        """Return the goodness of each label, or the read-out's scores, (B, classes).

        Goodness is no log-probability: a cross-entropy of it compares runs of this rule, not this rule with others.
        """
        if self.inference == "one-pass":
            return self._activity(net, state, x) @ state.params["readout.weight"].T
        return torch.stack([self._goodness(net, state, x, label) for label in range(net.classes)], 1)

    def _goodness(self, net: Network, state: State, x: Tensor, label: int) -> Tensor:
        """Return Σ_l G_l (B,) over the layers that count, with `label` written into x."""
        labels = torch.full(x.shape[:1], label, device=x.device)
        x, total = normalise_(embed(x, (labels,), net.classes)), 0.0
        for i in net.hidden:
            a = net.block(i, state.params, x)
            if i >= self.first_counted:
                total = total + a.flatten(1).square().sum(1)
            x = normalise_(a)
        return total

    def _activity(self, net: Network, state: State, x: Tensor) -> Tensor:
        """Return what is read out of x (B, *shape): (B, Σ n_l)."""
        return neutral_activity(net, state.params, x, labelled=self.negatives != "hybrid")

    def _train_readout(self, net: Network, state: State, batch: Batch, lr: float) -> None:
        activity = self._activity(net, state, batch.x)
        weight = state.params["readout.weight"]
        delta = softmax_error(activity @ weight.T, batch)
        # Its own decay replaces the layers' inside the shared optimizer step.
        grad = delta.T @ activity + (self.readout_weight_decay - self.weight_decay) * weight
        self.update(state, {"readout.weight": grad}, lr * self.readout_lr / self.lr)
