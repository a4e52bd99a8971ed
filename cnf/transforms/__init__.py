"""Transforms: bijections that return their value and log|det Jacobian| together."""

from cnf.transforms.autoregressive import Autoregressive
from cnf.transforms.base import TRANSFORMS, Compose, Inverse, Transform
from cnf.transforms.continuous import Continuous, Integral
from cnf.transforms.coupling import Coupling
from cnf.transforms.elementwise import (
    MAPS,
    Additive,
    Affine,
    Elementwise,
    Inverted,
    Scheme,
    Sigmoid,
    Softplus,
    Tanh,
)
from cnf.transforms.normalisation import ActNorm, BatchNorm, Standardise
from cnf.transforms.splines import CircularSpline, RationalQuadratic

__all__ = [
    "MAPS",
    "TRANSFORMS",
    "ActNorm",
    "Additive",
    "Affine",
    "Autoregressive",
    "BatchNorm",
    "CircularSpline",
    "Compose",
    "Continuous",
    "Coupling",
    "Elementwise",
    "Integral",
    "Inverse",
    "Inverted",
    "RationalQuadratic",
    "Scheme",
    "Sigmoid",
    "Softplus",
    "Standardise",
    "Tanh",
    "Transform",
]
