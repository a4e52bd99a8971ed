"""What is minimised: maximum likelihood, flow matching, both. They train the same flow."""

from dataclasses import fields
from typing import Any

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
    "build",
]


def build(name: str, **options: Any) -> Objective:
    """Build a named objective.

    >>> build("maximum-likelihood", divergence="hutchinson").divergence
    'hutchinson'

    Args:
        name: A name in `OBJECTIVES`.
        options: Its fields.
    Raises:
        ValueError: An unknown name, or an option that the objective does not have.
    """
    kind = OBJECTIVES[name]
    known = [field.name for field in fields(kind)]
    for option in options:
        if option not in known:
            raise ValueError(f"{name}: unknown option {option!r}; known: {', '.join(known)}")
    return kind(**options)
