"""Dynamics: solving ODEs, divergences along them, quantities integrated with them."""

from cnf.dynamics.divergence import DIVERGENCES, Divergence, Exact, Hutchinson, Learned, explain
from cnf.dynamics.monitor import record
from cnf.dynamics.ode import solve
from cnf.dynamics.regularizers import REGULARIZERS
from cnf.dynamics.solver import Solver

__all__ = [
    "DIVERGENCES",
    "REGULARIZERS",
    "Divergence",
    "Exact",
    "Hutchinson",
    "Learned",
    "Solver",
    "explain",
    "record",
    "solve",
]
