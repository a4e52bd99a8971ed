"""Distributions of the training times t, which also weight flow matching's loss over time.

Each is given by its quantile function, which maps uniform u in [0, 1) to t.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from cnf.errors import expect_positive
from cnf.registry import Registry

TIMES = Registry("time law")


@TIMES.register("uniform")
@dataclass(frozen=True)
class UniformTime:
    """The uniform distribution, t ~ U(0, 1)."""

    def __call__(self, u: Tensor) -> Tensor:
        return u


@TIMES.register("start")
@dataclass(frozen=True)
class StartTime:
    """All times t = 0, for distilling a straightened flow into one Euler step."""

    def __call__(self, u: Tensor) -> Tensor:
        return torch.zeros_like(u)


@TIMES.register("skewed")
@dataclass(frozen=True)
class SkewedTime:
    """The distribution of t = 1 - (1 - u)^exponent, with more times close to the data.

    There the field shapes the details of the density.

    Args:
        exponent: Above 0; above 1 for more times close to 1; 1 is uniform.
    """

    exponent: float = 1.5

    def __post_init__(self) -> None:
        expect_positive("SkewedTime", exponent=self.exponent)

    def __call__(self, u: Tensor) -> Tensor:
        return 1 - (1 - u) ** self.exponent


@TIMES.register("logit-normal")
@dataclass(frozen=True)
class LogitNormalTime:
    """The logit-normal distribution, logit(t) ~ N(mean, std²), with more times in the middle.

    Source: Esser et al. (2024), https://arxiv.org/abs/2403.03206.

    Args:
        mean: Above 0 for more times close to 1.
        std: Standard deviation, above 0; smaller for more times in the middle.
    """

    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        expect_positive("LogitNormalTime", std=self.std)

    def __call__(self, u: Tensor) -> Tensor:
        return torch.sigmoid(self.mean + self.std * torch.special.ndtri(u))
