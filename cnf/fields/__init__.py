"""Vector fields: v(t, x, context), always a velocity."""

from cnf.fields.base import FIELDS, Adapter, HasDivergence, VectorField, exact_divergence
from cnf.fields.concat import LAYERS
from cnf.fields.conv import ConvField
from cnf.fields.mlp import MLPField
from cnf.fields.potential import PotentialField
from cnf.fields.residual import ResidualField
from cnf.fields.wrappers import EndTime, Piecewise, Preconditioned

__all__ = [
    "FIELDS",
    "LAYERS",
    "Adapter",
    "ConvField",
    "EndTime",
    "HasDivergence",
    "MLPField",
    "Piecewise",
    "PotentialField",
    "Preconditioned",
    "ResidualField",
    "VectorField",
    "exact_divergence",
]
