"""Small networks: MLPs, MADE, residual convolutions, and the features that they are given."""

from cnf.nets.activations import ACTIVATIONS, Activation
from cnf.nets.attention import attention_kernel
from cnf.nets.conv import ResidualConvNet
from cnf.nets.features import Condition, TimeFeatures, on_circle
from cnf.nets.made import MADE, MaskedLinear, running_rms
from cnf.nets.mlp import MLP, linear_of_columns, linear_sizes, zero_

__all__ = [
    "ACTIVATIONS",
    "MADE",
    "MLP",
    "Activation",
    "Condition",
    "MaskedLinear",
    "ResidualConvNet",
    "TimeFeatures",
    "attention_kernel",
    "linear_of_columns",
    "linear_sizes",
    "on_circle",
    "running_rms",
    "zero_",
]
