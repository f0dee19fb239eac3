"""How a network learns. Pure PyTorch: knows no client, no server, no Flower."""

from .backprop.sgd import Backprop
from .feedback.dfa import DFA
from .layerwise.forward_forward import ForwardForward
from .layerwise.mono_forward import MonoForward
from .models import MODELS
from .network import Network, NetworkError
from .perturbation.baffle import Baffle
from .rule import Batch, GradientRule, Rule, RuleError, ScalarRule, State, Stats

RULES: dict[str, type[Rule]] = {rule.name: rule for rule in (Backprop, ForwardForward, MonoForward, DFA, Baffle)}

__all__ = [
    "DFA",
    "MODELS",
    "RULES",
    "Backprop",
    "Baffle",
    "Batch",
    "ForwardForward",
    "GradientRule",
    "MonoForward",
    "Network",
    "NetworkError",
    "Rule",
    "RuleError",
    "ScalarRule",
    "State",
    "Stats",
]
