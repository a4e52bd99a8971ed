"""Evaluation: metrics, diagnostics, the race, pictures and the report."""

from cnf.evaluation.comparison import Results, compare
from cnf.evaluation.contestants import CONTESTANTS, Contestant, Stage
from cnf.evaluation.diagnostics import CheckReport, check
from cnf.evaluation.error_bars import LogProb, log_prob_with_error
from cnf.evaluation.few_steps import nfe_curve, nfe_table
from cnf.evaluation.metrics import METRICS

__all__ = [
    "CONTESTANTS",
    "METRICS",
    "CheckReport",
    "Contestant",
    "LogProb",
    "Results",
    "Stage",
    "check",
    "compare",
    "log_prob_with_error",
    "nfe_curve",
    "nfe_table",
]
