"""The choices of flow matching: the path, the coupling, and the distribution of times."""

from cnf.matching.couplings import COUPLINGS, Pairing
from cnf.matching.paths import PATHS, Circular, Geodesic, Linear, Path, PathSample, Schedule
from cnf.matching.semidiscrete import SemiDiscrete
from cnf.matching.times import TIMES

__all__ = [
    "COUPLINGS",
    "PATHS",
    "TIMES",
    "Circular",
    "Geodesic",
    "Linear",
    "Pairing",
    "Path",
    "PathSample",
    "Schedule",
    "SemiDiscrete",
]
