"""What is measured: of samples, of flows, with error bars, against evaluations of the field."""

from cnf.metrics.code_length import bits_per_dim, log_prob_of_draws
from cnf.metrics.distances import (
    c2st,
    energy_distance,
    mmd,
    sliced_wasserstein2,
    wasserstein1,
    wasserstein2,
    wasserstein2_floor,
)
from cnf.metrics.error_bars import LogProb, log_prob_with_error
from cnf.metrics.estimate import Estimate
from cnf.metrics.evidence import LogEvidence, log_evidence
from cnf.metrics.flows import (
    gap,
    log_prob_chunked,
    nfe,
    nll,
    normalized_path_energy,
    path_energy,
    round_trip_error,
    straightness,
)
from cnf.metrics.metric import METRICS, Evaluations, Metric, Score, Trial, metric
from cnf.metrics.nfe_curves import nfe_curve, nfe_table
from cnf.metrics.typicality import RowScores, row_scores

__all__ = [
    "METRICS",
    "Estimate",
    "Evaluations",
    "LogEvidence",
    "LogProb",
    "Metric",
    "RowScores",
    "Score",
    "Trial",
    "bits_per_dim",
    "c2st",
    "energy_distance",
    "gap",
    "log_evidence",
    "log_prob_chunked",
    "log_prob_of_draws",
    "log_prob_with_error",
    "metric",
    "mmd",
    "nfe",
    "nfe_curve",
    "nfe_table",
    "nll",
    "normalized_path_energy",
    "path_energy",
    "round_trip_error",
    "row_scores",
    "sliced_wasserstein2",
    "straightness",
    "wasserstein1",
    "wasserstein2",
    "wasserstein2_floor",
]
