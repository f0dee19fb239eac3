"""What crosses the wire: round trips to the bit, and sizes that are Flower's own to the byte."""

import pickle

import numpy as np
import pytest
import torch
from fedforward import message_bytes, protocol
from fedforward.simulations.engines.local import assume_identity
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

METRICS = dict.fromkeys(protocol.TRAIN_METRICS, 1.5) | {"fit": [0, 1, 4096, 1]}


def params(*shapes, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    return {f"{i}.weight": torch.randn(shape, generator=g).to(dtype) for i, shape in enumerate(shapes)}


def same_bits(a, b):
    return list(a) == list(b) and all(a[key].numpy().tobytes() == b[key].numpy().tobytes() for key in a)


def test_a_model_survives_the_wire_to_the_bit_and_in_order():
    model = params((3, 4), (), (5,), (2, 3, 1, 2))
    model["0.weight"][0, :3] = torch.tensor([float("nan"), -0.0, 1e-42])
    model = {key: model[key] for key in reversed(model)}
    back = protocol.decode_params(protocol.encode_params(model))
    assert same_bits(back, model)
    assert all(back[key].shape == p.shape and back[key].dtype == torch.float32 for key, p in model.items())
    back["2.weight"].zero_()  # fresh storage, writable
    assert model["2.weight"].any()


def test_transposed_parameters_arrive_as_they_are_read():
    p = torch.arange(6.0).view(2, 3).T
    assert torch.equal(protocol.decode_params(protocol.encode_params({"a": p}))["a"], p)


def test_aggregates_in_float64_come_back_as_float32():
    model = params((7, 3), ())
    doubles = ArrayRecord({key: Array(p.double().numpy()) for key, p in model.items()})
    assert same_bits(protocol.decode_params(doubles), model)
    mean = np.mean([model["0.weight"].numpy()] * 3, axis=0, dtype=np.float64)
    assert protocol.decode_params(ArrayRecord({"a": Array(mean)}))["a"].dtype == torch.float32


def test_metrics_are_float64_in_the_order_asked_for():
    record = protocol.encode_metrics(("b", "a"), {"a": 2**53, "b": 1, "c": 3})
    assert list(record.items()) == [("b", 1.0), ("a", float(2**53))]
    assert all(type(value) is float for value in record.values())
    with pytest.raises(KeyError, match="d"):
        protocol.encode_metrics(("d",), {"a": 1})


@pytest.mark.parametrize("n", [1, 33, 5000])
def test_a_scalar_reply_costs_four_bytes_a_number_and_a_constant(n):
    reply = protocol.train_reply(protocol.Trained({}, torch.randn(n), METRICS, round=3))
    constant = message_bytes.scalar_uplink_bytes(0)
    assert message_bytes.payload_bytes(reply) == message_bytes.scalar_uplink_bytes(n) == 4 * n + constant
    assert constant == 16 + len("values") + sum(len(name) + 8 for name in protocol.TRAIN_METRICS) + 3 * 8 == 242
    assert protocol.ARRAYS not in reply


def test_a_weight_reply_costs_its_values_and_keys():
    model = params((30, 20), (20,))
    reply = protocol.train_reply(protocol.Trained(model, None, METRICS))
    arrays = sum(len(array.data) + len(key) for key, array in reply[protocol.ARRAYS].items())
    metrics = sum(len(name) + 8 for name in protocol.TRAIN_METRICS) + 3 * 8  # "fit" has four numbers
    assert message_bytes.payload_bytes(reply) == arrays + metrics == message_bytes.model_uplink_bytes(model)
    assert arrays - 4 * 620 < 2 * (128 + len("0.weight")) + 1  # NumPy's header and the key, for each array
    assert protocol.only({"anything": 3}) == 3
    with pytest.raises(ValueError, match="too many"):
        protocol.only(dict(reply))


def tree_bytes(node):
    """Return the bytes of a Flower object and everything below it."""
    return len(node.deflate()) + sum(tree_bytes(child) for child in (node.children or {}).values())


CONTENTS = {
    "down": lambda: {"arrays": params((30, 20), (20,)), "config": {"server-round": 3, "lr": 0.1, "note": "text"}},
    "0-dim": lambda: {"arrays": params((), (1,), (0,), (2, 3, 4, 5, 6))},
    "float64": lambda: {"arrays": params((30, 20), (20,), dtype=torch.float64)},
    "two chunks": lambda: {"arrays": params((1500, 1000), (3,))},
    "four chunks": lambda: {"arrays": params((2048, 2048))},
    "two models": lambda: {"arrays": params((4, 5)), "other": params((4, 6))},
    "no arrays": lambda: {"config": {"values": b"1234"}},
    "empty": dict,
}


@pytest.mark.parametrize("case", CONTENTS)
def test_wire_bytes_are_those_of_flowers_object_tree(case):
    content = RecordDict()
    for name, values in CONTENTS[case]().items():
        arrays = any(isinstance(v, torch.Tensor) for v in values.values())
        content[name] = protocol.encode_params(values) if arrays else ConfigRecord(values)
    content["metrics"] = MetricRecord({"loss": 1.0, "steps": 3})
    measured = message_bytes.wire_bytes(content)  # before the tree is made, so that nothing is cached for it
    assert measured == tree_bytes(content) == message_bytes.wire_bytes(content)


def test_replies_are_measured_to_the_byte():
    for scalars in (None, torch.randn(33)):
        reply = protocol.train_reply(protocol.Trained(params((30, 20), (20,)), scalars, METRICS))
        assert message_bytes.wire_bytes(reply) == tree_bytes(reply)


def test_wire_bytes_do_not_depend_on_values():
    # Flower would send two equal arrays, or two equal chunks of one, once.
    zeros = {key: torch.zeros_like(p) for key, p in params((2048, 2048), (7,), (7,)).items()}
    filled = params((2048, 2048), (7,), (7,))
    sizes = [message_bytes.wire_bytes(RecordDict({"arrays": protocol.encode_params(p)})) for p in (zeros, filled)]
    assert sizes[0] == sizes[1]


def test_measuring_leaves_the_record_as_it_was():
    content = protocol.train_reply(protocol.Trained(params((1500, 1000), ()), None, METRICS))
    before = {key: dict(vars(array)) for key, array in content[protocol.ARRAYS].items()}
    message_bytes.wire_bytes(content)
    message_bytes.payload_bytes(content)
    assert {key: vars(array) for key, array in content[protocol.ARRAYS].items()} == before
    back = pickle.loads(pickle.dumps(content))  # a memoryview kept by an array would make this fail
    assert same_bits(protocol.decode_params(back[protocol.ARRAYS]), protocol.decode_params(content[protocol.ARRAYS]))


def live_reply(scalars=None):
    assume_identity()
    question = Message(RecordDict(), dst_node_id=7, message_type="train")
    model = {} if scalars is not None else params((30, 20), (20,))
    return protocol.LiveReply(question, protocol.Trained(model, scalars, METRICS))


@pytest.mark.parametrize("scalars", [None, torch.randn(64)])
def test_a_live_reply_is_counted_as_what_flower_would_send(scalars):
    reply = live_reply(scalars)
    counted, sender = message_bytes.reply_bytes(reply), protocol.sender(reply)
    assert protocol.live(reply), "counting asks for no records"
    content = reply.content
    assert not protocol.live(reply)
    both = message_bytes.payload_bytes(content), message_bytes.wire_bytes(content)
    assert counted == message_bytes.reply_bytes(reply) == both
    assert sender == protocol.sender(reply) == reply.metadata.src_node_id == 7
    assert content["metrics"]["loss"] == METRICS["loss"]


def test_records_that_were_asked_for_are_the_answer():
    """A mod that changes the content must not be passed over."""
    reply = live_reply()
    reply.content["metrics"]["loss"] = 5.0
    reply.content["arrays"] = protocol.encode_params({"a": torch.ones(2)})
    assert protocol.measured(reply)["loss"] == 5 and protocol.model_of(reply)["a"].tolist() == [1, 1]
    other = live_reply()
    other.content = RecordDict({"metrics": MetricRecord({"loss": 6.0})})
    assert protocol.measured(other)["loss"] == 6


def test_a_live_reply_is_pickled_as_a_message_with_a_model_of_its_own():
    reply = live_reply()
    model = protocol.model_of(reply)
    copy = pickle.loads(pickle.dumps(reply))
    assert type(copy) is Message and protocol.sender(copy) == 7
    expected = {key: p.clone() for key, p in model.items()}
    for p in model.values():
        p.zero_()
    assert all(torch.equal(p, expected[key]) for key, p in protocol.model_of(copy).items())


def test_a_reply_that_is_kept_outlives_the_engines_memory():
    reply = live_reply()
    model = protocol.model_of(reply)
    expected, kept = {key: p.clone() for key, p in model.items()}, protocol.kept(reply)
    for p in model.values():
        p.zero_()
    assert all(torch.equal(p, expected[key]) for key, p in protocol.model_of(kept).items())
