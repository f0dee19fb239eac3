"""A plan is the step itself, to the byte, and runs nothing."""

import gc
from dataclasses import replace

import pytest
import torch
from cases import RULES as VARIANTS
from cases import mostly, taken, takes
from cases import network as small_network
from fedforward import message_bytes, protocol
from fedforward.algorithms import (
    MODELS,
    RULES,
    Backprop,
    Baffle,
    EquilibriumPropagation,
    KnowledgeAccumulation,
    MonoForward,
    Network,
    NeuronSwarm,
    PredictiveCoding,
    Projection,
    Rule,
    RuleError,
    State,
    Stats,
)
from fedforward.algorithms.replica import shared
from fedforward.algorithms.seeds import Place
from fedforward.client import plan as planning
from fedforward.client.memory import PARTS, MemoryBudgetExceeded, PeakMemory
from fedforward.client.plan import Planner
from fedforward.client.step import accumulators, load_parts, residents, score, take_step
from fedforward.scalar_wire import News, Terms
from flwr.app import ConfigRecord

FEW = {"directions": 5, "iterations": 5, "relaxation": 5, "nudged": 4, "neurons": 3, "steps": 4, "particles": 3}
SHAPES = {"mlp": (1, 28, 28), "lenet": (1, 28, 28), "cnn": (3, 32, 32)}
ON_MAPS = {  # of rules that are alike one is fast; others: slow
    "backprop", "backprop-fused", "backprop-checkpointed", "mono-forward", "forward-forward", "cascaded-forward", "dfa",
    "sign-symmetry", "pepita", "predictive-coding", "aug-local", "no-prop", "baffle", "forward-gradient",
    "local-forward-gradient", "likelihood-ratio",
}  # fmt: skip
ON_THE_LARGEST = {"backprop", "backprop-fused", "mono-forward", "forward-forward", "dfa", "baffle"}  # others: slow
ALL = [
    pytest.param(
        rule,
        model,
        marks=[pytest.mark.slow] * (rule not in {"mlp": RULES, "lenet": ON_MAPS, "cnn": ON_THE_LARGEST}[model]),
    )
    for rule in RULES
    for model in SHAPES
    if takes(RULES[rule](), Network(lambda model=model: MODELS[model](SHAPES[model], 10), SHAPES[model], 10))
]


SIZED = [  # single samples of small networks, and batches of the largest, with the slow tests
    pytest.param(*row.values, size, marks=[*row.marks, *[pytest.mark.slow] * (row.values[1] in slow)])
    for row in ALL
    for size, slow in ((1, ("mlp", "lenet")), (32, ("cnn",)))
]


@pytest.fixture(autouse=True)
def never_on_zeros(monkeypatch):
    """Plan without data, however small a step is."""
    monkeypatch.setattr(planning, "SMALL", 0)


def network(name):
    return Network(lambda: MODELS[name](SHAPES[name], 10), SHAPES[name], 10)


def few(rule):
    """Return the rule, if it tries directions or repeats itself with few of them: the many are another test's."""
    return replace(rule, **{name: n for name, n in FEW.items() if isinstance(getattr(rule, name, None), int)})


def real_step(rule, net, size, micro=0, *, anchored=False, budget=None, state=None):
    """Take one real step under the meter, and return the meter."""
    state = state or rule.init(net, seed=1)  # a caller's own outlives the step
    if micro:
        state = state._replace(gradients=accumulators(rule, state.params))
    anchor = {key: p.clone() for key, p in state.params.items()} if anchored else {}
    g = torch.Generator().manual_seed(2)
    x, y = torch.rand(size, *net.shape, generator=g), torch.randint(10, (size,), generator=g)
    meter = PeakMemory(residents(state, anchor), budget=budget)
    draws = rule.draw(Place(1, 2, 3, 4), size, 10)
    parts = load_parts(lambda rows: (x[rows], y[rows]), torch.arange(size), draws, micro)
    del draws
    take_step(rule, net, state, parts, 0.01, meter)
    del parts
    return meter


def same(plan, meter):
    return (plan.peak, plan.op, plan.parts, plan.flops) == (meter.peak, meter.op, meter.parts, meter.flops)


