"""Probability paths: how noise and data are joined, and the velocity along the way."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cnf.errors import expect_positive
from cnf.registry import Registry


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


class Schedule(NamedTuple):
    """xt = alpha·x1 + sigma·x0 + gamma·z with z ~ N(0, I), and each one's derivative in t.

    Tensors of t's shape, or numbers where they are constant.
    """

    alpha: Any
    sigma: Any
    d_alpha: Any
    d_sigma: Any
    gamma: Any = 0.0
    d_gamma: Any = 0.0

    def gaussian(self) -> "Schedule":
        """Of a standard normal x0: one sigma for it and the noise together, no gamma.

        Given x1, xt is N(alpha·x1, sigma²) whichever of the two its spread comes from.
        """
        if isinstance(self.gamma, float) and self.gamma == 0.0:
            return self
        sigma = (self.sigma**2 + self.gamma**2) ** 0.5
        slope = (self.sigma * self.d_sigma + self.gamma * self.d_gamma) / sigma
        return Schedule(self.alpha, sigma, self.d_alpha, slope)


class Path(ABC):
    """A family of curves from x0 (t = 0) to x1 (t = 1).

    Attributes:
        noisy: Whether xt has noise of its own, so that a curve is random between its ends.
        margin: How near t may come to (0, 1), where derivatives are infinite; nearer times are
            moved to it.
    """

    noisy: bool = False
    margin: tuple[float, float] = (0.0, 0.0)

    @abstractmethod
    def schedule(self, t: Tensor) -> Schedule:
        """Coefficients at t, inside the margin."""

    def over(self, t: Tensor, event_dims: int) -> Schedule:
        """The same, broadcasting over so many event dimensions."""
        return self.schedule(t.reshape(*t.shape, *[1] * event_dims) if t.dim() else t)

    def clipped(self, t: Tensor) -> Tensor:
        """The nearest times inside the margin."""
        low, high = self.margin
        return t if low == high == 0.0 else t.clamp(low, 1 - high)

    def sample(self, x0: Tensor, x1: Tensor, t: Tensor, noise: Tensor | None = None) -> PathSample:
        """Position and velocity at time t.

        Args:
            x0: Base samples, shape (*batch, *event).
            x1: Data, of the same shape.
            t: Times in [0, 1], shape (*batch,).
            noise: z ~ N(0, I), of x0's shape, for a noisy path; drawn if None.
        """
        t = self.clipped(t)
        at = self.over(t, x0.dim() - t.dim())
        xt = _combined(at.alpha, x1, at.sigma, x0)
        ut = _combined(at.d_alpha, x1, at.d_sigma, x0)
        if self.noisy:
            z = torch.randn_like(x0) if noise is None else noise
            xt, ut = _added(xt, at.gamma, z), _added(ut, at.d_gamma, z)
        return PathSample(t, xt, ut)


PATHS = Registry("path", Path)


@PATHS.register("linear")
@dataclass(frozen=True)
class Linear(Path):
    """xt = t·x1 + (1 - (1 - σ)t)·x0: the conditional OT path, and rectified flow's.

    Source: Lipman et al. (2023), https://arxiv.org/abs/2210.02747; Liu et al. (2023),
    https://arxiv.org/abs/2209.03003; with noise, Tong et al. (2024),
    https://arxiv.org/abs/2302.00482.

    Args:
        sigma_min: σ, the part of x0 left around x1 at t = 1.
        noise: Standard deviation of noise added all along the path, which ut does not see.
    """

    sigma_min: float = 0.0
    noise: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.sigma_min < 1 or self.noise < 0:
            raise ValueError(
                "Linear: expected 0 <= sigma_min < 1 and noise >= 0, got "
                f"{self.sigma_min} and {self.noise}"
            )

    @property
    def noisy(self) -> bool:
        return self.noise > 0

    def sample(self, x0: Tensor, x1: Tensor, t: Tensor, noise: Tensor | None = None) -> PathSample:
        """As of every path, in the few operations that a straight line takes."""
        end = torch.add(x1, x0, alpha=self.sigma_min) if self.sigma_min else x1
        at = t.reshape(*t.shape, *[1] * (x0.dim() - t.dim()))
        xt = torch.lerp(x0, end, at.to(x0.dtype))
        if self.noise:
            z = torch.randn_like(x0) if noise is None else noise
            xt = torch.add(xt, z, alpha=self.noise)
        return PathSample(t, xt, end - x0)

    def schedule(self, t: Tensor) -> Schedule:
        kept = 1 - self.sigma_min
        return Schedule(t, 1 - kept * t, 1.0, -kept, float(self.noise))


@PATHS.register("polynomial")
@dataclass(frozen=True)
class Polynomial(Path):
    """xt = tⁿ·x1 + (1 - tⁿ)·x0.

    Args:
        degree: n; above 1 the path stays longer with the noise.
    """

    degree: float = 2.0

    def __post_init__(self) -> None:
        if self.degree < 1:  # else the velocity is infinite at t = 0
            raise ValueError(f"Polynomial: expected degree >= 1, got {self.degree}")

    def schedule(self, t: Tensor) -> Schedule:
        power, slope = t**self.degree, self.degree * t ** (self.degree - 1)
        return Schedule(power, 1 - power, slope, -slope)


@PATHS.register("trigonometric")
@dataclass(frozen=True)
class Trigonometric(Path):
    """xt = sin(πt/2)·x1 + cos(πt/2)·x0: the variance is kept where both have the same.

    Source: Albergo & Vanden-Eijnden (2023), https://arxiv.org/abs/2209.15571.
    """

    def schedule(self, t: Tensor) -> Schedule:
        angle = 0.5 * math.pi * t
        sine, cosine = angle.sin(), angle.cos()
        return Schedule(sine, cosine, 0.5 * math.pi * cosine, -0.5 * math.pi * sine)


@PATHS.register("vp")
@dataclass(frozen=True)
class VariancePreserving(Path):
    """The variance-preserving diffusion, from t = 1 backwards: α = exp(-½∫β), σ² = 1 - α².

    β rises linearly over s = 1 - t; a little of x1 is left at t = 0, and near t = 1 the velocity
    is infinite.
    Source: Song et al. (2021), https://arxiv.org/abs/2011.13456.

    Args:
        beta_min: β at s = 0.
        beta_max: β at s = 1.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0
    margin = (0.0, 1e-4)

    def __post_init__(self) -> None:
        expect_positive("VariancePreserving", beta_min=self.beta_min, beta_max=self.beta_max)

    def schedule(self, t: Tensor) -> Schedule:
        s = 1 - t
        beta = self.beta_min + s * (self.beta_max - self.beta_min)
        integral = s * (self.beta_min + 0.5 * s * (self.beta_max - self.beta_min))
        alpha = torch.exp(-0.5 * integral)
        sigma = (-torch.expm1(-integral)).sqrt()
        return Schedule(alpha, sigma, 0.5 * beta * alpha, -0.5 * beta * alpha**2 / sigma)


