"""Vector fields: v(t, x, context), always a velocity."""

from cnf.fields.base import FIELDS, Adapter, HasDivergence, VectorField
from cnf.fields.mlp import MLPField

__all__ = ["FIELDS", "Adapter", "HasDivergence", "MLPField", "VectorField"]
