"""Fixed elementwise bijections onto a box, an interval or the positive numbers."""

import math
from abc import abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cnf.transforms.base import TRANSFORMS, Transform

EPS = torch.finfo(torch.float32).eps


class _Squashing(Transform):
    """A fixed elementwise bijection; subclasses define its value and log-slope.

    For an x outside of the support by more than rounding in float32, the log-determinant of the
    inverse is -inf, and so is the log-density. The ends of the support are clamped to its inside.
    """

    support: tuple[float, float]

    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x, log_slope = self._squash(z)
        return x.clamp(*self.support), _summed(log_slope, self.event_dims)

    def inverse(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        low, high = self.support
        outside = (x < low - EPS * abs(low)) | (x > high + EPS * abs(high))
        z, log_slope = self._stretch(x)
        log_slope = torch.where(outside, -math.inf, log_slope)
        return z, _summed(log_slope, self.event_dims)

    @abstractmethod
    def _squash(self, z: Tensor) -> tuple[Tensor, Tensor]: ...

    @abstractmethod
    def _stretch(self, x: Tensor) -> tuple[Tensor, Tensor]: ...


@TRANSFORMS.register("sigmoid", example=lambda dim: Sigmoid())
class Sigmoid(_Squashing):
    """x = low + (high - low)/(1 + e^-z), onto a box; its inverse is the logit.

    Args:
        low: Lower end of each interval.
        high: Upper end.
        event_dims: 1 for vectors, 3 for images.

    Attributes:
        spec: The name and options in `PREPROCESSING` by which it was built, or None.

    Raises:
        ValueError: The upper end is not above the lower one.
    """

    spec: dict[str, Any] | None = None

    def __init__(self, low: float = 0.0, high: float = 1.0, event_dims: int = 1) -> None:
        if not high > low:
            raise ValueError(f"Sigmoid: expected low < high, got {low} and {high}")
        super().__init__(event_dims)
        self.support, self.low, self.range = (low, high), low, high - low

    def extra_repr(self) -> str:
        return "from {:g} to {:g}".format(*self.support)

    def _squash(self, z: Tensor) -> tuple[Tensor, Tensor]:
        log_slope = math.log(self.range) - z - 2 * F.softplus(-z, threshold=40.0)
        return self.low + self.range * torch.sigmoid(z), log_slope

    def _stretch(self, x: Tensor) -> tuple[Tensor, Tensor]:
        least, eps = _smallest(x), torch.finfo(x.dtype).eps
        least = max(
            least, eps / 2 * abs(self.low) / self.range
        )  # the spacing of floats at x = low
        u = ((x - self.low) / self.range).clamp(least, 1 - eps / 2)
        below, above = u.log(), (-u).log1p()
        return below - above, -(below + above) - math.log(self.range)


@TRANSFORMS.register("tanh", example=lambda dim: Tanh())
class Tanh(_Squashing):
    """x = tanh z, onto the interval (-1, 1)."""

    support = -1.0, 1.0

    def _squash(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return torch.tanh(z), 2 * (math.log(2) - z - F.softplus(-2 * z))

    def _stretch(self, x: Tensor) -> tuple[Tensor, Tensor]:
        most = 1 - torch.finfo(x.dtype).eps / 2
        x = x.clamp(-most, most)
        return torch.atanh(x), -(-x).log1p() - x.log1p()


@TRANSFORMS.register("softplus", example=lambda dim: Softplus())
class Softplus(_Squashing):
    """x = log(1 + e^z), onto the positive numbers."""

    support = 0.0, math.inf

    def _squash(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return torch.logaddexp(z, torch.zeros_like(z)), F.logsigmoid(z)

    def _stretch(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.clamp(min=_smallest(x))
        log_slope = -(-torch.expm1(-x)).log()
        return x - log_slope, log_slope


def _smallest(like: Tensor) -> float:
    """The smallest positive x, below which gradients would overflow."""
    info = torch.finfo(like.dtype)
    return min(info.tiny / info.eps, info.eps)


def _summed(log_slope: Tensor, event_dims: int) -> Tensor:
    return log_slope.flatten(-event_dims).sum(-1)