@pytest.mark.parametrize("rule, model, size", SIZED)
def test_the_planned_peak_is_the_real_one_and_budgets_bind_at_it(rule, model, size):
    rule, net = few(RULES[rule]()), network(model)
    plan = Planner(net).step(rule, size)
    gc.disable()  # what only a collection of reference cycles would free is not free
    try:
        state = rule.init(net, seed=1)
        meter = real_step(rule, net, size, state=state)
        assert same(plan, meter)
        assert meter.live == meter.base  # everything of the step is given back
        assert sum(plan.parts.values()) == plan.peak and tuple(plan.parts) == PARTS
        assert real_step(rule, net, size, budget=plan.peak).peak == plan.peak
        refusals = []
        for _ in range(2):
            with pytest.raises(MemoryBudgetExceeded) as refused:
                real_step(rule, net, size, budget=plan.peak - 1)
            refusals.append((refused.value.op, refused.value.needed, refused.value.budget, refused.value.index))
        assert refusals[0] == refusals[1] == (meter.op, plan.peak, plan.peak - 1, meter.index)
    finally:
        gc.enable()


@pytest.mark.parametrize("micro", [3, *(pytest.param(micro, marks=pytest.mark.slow) for micro in (1, 5, 8, 9))])
@pytest.mark.parametrize("rule", mostly(name for name, rule in VARIANTS.items() if not rule.unsplittable))
def test_a_batch_in_parts_is_planned_as_it_runs(rule, micro):
    rule, net = VARIANTS[rule], taken(VARIANTS[rule])
    assert same(Planner(net).step(rule, 8, micro), real_step(rule, net, 8, micro))


@pytest.mark.parametrize(
    "change",
    [
        (PredictiveCoding(), "relaxation"),
        (EquilibriumPropagation(nudged=6), "relaxation"),
        (Projection(), "iterations"),
        (KnowledgeAccumulation(), "passes"),
        (NeuronSwarm(particles=1), "neurons"),
    ],
    ids=lambda change: change[0].name,
)
def test_a_plan_sees_three_repetitions_and_knows_all(change):
    rule, option = change
    net = small_network("mlp")
    for many in (2, 5):
        repeating = replace(rule, **{option: many})
        assert same(Planner(net).step(repeating, 4), real_step(repeating, net, 4))


@pytest.mark.parametrize("rule", [Backprop(), Baffle(directions=5)])
def test_an_anchor_is_planned_as_it_is_kept(rule):
    net = network("mlp")
    assert same(Planner(net).step(rule, 4, anchored=True), real_step(rule, net, 4, anchored=True))


@pytest.mark.parametrize("scheme", ["forward", "central"])
@pytest.mark.parametrize("directions, chunk", [(1, 4096), (2, 256), (3, 1000), (33, 512), (7, 10**6)])
def test_a_plan_sees_two_directions_and_knows_all(scheme, directions, chunk):
    rule, net = Baffle(scheme=scheme, directions=directions, chunk=chunk), small_network("lenet")
    for size, micro in ((2, 0), (5, 2)):
        assert same(Planner(net).step(rule, size, micro), real_step(rule, net, size, micro))


@pytest.mark.parametrize("rule, model", ALL)
def test_evaluation_is_planned_as_it_runs(rule, model):
    rule, net = RULES[rule](), network(model)
    state = rule.init(net, 1)._replace(slots={})
    meter = PeakMemory(residents(state, {}))
    score(rule, net, state, torch.rand(7, *net.shape), torch.zeros(7, dtype=torch.int64), meter)
    plan = Planner(net).inference(rule, 7)
    assert (plan.peak, plan.parts, plan.flops) == (meter.peak, meter.parts, meter.flops)


DENSE = [pytest.param(*row.values, marks=[*row.marks, *[pytest.mark.slow] * (row.values[1] != "mlp")]) for row in ALL]


@pytest.mark.parametrize("rule, model", DENSE)
def test_planned_bytes_are_those_of_the_messages(rule, model):
    rule, net = few(RULES[rule]()), network(model)
    plan, params = Planner(net).step(rule, 2), rule.init(net, 0).params
    metrics = dict.fromkeys(protocol.TRAIN_METRICS, 1.5) | {"fit": [0, 0, 0, 0]}
    scalars = torch.zeros(rule.numbers) if rule.exchange == "scalars" else None
    reply = protocol.train_reply(protocol.Trained(params, scalars, metrics))
    assert plan.bytes_up == message_bytes.payload_bytes(reply)
    config = protocol.train_config(server_round=3, lr=0.5, epochs=2, batch_size=2, evaluate=False)
    if scalars is None:
        assert plan.bytes_down == protocol.encode_params(params).count_bytes() + config.count_bytes()
    else:  # of a client that missed nothing but the last round
        news = News(Terms.of(rule, params), 3, b"", (shared(3, 0.5, scalars[: rule.passed]),)).encode()
        assert plan.bytes_down == ConfigRecord({"values": news}).count_bytes() + config.count_bytes()


