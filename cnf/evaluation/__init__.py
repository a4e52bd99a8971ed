"""Evaluation: metrics, diagnostics, the race, pictures and the report."""

from cnf.evaluation.comparison import Results, compare
from cnf.evaluation.contestants import CONTESTANTS, Contestant, Stage
from cnf.evaluation.diagnostics import CheckReport, check
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
