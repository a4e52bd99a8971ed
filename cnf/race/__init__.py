"""The race: contestants on the same data with the same budget, their scores, verdict and page."""

from cnf.race.compare import compare
from cnf.race.contestants import CONTESTANTS, Contestant, Stage
from cnf.race.results import Entry, Results

__all__ = ["CONTESTANTS", "Contestant", "Entry", "Results", "Stage", "compare"]