@pytest.mark.parametrize("model", SHAPES)
def test_perturbation_needs_what_inference_needs_and_its_answers(model):
    net = network(model)
    planner = Planner(net)
    inference = planner.forward(64).peak
    # Three stats and the loss at w; the K answers are what the client sends.
    for directions in (1, 8, 12, 32, 500):
        assert planner.step(Baffle(directions=directions), 64).peak == inference + 4 * (directions + 4)
    assert planner.step(Baffle(directions=12), 64).peak <= inference + 64


def test_a_plan_takes_no_memory_and_is_made_once():
    net = Network(lambda: MODELS["mlp"]((10_000,), 10, hidden=(10_000, 10_000)), (10_000,), 10)  # 800 MB of weights
    planner = Planner(net)
    with PeakMemory() as real:
        plan = planner.step(MonoForward(), 1000)
    assert plan.peak > 800e6
    assert max(t.nbytes for t in planner.params(MonoForward()).values()) == 4e8
    assert planner.step(MonoForward(), 1000) is plan
    assert real is not None


@pytest.mark.parametrize("net", ["mlp", pytest.param("lenet", marks=pytest.mark.slow)])
@pytest.mark.parametrize("rule", mostly(VARIANTS))
def test_a_small_step_is_planned_on_zeros_as_without_data(rule, net, monkeypatch):
    rule, net = VARIANTS[rule], taken(VARIANTS[rule], net)
    fake, zeros = Planner(net), Planner(net)
    micro = 0 if rule.unsplittable else 2
    plans = [fake.step(rule, 7, micro, anchored=True), fake.inference(rule, 5), fake.forward(4)]
    monkeypatch.setattr(planning, "SMALL", 10**6)
    assert [zeros.step(rule, 7, micro, anchored=True), zeros.inference(rule, 5), zeros.forward(4)] == plans


def test_a_granule_rounds_every_storage_up():
    net = network("mlp")
    exact, rounded = (Planner(net, granule).step(Backprop(), 3) for granule in (1, 512))
    sizes = [p.nbytes for p in Backprop().init(net, 0).params.values()]
    assert exact.parts["parameters"] == sum(sizes)
    assert rounded.parts["parameters"] == sum(-(-size // 512) * 512 for size in sizes)
    assert all(n % 512 == 0 for n in rounded.parts.values())
    assert rounded.peak > exact.peak


class Curious(Rule):
    """Asks for values, which a tensor without memory has not."""

    name = "curious"
    ask = staticmethod(lambda scores: float(scores.sum()) > -1e9)

    def init(self, net, seed):
        return State(net.init(seed), {}, {})

    def step(self, net, state, batch, lr):
        scores = net.forward(state.params, batch.x)
        if self.ask(scores):
            state.params["0.linear.bias"].sub_(lr * torch.ones(128))
        return Stats(scores.sum(), torch.zeros(()), batch.weight.sum())

    def logits(self, net, state, x):
        return net.forward(state.params, x)


WAYS = [
    lambda scores: float(scores.sum()) > -1e9,
    lambda scores: scores.sum().tolist() > -1e9,
    lambda scores: scores.numpy().sum() > -1e9,
    lambda scores: len(scores[scores > -1e9]) > 0,
]


@pytest.mark.parametrize("ask", WAYS)
def test_a_rule_that_asks_for_values_is_planned_on_real_ones(ask, monkeypatch):
    monkeypatch.setattr(Curious, "ask", staticmethod(ask))
    net = network("mlp")
    assert same(Planner(net).step(Curious(), 6), real_step(Curious(), net, 6))


def test_the_timeline_ends_where_it_began_and_holds_the_peak():
    plan = Planner(network("lenet")).step(Backprop(), 4, timeline=True)
    held = sum(n for part, n in plan.parts.items() if part != "activations")
    assert plan.timeline[0] == ("start", held - plan.parts["batch"])
    assert max(n for _, n in plan.timeline) == plan.peak
    assert (plan.op, plan.peak) in plan.timeline


def test_rule_errors_are_not_swallowed():
    class Broken(Curious):
        def step(self, net, state, batch, lr):
            raise RuleError("no")

    with pytest.raises(RuleError, match="no"):
        Planner(network("mlp")).step(Broken(), 1)
