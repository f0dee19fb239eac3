"""How a network learns. Pure PyTorch: knows no client, no server, no Flower."""

from .backprop.approx import ApproxBackprop
from .backprop.checkpointed import CheckpointedBackprop
from .backprop.fused import FusedBackprop
from .backprop.selective import SelectiveBackprop
from .backprop.sgd import Backprop
from .blocks import NetworkError
from .equilibrium.equilibrium_propagation import EquilibriumPropagation
from .equilibrium.predictive_coding import PredictiveCoding
from .equilibrium.projection import Projection
from .feedback.dfa import DFA
from .feedback.drtp import DRTP
from .feedback.feedback_alignment import FeedbackAlignment
from .feedback.pepita import PEPITA
from .feedback.product_feedback_alignment import ProductFeedbackAlignment
from .feedback.sign_symmetry import SignSymmetry
from .feedback.target_projection import TargetProjection
from .layerwise.aug_local import AugLocal
from .layerwise.cascaded_forward import CascadedForward
from .layerwise.counter_current import CounterCurrent
from .layerwise.dgl import DGL
from .layerwise.forward_forward import ForwardForward
from .layerwise.infopro import InfoPro
from .layerwise.knowledge_accumulation import KnowledgeAccumulation
from .layerwise.layer_collaboration import LayerCollaboration
from .layerwise.mono_forward import MonoForward
from .layerwise.no_prop import NoProp
from .layerwise.no_prop_ct import NoPropCT
from .layerwise.no_prop_fm import NoPropFM
from .layerwise.predsim import PredSim
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
from .perturbation.neuron_swarm import NeuronSwarm
from .perturbation.sparse_evolution import SparseEvolution
from .perturbation.spsa import SPSA
from .perturbation.zo_adam import ZOAdam
from .perturbation.zo_conserve import ZOConserve
from .perturbation.zo_sign import ZOSign
from .rule import Batch, GradientRule, Rule, RuleError, State, Stats
from .scalar_rule import ScalarRule

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
        KnowledgeAccumulation,
        AugLocal,
        DGL,
        PredSim,
        InfoPro,
        NoProp,
        NoPropCT,
        NoPropFM,
        DFA,
        FeedbackAlignment,
        SignSymmetry,
        ProductFeedbackAlignment,
        PEPITA,
        DRTP,
        TargetProjection,
        PredictiveCoding,
        EquilibriumPropagation,
        Projection,
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
        NeuronSwarm,
    )
}

# Rules for a client that cannot afford its own, the best first: the exact gradient with less and less memory, then
# rules that come near it. All train the same parameters.
LADDER = ("backprop", "backprop-fused", "backprop-checkpointed", "dfa", "baffle")

__all__ = [
    "DFA",
    "DGL",
    "DRTP",
    "LADDER",
    "MODELS",
    "PEPITA",
    "RULES",
    "SPSA",
    "ApproxBackprop",
    "AugLocal",
    "Backprop",
    "Baffle",
    "Batch",
    "CascadedForward",
    "CheckpointedBackprop",
    "Consensus",
    "CounterCurrent",
    "EquilibriumPropagation",
    "Evolution",
    "FedKSeed",
    "FeedbackAlignment",
    "ForwardForward",
    "ForwardGradient",
    "FusedBackprop",
    "Genetic",
    "GradientRule",
    "InfoPro",
    "KnowledgeAccumulation",
    "LayerCollaboration",
    "LikelihoodRatio",
    "LocalForwardGradient",
    "MonoForward",
    "Network",
    "NetworkError",
    "NeuronSwarm",
    "NoProp",
    "NoPropCT",
    "NoPropFM",
    "PredSim",
    "PredictiveCoding",
    "ProductFeedbackAlignment",
    "Projection",
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
