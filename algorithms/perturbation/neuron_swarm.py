"""A swarm of particles for every neuron: each searches for its weights, while all others stay at their best.

D. Kumar, "Training neural networks without backpropagation using particles", arXiv 2412.05667, 2024. A neuron is a row
of a dense layer with its bias, and g is what it has: its best. k particles have places p_i, velocities v_i and bests
b_i of their own, and L(·) is the loss of the batch with the neuron's weights so:

    b_i ← p_i  if L(p_i) < L(b_i)            g ← argmin {L(g), L(b_1), …, L(b_k)}
    v_i ← w v_i + c₁ r₁ (b_i − p_i) + c₂ r₂ (g − p_i)      p_i ← p_i + v_i         r₁, r₂ ~ U(0, 1) for each weight

Neuron after neuron, from the first layer up. Places are kept as (p_i − g)/η, so that a swarm is where its neuron is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..batched import linear
from ..network import Network
from ..noise import seeds, uniforms, words
from ..repeats import alike
from ..rule import Batch, Rule, RuleError, State, Stats, Tensors
from ..seeds import Place, Purpose, generator
from ..softmax import cross_entropy_stats

ROUNDING = 16  # units in the last place, within which losses are the same: then nothing moves, or the first wins
SWARM = ("places", "velocities", "bests")


@dataclass(frozen=True)
class NeuronSwarm(Rule):
    """Particle swarms, one a neuron, on forward passes alone.

    Stores during a step: one layer's input, its sums and those of the layer above; of a neuron the sums that its 2k + 1
    candidates make in the layer above, (B, 2k + 1, n) twice or so, whatever the depth. The swarms, 3k copies of the
    parameters, stay on the device.

    A step costs Σ_l min(`neurons`, n_l) (2k + 1) losses, and few of them a whole pass: below a neuron and beside it
    nothing changes, in the layer above a multiple of one column does, and only what is over that is run again. For the
    mlp of 784, 128, 128 and 10 and k = 8, 4,522 losses of all its neurons take the work of 43 forward passes.

    A loss measured on another batch says nothing: bests are judged anew on every batch, which doubles the cost (k of
    the losses are of places, k of bests). With g among the candidates no batch's loss rises in its step. But the best
    of many on a small batch is so by chance: it takes hundreds of samples to be better on others too.

    Neurons of equal index begin a round equal on all clients, and their bests are averaged. The mean of bests is no
    client's best: each was sought beside its own client's others. Swarms begin anew around it, all in the same
    formation; where they fly is a matter of the client and the step.

    Departs from the paper: its constants were not at hand, and w, c₁ and c₂ are the usual ones; `neurons` may be fewer
    than there are.

    Attributes:
        lr: η, the size of a swarm as it begins: its places have a standard deviation of η/√m, m the neuron's weights.
            A falling η draws swarms together.
        particles: k.
        inertia: w.
        cognitive: c₁, towards the particle's own best.
        social: c₂, towards the neuron's.
        neurons: of a layer, visited in a step, neighbours from one that is drawn; 0: all, as in the paper.
    """

    name: ClassVar[str] = "neuron-swarm"
    family: ClassVar[str] = "perturbation"
    paper: ClassVar[str] = "Kumar, arXiv 2412.05667, 2024"
    unsplittable: ClassVar[str] = "a neuron takes the best of its particles by the loss of the whole batch"

    lr: float = 0.5
    particles: int = 8
    inertia: float = 0.73
    cognitive: float = 1.5
    social: float = 1.5
    neurons: int = 8

    def __post_init__(self) -> None:
        if self.particles < 1 or self.neurons < 0 or min(self.inertia, self.cognitive, self.social) < 0:
            raise RuleError("neuron-swarm needs particles ≥ 1, and neurons, inertia, cognitive and social ≥ 0")

    def check(self, net: Network) -> None:
        """Demand dense blocks with biases."""
        if not net.is_dense or any(len(net.keys(i)) != 2 for i in range(len(net.blocks))):
            raise RuleError("neuron-swarm needs dense layers with biases and ReLU or tanh: use --model mlp")

    def draw(self, place: Place, batch_size: int, classes: int) -> Tensor:
        """Return the step's seed (B,) int64, the same in every row, so that any sample that counts can tell it."""
        return seeds(place, 1).repeat(batch_size)

    def init(self, net: Network, seed: int) -> State:
        """Return the network's weights, and swarms around them: "{l}.places" and so on, (n, k, m)."""
        params, slots = net.init(seed), {}
        for i in range(len(net.blocks)):
            n, inputs = params[net.keys(i)[0]].shape
            drawn = generator(seed, Purpose.INIT, i).standard_normal((n, self.particles, inputs + 1))
            places = torch.from_numpy(drawn / (inputs + 1) ** 0.5).to(torch.float32)
            for part, kept in zip(SWARM, (places, torch.zeros_like(places), places.clone()), strict=True):
                slots[f"{i}.{part}"] = kept
        return State(params, {}, slots)

    def step(self, net: Network, state: State, batch: Batch, lr: float) -> Stats:
        """Let the neurons of one layer after the other search; stats are those of the network before."""
        stats = cross_entropy_stats(net.forward(state.params, batch.x), batch)
        seed = batch.draws.index_select(0, batch.weight.argmax(0, keepdim=True))
        x = batch.x.flatten(1)
        for i in range(len(net.blocks)):
            x = self._search(net, state, batch, i, x, seed, lr)
        return stats

    def _search(self, net: Network, state: State, batch: Batch, i: int, x: Tensor, seed: Tensor, lr: float) -> Tensor:
        """Let neurons of block i search, whose input is x; return what comes out of it then."""
        weight, bias = (state.params[key] for key in net.keys(i))
        swarm, n = [state.slots[f"{i}.{part}"] for part in SWARM], len(weight)
        z = net.dense(i).affine(state.params, x)
        a = net.dense(i).activated(z.clone())
        if i == net.output:
            columns, above = torch.eye(n, dtype=z.dtype, device=z.device), a
        else:
            columns, above = state.params[net.keys(i + 1)[0]], net.dense(i + 1).affine(state.params, a)
        first = words(seed, i << 20, 1)[0]
        for visit in alike(min(self.neurons or n, n)):
            j = (first + visit) % n  # (1,), for it may differ between clients
            place, velocity, best = (part.index_select(0, j)[0] for part in swarm)
            moves = torch.cat([torch.zeros_like(place[:1]), place, best])  # to stay, or to one of these
            dz = linear(x, moves[:, :-1], moves[:, -1]).mul_(lr)
            da = net.dense(i).activated(z.index_select(1, j) + dz)
            da -= da[:, :1].clone()
            column = columns.index_select(1, j).mT
            losses = self._losses(net, state.params, batch, i, above, da, column)
            slack = losses.amin() * (ROUNDING * torch.finfo(losses.dtype).eps)
            chosen = (losses <= losses.amin() + slack).to(torch.int8).argmax(0, keepdim=True)
            above += da.index_select(1, chosen) * column
            z.index_add_(1, j, dz.index_select(1, chosen))
            move = moves.index_select(0, chosen)
            weight.index_add_(0, j, move[:, :-1] * lr)
            bias.index_add_(0, j, move[0, -1:] * lr)
            better = losses[1 : 1 + self.particles] < losses[1 + self.particles :] - slack
            best = torch.where(better[:, None], place, best) - move
            place = place - move
            counts = (batch.weight.sum() > 0).to(place.dtype)  # nothing flies on a batch of nothing
            r = uniforms(seed, (i << 20) + 1 + visit, 2 * place.numel(), place.dtype).view(2, *place.shape)
            pulled = self.cognitive * r[0] * (best - place) - self.social * r[1] * place
            velocity = torch.lerp(velocity, self.inertia * velocity + pulled, counts)
            for part, own in zip(swarm, (place + counts * velocity, velocity, best), strict=True):
                part[j] = own[None]
        return net.dense(i).activated(z)

    def _losses(
        self, net: Network, params: Tensors, batch: Batch, i: int, above: Tensor, da: Tensor, column: Tensor
    ) -> Tensor:
        """Return the batch's loss for each way (B, K) in which an output of block i may change, (K,).

        Args:
            net: the network.
            params: its parameters.
            batch: the batch.
            i: the block.
            above: the sums of block i + 1, or of the output block its scores.
            da: the changes.
            column: what a change of 1 adds to the sums above, (1, n).
        """
        y = (da.unsqueeze(-1) * column).add_(above.unsqueeze(1))
        if i < net.output:
            y = net.dense(i + 1).activated(y).flatten(0, 1)
            for over in range(i + 2, len(net.blocks)):
                y = net.block(over, params, y)
            y = y.view(*da.shape, -1)
        wanted = batch.y[:, None, None].expand(*da.shape, 1)
        return (y.log_softmax(-1).gather(-1, wanted).squeeze(-1) * -batch.share()[:, None]).sum(0)
