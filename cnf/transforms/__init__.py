"""Transforms: bijections that return their value and log|det Jacobian| together."""

from cnf.transforms.base import TRANSFORMS, Compose, Inverse, Transform
from cnf.transforms.continuous import Continuous, Integral
from cnf.transforms.coupling import Coupling
from cnf.transforms.elementwise import Standardise

__all__ = [
    "TRANSFORMS",
    "Compose",
    "Continuous",
    "Coupling",
    "Integral",
    "Inverse",
    "Standardise",
    "Transform",
]
