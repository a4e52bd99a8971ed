"""Continuous normalizing flows and flow matching in PyTorch, beside discrete flows.

>>> import cnf
>>> flow = cnf.models.build("cnf", dim=2)
>>> flow.log_prob(flow.sample(4)).shape
torch.Size([4])
"""

import importlib
from typing import TYPE_CHECKING, Any

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
from cnf.objectives import Batch, FlowMatching, Loss, MaximumLikelihood, ReverseKL

if TYPE_CHECKING:  # at run time they are imported when they are first used, see `__getattr__`
    from cnf import checks, metrics, plotting, race, training
    from cnf.checks import check
    from cnf.race import compare
    from cnf.training import TrainConfig, fit, load, save

__version__ = "0.2.0"

_MODULES = ("checks", "metrics", "plotting", "race", "training")
_LAZY = {
    "TrainConfig": "cnf.training",
    "check": "cnf.checks",
    "compare": "cnf.race",
    "fit": "cnf.training",
    "load": "cnf.training",
    "save": "cnf.training",
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
    "ReverseKL",
    "Solver",
    "SolverError",
    "TrainConfig",
    "check",
    "checks",
    "compare",
    "data",
    "distributions",
    "dynamics",
    "fields",
    "fit",
    "load",
    "matching",
    "metrics",
    "models",
    "nets",
    "objectives",
    "plotting",
    "race",
    "sampling",
    "save",
    "training",
    "transforms",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"cnf.{name}")
    raise AttributeError(f"module 'cnf' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
