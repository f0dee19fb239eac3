"""Training as a search for a point of two sets, by projections onto one and the other; nothing is differentiated.

A. Bergmeister, M. K. Lal, S. Jegelka, S. Sra, "A projection-based framework for gradient-free and parallel learning",
arXiv 2506.05878, 2025. x holds, for every sample of a batch, copies of all operands of every operation: the weights
u_bj and inputs v_bj of unit j's dot product, the product s_bj, the bias c_bj that is added to it, and the scores z_b.

    A    s_bj = u_bj · v_bj;    c_bj is the same in all samples b;    z_b minimises λ CE, or has its margin
    B    y_bj = s_bj + c_bj, or max(0, s_bj + c_bj), in all copies of it: in v of the block above, or in z;
         u_bj is the same in all samples b

Each set is many constraints of a few variables each, none of which two of them share: P_A and P_B project onto all at
once. A step begins where the forward pass leads, which misses A by the scores alone, and goes on, K times:

    alternating           x ← P_B P_A x
    douglas-rachford      x ← (1 − λ) x + λ R_B R_A x                    R = 2 P − 1
    difference-map        x ← x + β (P_A f_B − P_B f_A)                  f_B = P_B x + (P_B x − x)/β
                                                                         f_A = P_A x − (P_A x − x)/β
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ..network import Network
from ..repeats import alike
from ..rule import Batch, Rule, RuleError, State, Stats
from ..softmax import cross_entropy_stats, onehot
from .constraints import STRONGEST, dot_multiplier, project_margin, project_sum, prox_cross_entropy
from .copies import Agreed, Known, Own

CHOICES = {"scheme": ("alternating", "douglas-rachford", "difference-map"), "loss": ("cross-entropy", "margin")}


@dataclass(frozen=True)
class Projection(Rule):
    """Copies of all operands, projected in turn onto what operations and samples demand; no graph, no backward pass.

    Stores during a step, in numbers, of B samples and layers of n_l units with m_l inputs, N units in all: about a
    dozen tables of B N, the weights twice or thrice, and the copies. Those of the first layer, whose inputs are data,
    follow from B n_1 numbers. "alternating" needs no others: whenever it has projected onto B, copies are equal. The
    other schemes keep 2 B Σ_{l>1} n_l m_l, more than any other rule: at B = 32, of the mlp of 784, 128, 128 and 10,
    4.5 MB beside parameters of 0.5 MB. K costs time: an iteration takes the work of two or three passes.

    A mean over samples is weighted: P_A and P_B are nearest where a sample of weight s has its squared distances s
    times. Copies begin anew in every step, parameters go on.

    Departs from the paper: inputs are constants of their dots, not copies that data pull back; the prox of the
    cross-entropy is found to rounding, by Newton's method (the paper's 10 fixed-point steps need not settle at λ = 5);
    the output block has a bias and reads the block before it, not all hidden ones. Parameters end at the last point of
    B, biases at the means of their copies there.

    Attributes:
        lr: how far parameters go towards what the copies agreed on; 1 is all the way, as in the paper.
        scheme: "alternating" is the leanest and the slowest to learn, "douglas-rachford" the paper's. "difference-map"
            projects twice in an iteration, or with β = 1 once, and is then Douglas-Rachford with A and B exchanged.
        iterations: K. What the scores are told goes down by a block in each, so that of L blocks all learn if K > L
            (of the difference map, K > L + 1).
        relaxation: λ of Douglas-Rachford, 1/2 for its usual form.
        beta: β of the difference map, of either sign.
        loss: "cross-entropy", or "margin": the label's score is at least the margin, and others at most minus that.
        strength: λ of the cross-entropy's prox.
        margin: of the scores.
    """

    name: ClassVar[str] = "projection"
    family: ClassVar[str] = "equilibrium"
    paper: ClassVar[str] = "Bergmeister et al., arXiv 2506.05878, 2025"
    unsplittable: ClassVar[str] = "in every iteration the copies of a weight agree over all samples of the batch"

    lr: float = 1.0
    scheme: Literal["alternating", "douglas-rachford", "difference-map"] = "douglas-rachford"
    iterations: int = 50
    relaxation: float = 0.5
    beta: float = 1.0
    loss: Literal["cross-entropy", "margin"] = "cross-entropy"
    strength: float = 5.0
    margin: float = 1.0

    def __post_init__(self) -> None:
        for option, known in CHOICES.items():
            if (value := getattr(self, option)) not in known:
                raise RuleError(f"unknown {option} '{value}': use one of {', '.join(known)}")
        if self.iterations < 1 or not 0 < self.relaxation <= 1 or self.beta == 0 or self.margin < 0:
            raise RuleError("projection needs iterations ≥ 1, 0 < relaxation ≤ 1, beta other than 0 and margin ≥ 0")
        if not 0 < self.strength <= STRONGEST:
            raise RuleError(f"projection needs rule.strength above 0 and at most {STRONGEST:g}")

    def check(self, net: Network) -> None:
        """Demand dense blocks with biases, and none but ReLUs after them."""
        for i in range(len(net.blocks)):
            dense = net.dense(i)
            if dense is None or dense.activation not in (nn.ReLU, nn.Identity) or len(net.keys(i)) != 2:
                raise RuleError("projection needs dense layers with biases and ReLUs: use --model mlp")

    def init(self, net: Network, seed: int) -> State:
        """Return the network's own initial weights."""
        return State(net.init(seed), {}, {})

    def step(self, net: Network, state: State, batch: Batch, lr: float) -> Stats:
        """Iterate, then move the parameters to what was agreed on; stats are those of the forward pass."""
        x = Point(self, net, state, batch)
        stats = cross_entropy_stats(x.z, batch)
        for _ in alike(self.iterations):
            near = None  # of the iteration before
            near = x.advance()
        biases = (x.share @ near.c).split(x.sizes)
        part = lr * x.share.sum()  # nothing of a batch of nothing
        for i, found in enumerate(zip(near.w, biases, strict=True)):
            for key, new in zip(net.keys(i), found, strict=True):
                p = state.params[key]
                p.add_(part * (new - p))
        return stats


