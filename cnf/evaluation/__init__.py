"""Evaluation: metrics, diagnostics, the race, pictures and the report."""

from cnf.evaluation.comparison import CONTESTANTS, Contestant, Results, Stage, compare
from cnf.evaluation.metrics import METRICS

__all__ = [
    "CONTESTANTS",
    "METRICS",
    "CheckReport",
    "Contestant",
    "Results",
    "Stage",
    "check",
    "compare",
]
