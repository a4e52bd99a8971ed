"""What is minimized: maximum likelihood, flow matching, both. They train the same flow."""

from cnf.objectives.base import OBJECTIVES, Loss, Objective
from cnf.objectives.batch import Batch
from cnf.objectives.joint import Joint
from cnf.objectives.likelihood import LikelihoodRows, MaximumLikelihood
from cnf.objectives.matching import FlowMatching, MatchedPairs

__all__ = [
    "OBJECTIVES",
    "Batch",
    "FlowMatching",
    "Joint",
    "LikelihoodRows",
    "Loss",
    "MatchedPairs",
    "MaximumLikelihood",
    "Objective",
]
