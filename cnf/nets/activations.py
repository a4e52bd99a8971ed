"""Elementwise nonlinearities and their derivatives."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cnf.registry import Registry


@dataclass(frozen=True)
class Activation:
    """An elementwise nonlinearity σ.

    Attributes:
        function: Function that returns σ(a).
        with_derivative: Function that returns σ(a) and σ'(a), which share computations; both are
            differentiable.
    """

    function: Callable[[Tensor], Tensor]
    with_derivative: Callable[[Tensor], tuple[Tensor, Tensor]]


def _silu(a: Tensor) -> tuple[Tensor, Tensor]:
    gate = torch.sigmoid(a)
    value = a * gate
    return value, gate * (1 + a - value)


def _tanh(a: Tensor) -> tuple[Tensor, Tensor]:
    value = torch.tanh(a)
    return value, 1 - value * value


def _softplus(a: Tensor) -> tuple[Tensor, Tensor]:
    return F.softplus(a), torch.sigmoid(a)


def _relu(a: Tensor) -> tuple[Tensor, Tensor]:
    return F.relu(a), (a > 0).to(a)


def _elu(a: Tensor) -> tuple[Tensor, Tensor]:
    return F.elu(a), torch.exp(a.clamp(max=0))


_SELU_SCALE, _SELU_ALPHA = 1.0507009873554805, 1.6732632423543772  # Klambauer et al. (2017)


def _selu(a: Tensor) -> tuple[Tensor, Tensor]:
    tail = _SELU_ALPHA * torch.exp(a.clamp(max=0))
    return F.selu(a), _SELU_SCALE * torch.where(a > 0, 1.0, tail)


ACTIVATIONS = Registry("activation")
for _name, _function, _with_derivative in (
    ("silu", F.silu, _silu),
    ("relu", F.relu, _relu),
    ("tanh", torch.tanh, _tanh),
    ("softplus", F.softplus, _softplus),
    ("elu", F.elu, _elu),
    ("selu", F.selu, _selu),
):
    ACTIVATIONS.register(_name)(Activation(_function, _with_derivative))
