"""Probability paths: interpolations x_t between noise and data, and their velocities u_t."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cnf.errors import expect_positive, warn
from cnf.precision import widest
from cnf.registry import Registry


class PathSample(NamedTuple):
    """A position and velocity on a conditional path.

    Attributes:
        t: Time, shape (*batch,).
        xt: Position, shape (*batch, *event).
        ut: Its velocity dxt/dt, of the same shape.
    """

    t: Tensor
    xt: Tensor
    ut: Tensor


class Schedule(NamedTuple):
    """The coefficients of xt = alpha·x1 + sigma·x0 + gamma·z, z ~ N(0, I), at a time t.

    Each is a tensor of t's shape, or a number if it does not depend on t.

    Attributes:
        alpha: Coefficient of the data.
        sigma: Coefficient of the base sample.
        d_alpha: Derivative of alpha with respect to t.
        d_sigma: Derivative of sigma.
        gamma: Coefficient of the path's own noise.
        d_gamma: Derivative of gamma.
    """

    alpha: Any
    sigma: Any
    d_alpha: Any
    d_sigma: Any
    gamma: Any = 0.0
    d_gamma: Any = 0.0

    def gaussian(self) -> "Schedule":
        """The equivalent schedule without gamma, for a standard normal x0.

        The sum of sigma·x0 and gamma·z is normal with variance sigma² + gamma², so given x1 both
        schedules have the same marginals N(alpha·x1, sigma² + gamma²).
        """
        if isinstance(self.gamma, float) and self.gamma == 0.0:
            return self
        sigma = (self.sigma**2 + self.gamma**2) ** 0.5
        slope = (self.sigma * self.d_sigma + self.gamma * self.d_gamma) / sigma
        return Schedule(self.alpha, sigma, self.d_alpha, slope)


def check_path(path: "Path", device: torch.device | str = "cpu") -> None:
    """Refuse a path whose derivatives are not those of its coefficients; warn of its ends.

    Paths whose coefficients depend on the ends, too, such as geodesics, are not looked at.

    Args:
        path: The path.
        device: Where its coefficients are computed.

    Raises:
        ValueError: A derivative differs from the difference quotient by more than 0.1 %.
    """
    if not path.affine:
        return
    dtype = widest(torch.device(device))
    t = torch.linspace(0.1, 0.9, 5, dtype=dtype, device=device)
    step = 1e-5 if dtype == torch.float64 else 1e-2
    at, after, before = (_table(path, time) for time in (t, t + step, t - step))
    for name in ("alpha", "sigma", "gamma"):
        given, expected = at[f"d_{name}"], (after[name] - before[name]) / (2 * step)
        wrong = ~torch.isclose(given, expected, rtol=max(1e-3, step), atol=max(1e-4, step))
        if wrong.any():
            when, got, right = (float(v[wrong][0]) for v in (t, given, expected))
            raise ValueError(
                f"{path}: expected d_{name} to be the derivative of {name}, {right:.4g} at "
                f"t={when:.2g}, got {got:.4g}"
            )
    ends = _table(path, path.clipped(torch.tensor([0.0, 1.0], dtype=dtype, device=device)))
    begins, arrives = ends["alpha"].tolist()
    noise = torch.hypot(ends["sigma"], ends["gamma"])[0].item()
    if abs(begins) > 0.05 or abs(noise - 1) > 0.05 or abs(arrives - 1) > 0.05:
        warn(
            f"{path}: expected a path from the base sample to the data, alpha from 0 to 1 and "
            f"sigma 1 at t=0, got alpha from {begins:.3g} to {arrives:.3g} and sigma {noise:.3g}: "
            "what is trained does not carry the base to the data"
        )


@torch.no_grad()
def _table(path: "Path", t: Tensor) -> dict[str, Tensor]:
    """The path's coefficients by name, each of t's shape."""
    return {
        k: torch.as_tensor(v).to(t).expand(t.shape) for k, v in path.schedule(t)._asdict().items()
    }


class Path(ABC):
    """A family of curves from x0 (t = 0) to x1 (t = 1).

    Attributes:
        noisy: Whether xt has noise of its own (gamma is not zero), so that a curve is random
            between its ends.
        margin: The least distances of t from 0 and from 1, where a derivative is infinite; closer
            times are clamped.
        affine: Whether xt is a sum of x0 and x1 with coefficients that depend on t alone; else
            there is no `schedule`.
    """

    noisy: bool = False
    affine: bool = True
    margin: tuple[float, float] = (0.0, 0.0)

    @abstractmethod
    def schedule(self, t: Tensor) -> Schedule:
        """Coefficients at times t, of any shape, at least the margin away from 0 and 1."""

    def over(self, t: Tensor, event_dims: int) -> Schedule:
        """Coefficients in a shape that broadcasts with the points.

        Args:
            t: Times at least the margin away from 0 and 1, shape (*batch,).
            event_dims: Number of dimensions of an event, 1 for vectors and 3 for images.
        """
        return self.schedule(t.reshape(*t.shape, *[1] * event_dims) if t.dim() else t)

    def expect_end(self, who: str, what: str, x: Tensor) -> None:  # noqa: B027, most take any
        """Raise ValueError for points that the path cannot begin or end at.

        Args:
            who: Who asks, for messages.
            what: What they are, "base samples" or "data".
            x: Some of them, shape (N, *event).
        """

    def clipped(self, t: Tensor) -> Tensor:
        """Times t, clamped to at least the margin away from 0 and 1."""
        low, high = self.margin
        return t if low == high == 0.0 else t.clamp(low, 1 - high)

    def sample(self, x0: Tensor, x1: Tensor, t: Tensor, noise: Tensor | None = None) -> PathSample:
        """Position xt and velocity ut = dxt/dt at time t.

        Args:
            x0: Base samples, shape (*batch, *event).
            x1: Data, of the same shape.
            t: Times in [0, 1], shape (*batch,).
            noise: z ~ N(0, I), of x0's shape, for a noisy path; drawn if None.

        Returns:
            The clamped times, positions and velocities.
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
    """The conditional OT path of rectified flow, xt = t·x1 + (1 - (1 - σ)t)·x0.

    Source: Lipman et al. (2023), https://arxiv.org/abs/2210.02747; Liu et al. (2023),
    https://arxiv.org/abs/2209.03003; with noise, Tong et al. (2024),
    https://arxiv.org/abs/2302.00482.

    Args:
        sigma_min: σ in [0, 1), the coefficient of x0 at t = 1.
        noise: Standard deviation of noise that is added to xt at all times, and not to ut.

    Raises:
        ValueError: An argument is out of range.
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
        """Whether there is noise."""
        return self.noise > 0

    def sample(self, x0: Tensor, x1: Tensor, t: Tensor, noise: Tensor | None = None) -> PathSample:
        """Position and velocity, as `Path.sample`, in fewer operations for a straight line."""
        end = torch.add(x1, x0, alpha=self.sigma_min) if self.sigma_min else x1
        at = t.reshape(*t.shape, *[1] * (x0.dim() - t.dim()))
        xt = torch.lerp(x0, end, at.to(x0.dtype))
        if self.noise:
            z = torch.randn_like(x0) if noise is None else noise
            xt = torch.add(xt, z, alpha=self.noise)
        return PathSample(t, xt, end - x0)

    def schedule(self, t: Tensor) -> Schedule:
        rate = 1 - self.sigma_min
        return Schedule(t, 1 - rate * t, 1.0, -rate, float(self.noise))


@PATHS.register("polynomial")
@dataclass(frozen=True)
class Polynomial(Path):
    """The polynomial path xt = tⁿ·x1 + (1 - tⁿ)·x0.

    Args:
        degree: The power n, at least 1; above 1 the path stays close to x0 for longer.

    Raises:
        ValueError: The degree is below 1.
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
    """The trigonometric path xt = sin(πt/2)·x1 + cos(πt/2)·x0.

    It preserves the variance where x0 and x1 are independent and have the same one.

    Source: Albergo & Vanden-Eijnden (2023), https://arxiv.org/abs/2209.15571.
    """

    def schedule(self, t: Tensor) -> Schedule:
        angle = 0.5 * math.pi * t
        sine, cosine = angle.sin(), angle.cos()
        return Schedule(sine, cosine, 0.5 * math.pi * cosine, -0.5 * math.pi * sine)