@PATHS.register("cosine")
@dataclass(frozen=True)
class Cosine(Path):
    """α = cos(½π(s + o)/(1 + o)) over its value at s = 0, σ² = 1 - α², with s = 1 - t.

    Source: Nichol & Dhariwal (2021), https://arxiv.org/abs/2102.09672.

    Args:
        offset: o > 0, which keeps the least noise from being too little.
    """

    offset: float = 0.008
    margin = (0.0, 1e-4)

    def __post_init__(self) -> None:
        expect_positive("Cosine", offset=self.offset)

    def schedule(self, t: Tensor) -> Schedule:
        rate = 0.5 * math.pi / (1 + self.offset)
        start = rate * self.offset
        angle = rate * (1 - t + self.offset)
        alpha, slope = angle.cos() / math.cos(start), rate * angle.sin() / math.cos(start)
        # 1 - α² = sin(angle - start)·sin(angle + start) / cos²(start), without cancellation.
        sigma = ((angle - start).sin() * (angle + start).sin()).sqrt() / math.cos(start)
        return Schedule(alpha, sigma, slope, -alpha * slope / sigma)


@PATHS.register("interpolant")
@dataclass(frozen=True)
class Interpolant(Path):
    """A stochastic interpolant: t·x1 + (1 - t)·x0 + a·sin²(πt)·z.

    Source: Albergo, Boffi & Vanden-Eijnden (2023), https://arxiv.org/abs/2303.08797.

    Args:
        amplitude: a, the noise's standard deviation at t = ½.
    """

    amplitude: float = 1.0
    noisy = True

    def __post_init__(self) -> None:
        expect_positive("Interpolant", amplitude=self.amplitude)

    def schedule(self, t: Tensor) -> Schedule:
        gamma = self.amplitude * (math.pi * t).sin() ** 2
        slope = self.amplitude * math.pi * (2 * math.pi * t).sin()
        return Schedule(t, 1 - t, 1.0, -1.0, gamma, slope)


@PATHS.register("bridge")
@dataclass(frozen=True)
class Bridge(Path):
    """A Brownian bridge, t·x1 + (1 - t)·x0 + σ√(t(1 - t))·z: the Schrödinger bridge between
    entropic-OT pairs (the coupling "sinkhorn" with reg=2σ², relative=False).

    Source: Tong et al. (2024), [SF]²M, https://arxiv.org/abs/2307.03672.

    Args:
        sigma: σ of the Brownian motion.
    """

    sigma: float = 1.0
    noisy = True
    margin = (1e-3, 1e-3)

    def __post_init__(self) -> None:
        expect_positive("Bridge", sigma=self.sigma)

    def schedule(self, t: Tensor) -> Schedule:
        root = (t * (1 - t)).sqrt()
        slope = self.sigma * (1 - 2 * t) / (2 * root)
        return Schedule(t, 1 - t, 1.0, -1.0, self.sigma * root, slope)


def _combined(a: Any, x: Tensor, b: Any, y: Tensor) -> Tensor:
    """a·x + b·y in as few operations as there can be: a training step has many small ones."""
    return _added(x if isinstance(a, float) and a == 1.0 else a * x, b, y)


def _added(x: Tensor, b: Any, y: Tensor) -> Tensor:
    """x + b·y."""
    if not isinstance(b, float):
        return torch.addcmul(x, b, y)
    return x if b == 0.0 else torch.add(x, y, alpha=b)
