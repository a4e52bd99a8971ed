"""Transforms: bijections that return their value and log|det Jacobian| together."""

from cnf.transforms.autoregressive import Autoregressive
from cnf.transforms.base import TRANSFORMS, Compose, Identity, Inverse, Transform
from cnf.transforms.context import StandardizeContext
from cnf.transforms.continuous import Continuous, Integral
from cnf.transforms.coupling import Coupling
from cnf.transforms.elementwise import (
    MAPS,
    Additive,
    Affine,
    Elementwise,
    ElementwiseMap,
    Inverted,
    Scheme,
)
from cnf.transforms.image import CheckerboardCoupling, ConvCoupling, OnChannels, PerPixel, Squeeze
from cnf.transforms.linear import LU, Householder, Permutation, Rotation
from cnf.transforms.manifolds import UnitVectors, WrappedAngles
from cnf.transforms.mixture_maps import MixtureOfGaussians, MixtureOfLogistics
from cnf.transforms.normalization import ActNorm, BatchNorm
from cnf.transforms.planar import Planar, Radial, Sylvester
from cnf.transforms.preprocessing import (
    PREPROCESSING,
    Preprocessing,
    RadialGaussianization,
    Standardize,
    Whiten,
    logit,
)
from cnf.transforms.splines import CircularSpline, RationalQuadratic
from cnf.transforms.squashing import Sigmoid, Softplus, Tanh

__all__ = [
    "LU",
    "MAPS",
    "PREPROCESSING",
    "TRANSFORMS",
    "ActNorm",
    "Additive",
    "Affine",
    "Autoregressive",
    "BatchNorm",
    "CheckerboardCoupling",
    "CircularSpline",
    "Compose",
    "Continuous",
    "ConvCoupling",
    "Coupling",
    "Elementwise",
    "ElementwiseMap",
    "Householder",
    "Integral",
    "Inverse",
    "Inverted",
    "MixtureOfGaussians",
    "MixtureOfLogistics",
    "OnChannels",
    "PerPixel",
    "Identity",
    "Permutation",
    "Planar",
    "Preprocessing",
    "Radial",
    "RadialGaussianization",
    "RationalQuadratic",
    "Rotation",
    "Scheme",
    "Sigmoid",
    "Softplus",
    "Squeeze",
    "Standardize",
    "StandardizeContext",
    "Sylvester",
    "Tanh",
    "Transform",
    "UnitVectors",
    "Whiten",
    "WrappedAngles",
    "logit",
]
