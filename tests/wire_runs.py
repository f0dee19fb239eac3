"""A federation whose messages cross a wire: every one is pickled, and the nodes keep what they hold between rounds."""

import pickle

from fedforward import protocol
from fedforward.algorithms.replica import fingerprint
from fedforward.client import make_client_app
from fedforward.client.following import KEPT
from fedforward.server.rounds import seed_globals
from fedforward.simulations.engines.local import Nodes, assume_identity


class Federation:
    """A world's strategy and nodes; a round trains the nodes that are named, in that order.

    Args:
        world: of a rule that exchanges scalars.
        strategy: if not the world's.
    """

    def __init__(self, world, strategy=None):
        assume_identity()
        self.world, self.strategy = world, strategy or world.strategy()
        app = make_client_app(lambda context: world.client(int(context.node_config["partition-id"])))
        self.nodes = Nodes(app, world.experiment.clients, {})
        self.arrays, self.done = world.initial(), 0

    def offer(self, nodes):
        """Let the strategy sample all of these nodes."""
        self.offered = list(nodes)
        for name in ("min_train_nodes", "min_available_nodes", "min_evaluate_nodes"):
            setattr(self.strategy, name, len(self.offered))
        self.strategy.fraction_train = self.strategy.fraction_evaluate = 1.0

    def get_node_ids(self):
        return self.offered

    def ask(self, nodes, lr=0.01):
        """Return the messages of the next round, by node, as they cross the wire."""
        self.offer(nodes)
        self.done += 1
        e = self.world.experiment
        config = protocol.train_config(
            server_round=self.done, lr=lr, epochs=e.epochs, batch_size=e.batch_size, steps=e.local_steps, evaluate=False
        )
        seed_globals(0, self.done, 0)
        messages = self.strategy.configure_train(self.done, self.arrays, config, self)
        return dict(sorted((message.metadata.dst_node_id, self.carry(message)) for message in messages))

    def carry(self, message):
        """Return a message as it arrives: what crosses the wire and nothing else."""
        message.content = pickle.loads(pickle.dumps(protocol.sent(message)))
        message.__dict__.pop("sent", None)
        return message

    def answer(self, message):
        """Return a node's reply as it arrives."""
        reply = self.nodes.answer(message)
        if not reply.has_content():
            return reply
        reply.content = pickle.loads(pickle.dumps(reply.content))
        return reply

    def end(self, replies):
        """Aggregate what came, and return why each did not count, or None."""
        refused = [self.strategy.refuse(reply) for reply in replies]
        arrays, _ = self.strategy.aggregate_train(self.done, replies)
        self.arrays = self.arrays if arrays is None else arrays
        return refused

    def round(self, nodes, lr=0.01):
        """Train some nodes for one round; return the messages that they were sent."""
        messages = self.ask(nodes, lr)
        assert self.end([self.answer(message) for message in messages.values()]) == [None] * len(messages)
        return messages

    def bring(self, nodes):
        """Bring nodes to the server's model, as an evaluation does, and return the fingerprints of what they hold."""
        self.offer(nodes)
        messages = self.strategy.configure_evaluate(
            self.done, self.arrays, protocol.ConfigRecord({"server-round": self.done}), self
        )
        replies = [self.answer(self.carry(message)) for message in messages]
        assert all(reply.has_content() for reply in replies), [reply.error for reply in replies if reply.has_error()]
        self.strategy.aggregate_evaluate(self.done, replies)
        return [self.held(node) for node in nodes]

    def held(self, node):
        """Return the fingerprint of the model that a node holds."""
        state, replica = self.nodes.states[node], self.world.trainer.replica()
        at = state[f"{KEPT}-at"]
        replica.become(at["round"], protocol.decode_params(state[KEPT]), at["ledger"])
        return fingerprint(replica.current())

    def server(self):
        """Return the fingerprint of the server's model."""
        return fingerprint(protocol.params_of(self.arrays))
