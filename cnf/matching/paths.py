"""Probability paths: how noise and data are joined, and the velocity along the way."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from cnf.registry import Registry

PATHS = Registry("path")


class PathSample(NamedTuple):
    """A point of a conditional path.

    Attributes:
        t: Time, shape (*batch,).
        xt: Position, shape (*batch, *event).
        ut: Its velocity dxt/dt, of the same shape.
    """

    t: Tensor
    xt: Tensor
    ut: Tensor


class Path(ABC):
    """A family of curves from x0 (t = 0) to x1 (t = 1)."""

    @abstractmethod
    def sample(self, x0: Tensor, x1: Tensor, t: Tensor) -> PathSample:
        """Position and velocity at time t.

        Args:
            x0: Base samples, shape (*batch, *event).
            x1: Data, of the same shape.
            t: Times in [0, 1], shape (*batch,).
        """


@PATHS.register("linear")
@dataclass(frozen=True)
class Linear(Path):
    """xt = (1 - (1 - σ)t)·x0 + t·x1, ut = x1 - (1 - σ)·x0: the conditional OT path.

    Source: Lipman et al. (2023), https://arxiv.org/abs/2210.02747; Liu et al. (2023),
    https://arxiv.org/abs/2209.03003.

    Args:
        sigma_min: σ, the standard deviation left around x1 at t = 1.
    """

    sigma_min: float = 0.0

    def sample(self, x0: Tensor, x1: Tensor, t: Tensor) -> PathSample:
        ut = x1 - x0 if self.sigma_min == 0 else x1 - (1 - self.sigma_min) * x0
        xt = x0 + t.reshape(*t.shape, *[1] * (x0.dim() - t.dim())) * ut
        return PathSample(t, xt, ut)
