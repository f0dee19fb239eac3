"""How a network learns. Pure PyTorch: knows no client, no server, no Flower."""

from .backprop.approx import ApproxBackprop
from .backprop.checkpointed import CheckpointedBackprop
from .backprop.fused import FusedBackprop
from .backprop.selective import SelectiveBackprop
from .backprop.sgd import Backprop
from .blocks import NetworkError
from .equilibrium.predictive_coding import PredictiveCoding
from .feedback.dfa import DFA
from .feedback.drtp import DRTP
from .feedback.feedback_alignment import FeedbackAlignment
from .feedback.pepita import PEPITA
from .feedback.product_feedback_alignment import ProductFeedbackAlignment
from .feedback.sign_symmetry import SignSymmetry
from .feedback.target_projection import TargetProjection
from .layerwise.cascaded_forward import CascadedForward
from .layerwise.counter_current import CounterCurrent
from .layerwise.forward_forward import ForwardForward
from .layerwise.layer_collaboration import LayerCollaboration
from .layerwise.mono_forward import MonoForward
from .models import MODELS
from .network import Network
from .perturbation.baffle import Baffle
from .perturbation.consensus import Consensus
from .perturbation.evolution import Evolution
from .perturbation.fedkseed import FedKSeed
from .perturbation.forward_gradient import ForwardGradient
from .perturbation.genetic import Genetic
from .perturbation.likelihood_ratio import LikelihoodRatio
from .perturbation.local_forward_gradient import LocalForwardGradient
from .perturbation.sparse_evolution import SparseEvolution
from .perturbation.spsa import SPSA
from .perturbation.zo_adam import ZOAdam
from .perturbation.zo_conserve import ZOConserve
from .perturbation.zo_sign import ZOSign
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
        LayerCollaboration,
        MonoForward,
        CascadedForward,
        CounterCurrent,
        DFA,
        FeedbackAlignment,
        SignSymmetry,
        ProductFeedbackAlignment,
        PEPITA,
        DRTP,
        TargetProjection,
        PredictiveCoding,
        Baffle,
        SPSA,
        ZOSign,
        ZOConserve,
        ZOAdam,
        FedKSeed,
        ForwardGradient,
        Evolution,
        SparseEvolution,
        Genetic,
        Consensus,
        LocalForwardGradient,
        LikelihoodRatio,
    )
}

# Rules for a client that cannot afford its own, the best first: the exact gradient with less and less memory, then
# rules that come near it. All train the same parameters.
LADDER = ("backprop", "backprop-fused", "backprop-checkpointed", "dfa", "baffle")

__all__ = [
    "DFA",
    "DRTP",
    "LADDER",
    "MODELS",
    "PEPITA",
    "RULES",
    "SPSA",
    "ApproxBackprop",
    "Backprop",
    "Baffle",
    "Batch",
    "CascadedForward",
    "CheckpointedBackprop",
    "Consensus",
    "CounterCurrent",
    "Evolution",
    "FedKSeed",
    "FeedbackAlignment",
    "ForwardForward",
    "ForwardGradient",
    "FusedBackprop",
    "Genetic",
    "GradientRule",
    "LayerCollaboration",
    "LikelihoodRatio",
    "LocalForwardGradient",
    "MonoForward",
    "Network",
    "NetworkError",
    "PredictiveCoding",
    "ProductFeedbackAlignment",
    "Rule",
    "RuleError",
    "ScalarRule",
    "SelectiveBackprop",
    "SignSymmetry",
    "SparseEvolution",
    "State",
    "Stats",
    "TargetProjection",
    "ZOAdam",
    "ZOConserve",
    "ZOSign",
]