@PATHS.register("vp")
@dataclass(frozen=True)
class VariancePreserving(Path):
    """The variance-preserving diffusion in reverse time: α = exp(-½∫β), σ² = 1 - α².

    β increases linearly in the diffusion time s = 1 - t. At t = 0 alpha is small but not zero,
    and the velocity is infinite at t = 1.

    Source: Song et al. (2021), https://arxiv.org/abs/2011.13456.

    Args:
        beta_min: β at s = 0, above 0.
        beta_max: β at s = 1, above 0.
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
    """The cosine schedule α = cos(½π(s + o)/(1 + o))/cos(½πo/(1 + o)), σ² = 1 - α², s = 1 - t.

    Source: Nichol & Dhariwal (2021), https://arxiv.org/abs/2102.09672.

    Args:
        offset: o above 0, which keeps the noise close to the data from becoming too small.
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
    """The stochastic interpolant xt = t·x1 + (1 - t)·x0 + a·sin²(πt)·z.

    Source: Albergo, Boffi & Vanden-Eijnden (2023), https://arxiv.org/abs/2303.08797.

    Args:
        amplitude: a above 0, the standard deviation of the noise at t = ½.
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
    """The Brownian bridge xt = t·x1 + (1 - t)·x0 + σ√(t(1 - t))·z.

    Between pairs of the coupling "sinkhorn" with reg=2σ² and relative=False it is a Schrödinger
    bridge.

    Source: Tong et al. (2024), [SF]²M, https://arxiv.org/abs/2307.03672.

    Args:
        sigma: σ above 0 of the Brownian motion.
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