class Way(NamedTuple):
    """The way from a point to A."""

    t: Tensor  # multipliers of the dots, (B, N) of N units: also s less what it is there
    c: Tensor  # to be added, (B, N)
    z: Tensor  # to be added, (B, C)


class InB(NamedTuple):
    """A point of B."""

    w: list[Tensor]  # of each layer, (n, m)
    a: list[Tensor | None]  # inputs of each layer, (B, m); of the first they are data
    s: Tensor  # (B, N)
    c: Tensor  # (B, N)
    z: Tensor  # (B, C)


class Point:
    """x, and where it goes."""

    def __init__(self, rule: Projection, net: Network, state: State, batch: Batch) -> None:
        self.rule, self.share = rule, batch.share()
        self.labels = onehot(batch.y, net.classes, batch.x.dtype)
        a, s, c, self.dots = batch.x.flatten(1), [], [], []
        relus = [net.dense(i).activation is nn.ReLU for i in range(len(net.blocks))]
        hidden = Agreed if rule.scheme == "alternating" else Own
        for i, relu in enumerate(relus):
            w, b = (state.params[key] for key in net.keys(i))
            self.dots.append((hidden if i else Known)(w, a))
            s.append(a @ w.T)
            c.append(b.expand_as(s[-1]))
            a = (s[-1] + c[-1]).clamp_min_(0) if relu else s[-1] + c[-1]
        self.s, self.c, self.z = torch.cat(s, 1), torch.cat(c, 1), a
        self.sizes = [net.sizes[i][0] for i in range(len(net.blocks))]
        self.relus = torch.tensor(_of_units(relus, self.sizes), device=a.device)
        self.copies = a.new_tensor(_of_units([*self.sizes[1:], 1], self.sizes))

    def advance(self) -> InB:
        """Go on by an iteration; return the last point of B that led there."""
        rule, way = self.rule, None
        if rule.scheme != "difference-map":
            way = self.way()
        if rule.scheme == "alternating":
            near = self.in_b(1, way)
            self.move(0, 0, way, 1, near)
        elif rule.scheme == "douglas-rachford":
            near, twice = self.in_b(2, way), 2 * rule.relaxation
            self.move(1 - twice, -twice, way, twice, near)
        else:
            # x + β (f_B + Δ(f_B) − P_B f_A), where x + β f_B = (1 + β) P_B x. With β = 1, f_A is x.
            beta, stay = rule.beta, Way(*(torch.zeros_like(part) for part in (self.s, self.c, self.z)))
            home = self.in_b(0, stay)
            near = home if beta == 1 else self.in_b(1 - 1 / beta, self.way())
            self.move(-1 / beta, 0, stay, 1 + 1 / beta, home)
            way = self.way()
            self.move(0, beta, way, 1 + beta, home)
            self.move(1, 0, stay, -beta, near)
        return near

    def way(self) -> Way:
        """Return the way to A, Δ."""
        (first, *layers), rule = self.dots, self.rule
        own, *others = self.s.split(self.sizes, 1)
        t = [first.multiplier(own)]
        if layers:
            plus, minus = (torch.cat(squares, 1) for squares in zip(*(dots.squares() for dots in layers), strict=True))
            t.append(dot_multiplier(plus, minus, torch.cat(others, 1)))
        if rule.loss == "margin":
            z = project_margin(self.z, self.labels, rule.margin)
        else:
            z = prox_cross_entropy(self.z, self.labels, rule.strength)
        return Way(torch.cat(t, 1), self.share @ self.c - self.c, z - self.z)

    def in_b(self, theta: float, way: Way) -> InB:
        """Return P_B (x + θ Δ)."""
        t = way.t.split(self.sizes, 1)
        means = [dots.means(theta, own, self.share) for dots, own in zip(self.dots, t, strict=True)]
        w, a = (list(part) for part in zip(*means, strict=True))
        y = torch.cat([*a[1:], torch.add(self.z, way.z, alpha=theta)], 1)
        s, c = torch.sub(self.s, way.t, alpha=theta), torch.add(self.c, way.c, alpha=theta)
        s, c, y = project_sum(s, c, y, self.copies, self.relus)
        *a, z = y.split(self.sizes, 1)
        return InB(w, [None, *a], s, c, z)

    def move(self, alpha: float, beta: float, way: Way, gamma: float, near: InB) -> None:
        """Go to α x + β Δ + γ near."""
        for dots, t, w, a in zip(self.dots, way.t.split(self.sizes, 1), near.w, near.a, strict=True):
            dots.move(alpha, beta, t, gamma, w, a)
        self.s.mul_(alpha).sub_(way.t, alpha=beta).add_(near.s, alpha=gamma)
        self.c.mul_(alpha).add_(way.c, alpha=beta).add_(near.c, alpha=gamma)
        self.z.mul_(alpha).add_(way.z, alpha=beta).add_(near.z, alpha=gamma)


def _of_units(values: list, sizes: list[int]) -> list:
    """Return each layer's value for each of its units."""
    return [value for value, size in zip(values, sizes, strict=True) for _ in range(size)]
