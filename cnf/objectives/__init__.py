"""What is minimized: maximum likelihood, flow matching, reverse KL. They train the same flow."""

from cnf.objectives.base import OBJECTIVES, Loss, Objective
from cnf.objectives.batch import Batch
from cnf.objectives.flow_map import (
    FlowMapObjective,
    MeanFlow,
    SelfDistillation,
    Shortcut,
    TimedPairs,
)
from cnf.objectives.joint import Joint
from cnf.objectives.likelihood import LikelihoodRows, MaximumLikelihood
from cnf.objectives.matching import FlowMatching, MatchedPairs
from cnf.objectives.multiscale import MultiscaleMatching, ScalePairs
from cnf.objectives.variational import ImportanceWeighted, ReverseKL

__all__ = [
    "OBJECTIVES",
    "Batch",
    "FlowMapObjective",
    "FlowMatching",
    "ImportanceWeighted",
    "Joint",
    "LikelihoodRows",
    "Loss",
    "MatchedPairs",
    "MaximumLikelihood",
    "MeanFlow",
    "MultiscaleMatching",
    "Objective",
    "ReverseKL",
    "ScalePairs",
    "SelfDistillation",
    "Shortcut",
    "TimedPairs",
]
