"""How a network learns. Pure PyTorch: knows no client, no server, no Flower."""

from .backprop.approx import ApproxBackprop
from .backprop.checkpointed import CheckpointedBackprop
from .backprop.fused import FusedBackprop
from .backprop.selective import SelectiveBackprop
from .backprop.sgd import Backprop
from .blocks import NetworkError
from .feedback.dfa import DFA
from .layerwise.forward_forward import ForwardForward
from .layerwise.mono_forward import MonoForward
from .models import MODELS
from .network import Network
from .perturbation.baffle import Baffle
from .rule import Batch, GradientRule, Rule, RuleError, ScalarRule, State, Stats

RULES: dict[str, type[Rule]] = {
    rule.name: rule
    for rule in (
        Backprop,
        FusedBackprop,
        CheckpointedBackprop,
        SelectiveBackprop,
        ApproxBackprop,
        ForwardForward,
        MonoForward,
        DFA,
        Baffle,
    )
}

# Rules for a client that cannot afford its own, the best first: the exact gradient with less and less memory, then
# rules that come near it. All train the same parameters.
LADDER = ("backprop", "backprop-fused", "backprop-checkpointed", "dfa", "baffle")

__all__ = [
    "DFA",
    "LADDER",
    "MODELS",
    "RULES",
    "ApproxBackprop",
    "Backprop",
    "Baffle",
    "Batch",
    "CheckpointedBackprop",
    "ForwardForward",
    "FusedBackprop",
    "GradientRule",
    "MonoForward",
    "Network",
    "NetworkError",
    "Rule",
    "RuleError",
    "ScalarRule",
    "SelectiveBackprop",
    "State",
    "Stats",
]
