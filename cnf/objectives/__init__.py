"""What is minimized: maximum likelihood, flow matching, both. They train the same flow."""

from cnf.objectives.base import OBJECTIVES, Batch, Loss, Objective
from cnf.objectives.joint import Joint
from cnf.objectives.likelihood import MaximumLikelihood
from cnf.objectives.matching import FlowMatching

__all__ = [
    "OBJECTIVES",
    "Batch",
    "FlowMatching",
    "Joint",
    "Loss",
    "MaximumLikelihood",
    "Objective",
]
