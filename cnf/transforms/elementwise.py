"""Elementwise maps (used by coupling and autoregressive layers) and elementwise transforms."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from cnf.registry import Registry
from cnf.transforms.base import TRANSFORMS, Transform

MAPS = Registry("elementwise map")


class ElementwiseMap(ABC):
    """An increasing function of one variable, given its (constrained) parameters.

    Attributes:
        size: Parameters per variable.
    """

    size: int

    @abstractmethod
    def forward(self, z: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """x and log dx/dz, both of z's shape; parameters: (*z.shape, size)."""

    @abstractmethod
    def inverse(self, x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """z and log dz/dx, both of x's shape; parameters: (*x.shape, size)."""


@MAPS.register("affine")
class Affine(ElementwiseMap):
    """x = z·exp(s) + m with parameters (m, s); log dx/dz = s."""

    size = 2

    def forward(self, z: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        shift, log_scale = parameters.unbind(-1)
        return z * log_scale.exp() + shift, log_scale

    def inverse(self, x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        shift, log_scale = parameters.unbind(-1)
        return (x - shift) * (-log_scale).exp(), -log_scale


def bounded_affine(raw: Tensor, bound: float = 3.0) -> Tensor:
    """Parametrisation of `Affine`: a tanh holds the log-scale within ±bound."""
    shift, log_scale = raw.unbind(-1)
    return torch.stack([shift, bound * torch.tanh(log_scale / bound)], -1)


@TRANSFORMS.register("standardise", example=lambda dim: Standardise((dim,)))
class Standardise(Transform):
    """x = z·scale + loc: the inverse gives data zero mean and unit variance; not trained.

    Until it is fitted it is the identity. `fit` sets it once; a second call changes nothing, so
    that training a flow again (fine-tuning) keeps the meaning of its weights.

    Args:
        event_shape: Shape of one x.
    """

    loc: Tensor
    scale: Tensor
    fitted: Tensor

    def __init__(self, event_shape: Sequence[int]) -> None:
        super().__init__(event_dims=len(event_shape))
        self.register_buffer("loc", torch.zeros(*event_shape))
        self.register_buffer("scale", torch.ones(*event_shape))
        self.register_buffer("fitted", torch.tensor(False))

    def fit(self, x: Tensor) -> None:
        """Set location and scale from data `x`, shape (N, *event), if they are not set yet."""
        if self.fitted:
            return
        scale = x.std(0) if len(x) > 1 else torch.ones_like(x[0])
        self.loc.copy_(x.mean(0))
        self.scale.copy_(torch.where(scale > 0, scale, 1.0))  # a constant column stays as it is
        self.fitted.fill_(True)

    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return z * self.scale + self.loc, self._ladj(z)

    def inverse(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return (x - self.loc) / self.scale, -self._ladj(x)

    def _ladj(self, value: Tensor) -> Tensor:
        return self.scale.log().sum().expand(value.shape[: value.dim() - self.event_dims])