@PATHS.register("geodesic")
@dataclass(frozen=True)
class Geodesic(Path):
    r"""The shortest path on the unit sphere, with constant speed θ, the angle between x0 and x1.

    With the unit tangent u at x0 towards x1, which is where the logarithm of x1 points,

    .. math:: x_t = \cos(tθ)\,x_0 + \sin(tθ)\,u, \quad
        u_t = θ\,(\cos(tθ)\,u - \sin(tθ)\,x_0).

    Of the shortest paths between antipodes, which have probability 0, one is taken.

    Source: Chen & Lipman (2024), https://arxiv.org/abs/2302.03660.
    """

    affine = False

    def schedule(self, t: Tensor) -> Schedule:
        """Raise TypeError, as the coefficients depend on the ends, too."""
        raise TypeError(_no_schedule("Geodesic"))

    def expect_end(self, who: str, what: str, x: Tensor) -> None:
        length = x.flatten(1).norm(dim=1)
        if not torch.allclose(length, torch.ones_like(length), atol=1e-3):
            raise ValueError(
                f"{who}: expected {what} of length 1 for a path on the sphere, got lengths from "
                f"{length.min():.3g} to {length.max():.3g}; build the flow by cnf.models.sphere() "
                "and give it x / x.norm(dim=1, keepdim=True)"
            )

    def sample(self, x0: Tensor, x1: Tensor, t: Tensor, noise: Tensor | None = None) -> PathSample:
        """Position and velocity, as `Path.sample`.

        Args:
            x0: Base samples of length 1, shape (*batch, *event).
            x1: Data of length 1, of the same shape.
            t: Times in [0, 1], shape (*batch,).
            noise: Not used.
        """
        start, end = (x.reshape(*t.shape, -1) for x in (x0, x1))
        cosine = (start * end).sum(-1, keepdim=True)
        across = end - cosine * start
        sine = across.norm(dim=-1, keepdim=True)
        least = 64 * torch.finfo(x0.dtype).eps  # below it, the direction is that of rounding
        tangent = torch.where(sine > least, across / sine.clamp(min=least), _orthogonal(start))
        angle = torch.atan2(sine, cosine)
        turn = t.unsqueeze(-1).to(x0.dtype) * angle
        xt = turn.cos() * start + turn.sin() * tangent
        ut = angle * (turn.cos() * tangent - turn.sin() * start)
        return PathSample(t, xt.reshape(x0.shape), ut.reshape(x0.shape))


@PATHS.register("circular")
@dataclass(frozen=True)
class Circular(Path):
    r"""The shortest path on a torus of angles, each of which goes the shorter way around.

    .. math:: x_t = x_0 + t\,u_t, \quad u_t = (x_1 - x_0 + p/2) \bmod p - p/2

    It ends at x1 up to multiples of the period p.

    Source: Chen & Lipman (2024), https://arxiv.org/abs/2302.03660.

    Args:
        period: p, the length of each circle.

    Raises:
        ValueError: The period is not positive.
    """

    period: float = 2 * math.pi
    affine = False

    def __post_init__(self) -> None:
        expect_positive("Circular", period=self.period)

    def schedule(self, t: Tensor) -> Schedule:
        """Raise TypeError, as the coefficients depend on the ends, too."""
        raise TypeError(_no_schedule("Circular"))

    def sample(self, x0: Tensor, x1: Tensor, t: Tensor, noise: Tensor | None = None) -> PathSample:
        """Position and velocity, as `Path.sample`; the position may leave [-p/2, p/2)."""
        ut = wrapped_angle(x1 - x0, self.period)
        at = t.reshape(*t.shape, *[1] * (x0.dim() - t.dim())).to(x0.dtype)
        return PathSample(t, torch.addcmul(x0, at, ut), ut)


def wrapped_angle(angle: Tensor, period: float) -> Tensor:
    """The angle in [-period/2, period/2) that differs by a multiple of the period.

    Args:
        angle: Angles, of any shape.
        period: Length of the circle.
    """
    return torch.remainder(angle + period / 2, period) - period / 2


def _orthogonal(x: Tensor) -> Tensor:
    """A unit vector orthogonal to each unit vector, shape (*, D): of an axis far from it."""
    axis = torch.zeros_like(x).scatter(-1, x.abs().argmin(-1, keepdim=True), 1.0)
    across = axis - (axis * x).sum(-1, keepdim=True) * x
    return across / across.norm(dim=-1, keepdim=True)


def _no_schedule(name: str) -> str:
    return (
        f"{name}: the coefficients of this path depend on its ends and not on t alone, so that "
        "data, noise and scores do not follow from the velocity; train the velocity itself"
    )


def _combined(a: Any, x: Tensor, b: Any, y: Tensor) -> Tensor:
    """The sum a·x + b·y in few operations, as a training step is bound by their number."""
    return _added(x if isinstance(a, float) and a == 1.0 else a * x, b, y)


def _added(x: Tensor, b: Any, y: Tensor) -> Tensor:
    """The sum x + b·y in one operation, or none where b is 0."""
    if not isinstance(b, float):
        return torch.addcmul(x, b, y)
    return x if b == 0.0 else torch.add(x, y, alpha=b)
