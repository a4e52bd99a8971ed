"""Continuous normalizing flows and flow matching in PyTorch, beside discrete flows.

>>> import cnf
>>> flow = cnf.models.build("cnf", dim=2)
>>> flow.log_prob(flow.sample(4)).shape
torch.Size([4])
"""

import importlib
from typing import Any

from cnf import (
    data,
    distributions,
    dynamics,
    fields,
    matching,
    models,
    nets,
    objectives,
    sampling,
    transforms,
)
from cnf.dynamics import Exact, Hutchinson, Solver
from cnf.errors import CheckpointError, DivergedError, SolverError
from cnf.flow import Flow
from cnf.objectives import Batch, FlowMatching, Loss, MaximumLikelihood

__version__ = "0.1.0"

_LAZY = {
    "TrainConfig": "cnf.training",
    "fit": "cnf.training",
    "load": "cnf.training",
    "save": "cnf.training",
    "check": "cnf.evaluation",
    "compare": "cnf.evaluation",
}

__all__ = [
    "Batch",
    "CheckpointError",
    "DivergedError",
    "Exact",
    "Flow",
    "FlowMatching",
    "Hutchinson",
    "Loss",
    "MaximumLikelihood",
    "Solver",
    "SolverError",
    "data",
    "distributions",
    "dynamics",
    "fields",
    "matching",
    "models",
    "nets",
    "objectives",
    "sampling",
    "transforms",
    *_LAZY,
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    if name in ("evaluation", "training"):
        return importlib.import_module(f"cnf.{name}")
    raise AttributeError(f"module 'cnf' has no attribute {name!r}")
