"""Where in time flow matching looks: the law of t, which is also a weighting of its loss.

Each law is its quantile function: a uniform u in, t out.
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
    """t ~ U(0, 1)."""

    def __call__(self, u: Tensor) -> Tensor:
        return u


@TIMES.register("start")
@dataclass(frozen=True)
class StartTime:
    """t = 0 always: what one Euler step uses, for distillation of straightened flows."""

    def __call__(self, u: Tensor) -> Tensor:
        return torch.zeros_like(u)


@TIMES.register("skewed")
@dataclass(frozen=True)
class SkewedTime:
    """t = 1 - (1 - u)^exponent: more times near the data, where a sharp density is made.

    Args:
        exponent: Above 1 for more times near 1; 1 is uniform.
    """

    exponent: float = 1.5

    def __post_init__(self) -> None:
        expect_positive("SkewedTime", exponent=self.exponent)

    def __call__(self, u: Tensor) -> Tensor:
        return 1 - (1 - u) ** self.exponent


@TIMES.register("logit-normal")
@dataclass(frozen=True)
class LogitNormalTime:
    """logit(t) ~ N(mean, std²): more times in the middle.

    Source: Esser et al. (2024), https://arxiv.org/abs/2403.03206.

    Args:
        mean: Above 0 for more times near 1.
        std: Spread.
    """

    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        expect_positive("LogitNormalTime", std=self.std)

    def __call__(self, u: Tensor) -> Tensor:
        return torch.sigmoid(self.mean + self.std * torch.special.ndtri(u))
