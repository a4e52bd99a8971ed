"""Dynamics: solving ODEs, divergences along them, quantities integrated with them."""

from cnf.dynamics.divergence import DIVERGENCES, Divergence, Exact, Hutchinson
from cnf.dynamics.ode import Solver, record, solve
from cnf.dynamics.regularizers import REGULARIZERS

__all__ = [
    "DIVERGENCES",
    "REGULARIZERS",
    "Divergence",
    "Exact",
    "Hutchinson",
    "Solver",
    "record",
    "solve",
]
