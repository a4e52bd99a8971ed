"""Vector fields: v(t, x, context), always a velocity."""

from cnf.fields.base import (
    FIELDS,
    Adapter,
    HasDivergence,
    HasTangents,
    VectorField,
    exact_divergence,
)
from cnf.fields.concat import LAYERS
from cnf.fields.conv import ConvField
from cnf.fields.diffusers import DiffusersField
from cnf.fields.divisive import DivisiveField
from cnf.fields.flow_map import FlowMap
from cnf.fields.guidance import Guided, NullContext
from cnf.fields.mlp import MLPField
from cnf.fields.potential import PotentialField
from cnf.fields.predicts import Predicts, WithScore, converted, score
from cnf.fields.residual import ResidualField
from cnf.fields.sphere import OnSphere
from cnf.fields.unet import UNetField
from cnf.fields.wrappers import EndTime, Piecewise, Preconditioned

__all__ = [
    "FIELDS",
    "LAYERS",
    "Adapter",
    "ConvField",
    "DiffusersField",
    "DivisiveField",
    "EndTime",
    "FlowMap",
    "Guided",
    "HasDivergence",
    "HasTangents",
    "MLPField",
    "NullContext",
    "OnSphere",
    "Piecewise",
    "PotentialField",
    "Preconditioned",
    "Predicts",
    "ResidualField",
    "UNetField",
    "VectorField",
    "WithScore",
    "converted",
    "exact_divergence",
    "score",
]
