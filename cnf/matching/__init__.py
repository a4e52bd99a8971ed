"""Flow matching's two choices: the path between a pair of points, and who is paired with whom."""

from cnf.matching.couplings import COUPLINGS, Pairing
from cnf.matching.paths import PATHS, Linear, Path, PathSample

__all__ = ["COUPLINGS", "PATHS", "Linear", "Pairing", "Path", "PathSample"]
