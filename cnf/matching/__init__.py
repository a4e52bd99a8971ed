"""Flow matching's choices: the path between two points, who is paired with whom, which times."""

from cnf.matching.couplings import COUPLINGS, Pairing
from cnf.matching.paths import PATHS, Linear, Path, PathSample, Schedule
from cnf.matching.semidiscrete import SemiDiscrete
from cnf.matching.times import TIMES

__all__ = [
    "COUPLINGS",
    "PATHS",
    "TIMES",
    "Linear",
    "Pairing",
    "Path",
    "PathSample",
    "Schedule",
    "SemiDiscrete",
]
