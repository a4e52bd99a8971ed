"""Base distributions: normal, mixtures, uniform, torch distributions, toys and points."""

import copy
import importlib
import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import (
    Distribution,
    Independent,
    MixtureSameFamily,
    TransformedDistribution,
    constraints,
)

from cnf.data.arrays import as_numbers, is_rows
from cnf.errors import (
    expect_counts,
    expect_event,
    expect_finite,
    expect_shape,
)
from cnf.expectation_maximization import Mixture, fitted_mixture, log_densities
from cnf.printing import named, shaped
from cnf.random import device_of, draw, preserved, reseed

LOG_2PI = math.log(2 * math.pi)
SURFACES = tuple(  # supports with fewer dimensions than a sample has numbers
    type(constraint)
    for constraint in (
        constraints.simplex, constraints.corr_cholesky, constraints.lower_triangular,
        constraints.lower_cholesky, constraints.symmetric, constraints.positive_semidefinite,
        constraints.positive_definite,
    )
)  # fmt: skip


class Base(nn.Module, ABC):
    """The base distribution of a flow.

    Args:
        event_shape: Shape of a sample z; D is (D,).

    Attributes:
        event_shape: Shape of a sample z.
        has_density: Whether there is a `log_prob`.
    """

    has_density = True
    _like: Tensor  # follows the module's dtype and device

    def __init__(self, event_shape: int | Sequence[int]) -> None:
        super().__init__()
        self.event_shape = expect_shape(type(self).__name__, event_shape, "event_shape")
        self.register_buffer("_like", torch.empty(0), persistent=False)

    @property
    def support(self) -> str:
        """A description of where the density is above 0."""
        return "everywhere"

    @abstractmethod
    def log_prob(self, z: Tensor) -> Tensor:
        """Log-density in nats, shape (*batch,), at z of shape (*batch, *event_shape)."""

    @abstractmethod
    def sample(
        self, sample_shape: Sequence[int] = (), generator: torch.Generator | None = None
    ) -> Tensor:
        """Draw independent samples, shape (*sample_shape, *event_shape).

        Args:
            sample_shape: Shape of the batch of samples; an int n is (n,).
            generator: Source of the draws; None for torch's global one.

        Returns:
            Samples in the dtype and on the device of the module.
        """

    def extra_repr(self) -> str:
        """The text in the parentheses of `repr`."""
        return shaped(self.event_shape)

    def __repr__(self) -> str:
        return named(self, self.extra_repr())

    def _drawn(
        self,
        sampler: Callable[..., Tensor],
        shape: Sequence[int],
        generator: torch.Generator | None,
    ) -> Tensor:
        """Draw by `torch.randn` or `torch.rand` on the generator's device, and move the result."""
        return draw(sampler, shape, generator, like=self._like)


class StandardNormal(Base):
    """The standard normal distribution N(0, I).

    >>> StandardNormal((2,)).log_prob(torch.zeros(2)).item()      # -log 2π
    -1.8378770351409912
    """

    def log_prob(self, z: Tensor) -> Tensor:
        dims = len(self.event_shape)
        squares = (z * z).flatten(-dims).sum(-1)
        return -0.5 * (squares + math.prod(self.event_shape) * LOG_2PI)

    def sample(
        self, sample_shape: Sequence[int] = (), generator: torch.Generator | None = None
    ) -> Tensor:
        return self._drawn(
            torch.randn, (*expect_shape("sample", sample_shape), *self.event_shape), generator
        )


class StandardLogistic(Base):
    """D independent logistic variables of mean 0 and scale 1, of variance π²/3.

    Source: Dinh et al. (2014), NICE, https://arxiv.org/abs/1410.8516.

    >>> StandardLogistic((2,)).log_prob(torch.zeros(2)).item()      # -2 log 4
    -2.7725887298583984
    """

    def log_prob(self, z: Tensor) -> Tensor:
        # not by logsigmoid, whose second derivative has no vmap; above 40, log(1 + exp(z)) is z
        each = -z - 2 * F.softplus(-z, threshold=40.0)
        return each.flatten(-len(self.event_shape)).sum(-1)

    def sample(
        self, sample_shape: Sequence[int] = (), generator: torch.Generator | None = None
    ) -> Tensor:
        u = self._drawn(
            torch.rand, (*expect_shape("sample", sample_shape), *self.event_shape), generator
        )
        return u.logit(eps=torch.finfo(u.dtype).eps / 2)  # rounding may reach the ends


class FromTorch(Base):
    """A `torch.distributions.Distribution`, with its batch dimensions as part of the event.

    Its parameters do not move with the module: they must have the dtype and device of the flow.

    Args:
        distribution: The distribution.
    """

    def __init__(self, distribution: Distribution) -> None:
        if distribution.batch_shape:
            distribution = Independent(distribution, len(distribution.batch_shape))
        super().__init__(distribution.event_shape)
        self.distribution = distribution
        self.density = _zero_outside(distribution)

    @property
    def support(self) -> str:
        return str(_innermost(self.distribution.support))

    def log_prob(self, z: Tensor) -> Tensor:
        return self.density.log_prob(z)

    def sample(
        self, sample_shape: Sequence[int] = (), generator: torch.Generator | None = None
    ) -> Tensor:
        shape = torch.Size(expect_shape("sample", sample_shape))
        if generator is None:
            return self.distribution.sample(shape)
        # torch.distributions draw from the global generators only.
        where = device_of(generator)
        seed = torch.randint(2**62, (), generator=generator, device=where).item()
        device = self._device()
        with preserved(device):
            reseed(int(seed), device)
            return self.distribution.sample(shape)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.distribution}"

    def _device(self) -> torch.device:
        """The device of its samples, which is that of an empty sample."""
        if not torch.cuda.is_initialized() and not torch.backends.mps.is_available():
            return torch.device("cpu")
        return self.distribution.sample(torch.Size((0,))).device


def _innermost(support: Any) -> Any:
    """The constraint on each number or vector."""
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    return support


def expect_volume(distribution: Distribution, who: str = "Flow", what: str = "base") -> None:
    """Raise ValueError unless a torch distribution has a density on the space of its samples.

    Args:
        distribution: The distribution.
        who: Whose argument it is, for messages.
        what: Its role, "base" or "data".

    Raises:
        ValueError: It is discrete, or on a surface, like a Dirichlet distribution.
    """
    part = distribution
    while (inner := getattr(part, "base_dist", None)) is not None:  # transforms hide its support
        part = inner
    name = type(part).__name__
    for one in (distribution, part):
        try:
            support = _innermost(one.support)
        except NotImplementedError:  # torch does not know its support, as of some transforms
            continue
        if getattr(support, "is_discrete", False):
            raise ValueError(
                f"{who}: expected {what} to be continuous, got a {name}, which is discrete; "
                + ("take None, the standard normal" if what == "base" else "add noise")
                + ", or a dequantization of discrete data"
            )
        if isinstance(support, SURFACES):
            raise ValueError(
                f"{who}: expected {what} to fill the space, got a {name} on {support}, which has "
                "fewer dimensions than its draws have numbers; "
                + ("take None, the standard normal" if what == "base" else "leave one out")
            )


class _ZeroOutside(Distribution):
    """A distribution with a log-density of -inf outside of its support, instead of an error.

    Points outside are replaced by one inside, where the gradient is finite, and masked.
    """

    def __init__(self, inner: Distribution) -> None:
        self.inner = inner
        super().__init__(inner.batch_shape, inner.event_shape, validate_args=False)

    @property
    def support(self) -> constraints.Constraint | None:
        return self.inner.support

    def log_prob(self, value: Tensor) -> Tensor:
        support, dims = self.inner.support, len(self.event_shape)
        unbounded = torch.distributions.biject_to(support)
        shape = unbounded.inverse_shape((*self.batch_shape, *self.event_shape))
        point = unbounded(value.new_zeros(shape)).detach()

        def at(rows: Tensor) -> Tensor:
            each = rows.reshape([*rows.shape, *[1] * dims])
            return self.inner.log_prob(torch.where(each, value, point))

        inside = support.check(value)  # pyright: ignore
        found = torch.where(inside, at(inside), -torch.inf)
        missing = value.isnan().flatten(value.dim() - dims).any(-1) if dims else value.isnan()
        found = torch.where(missing, torch.nan, found)
        if not found.requires_grad:
            return found
        known = found.detach()
        smooth = known.isfinite()  # at the support's end the gradient of log 0 is NaN
        return torch.where(smooth, at(smooth), known)


def _zero_outside(distribution: Distribution) -> Distribution:
    """A distribution with the same `log_prob`, but -inf outside of its, or its parts', support."""
    if isinstance(distribution, Independent):
        inner, dims = distribution.base_dist, distribution.reinterpreted_batch_ndims
        return Independent(_zero_outside(inner), dims, validate_args=False)
    if isinstance(distribution, MixtureSameFamily):
        parts = _zero_outside(distribution.component_distribution)
        return MixtureSameFamily(distribution.mixture_distribution, parts, validate_args=False)
    try:
        torch.distributions.biject_to(distribution.support)
    except NotImplementedError:  # a support that torch does not know, or none
        return distribution
    if isinstance(distribution, TransformedDistribution):
        distribution = copy.copy(distribution)
        distribution.base_dist = _zero_outside(distribution.base_dist)
        distribution._validate_args = False
    return _ZeroOutside(distribution)


class FromDensity(Base):
    """A density with `dim`, `sample(n, generator)` and `log_prob`, such as a toy, as a base.

    Args:
        density: The density.
    """

    def __init__(self, density: Any) -> None:
        super().__init__((density.dim,))
        self.density = density

    @property
    def support(self) -> str:
        return f"that of {self.density!r}"

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.density}"

    def log_prob(self, z: Tensor) -> Tensor:
        return self.density.log_prob(z)

    def sample(
        self, sample_shape: Sequence[int] = (), generator: torch.Generator | None = None
    ) -> Tensor:
        shape = expect_shape("sample", sample_shape)
        drawn = self.density.sample(math.prod(shape), generator)
        return drawn.reshape(*shape, *self.event_shape).to(self._like)


class GaussianMixture(Base):
    """A mixture of K Gaussians with diagonal or full covariances.

    >>> means = torch.tensor([[-2.0, 0.0], [2.0, 0.0]])
    >>> GaussianMixture(means, scales=torch.ones(2, 2)).sample((3,)).shape
    torch.Size([3, 2])

    Args:
        means: Centers, shape (K, D).
        scales: Standard deviations, shape (K, D), or Cholesky factors of covariances, (K, D, D).
        weights: Mixture weights up to a common factor, shape (K,); equal if None.

    Raises:
        ValueError: Shapes that do not fit each other.
    """

    means: Tensor
    scales: Tensor
    weights: Tensor

    def __init__(self, means: Tensor, scales: Tensor, weights: Tensor | None = None) -> None:
        super().__init__(means.shape[1:])
        self.full = scales.dim() == 3
        if scales.shape != (*means.shape, *means.shape[1:][: self.full]):
            raise ValueError(
                "GaussianMixture: expected means of shape (K, D) and scales of shape (K, D), or "
                f"(K, D, D), got {tuple(means.shape)} and {tuple(scales.shape)}"
            )
        weights = torch.ones_like(means[:, 0]) if weights is None else weights
        self.register_buffer("means", means)
        self.register_buffer("scales", scales)
        self.register_buffer("weights", weights / weights.sum())
        self.to(means.dtype)

    @classmethod
    def fit(
        cls,
        x: Any,
        components: int,
        *,
        steps: int = 200,
        batch_size: int = 10_000,
        ridge: float = 1e-4,
        generator: torch.Generator | None = None,
    ) -> "GaussianMixture":
        """Fit full covariances to data by EM in minibatches; see `fitted_mixture`.

        A single component is the normal of the data's mean and covariance.

        Args:
            x: Rows, shape (N, D).
            components: K.
            steps: Batches in all.
            batch_size: Rows of each, all if there are fewer.
            ridge: Part of the covariance of all data that is added to each covariance.
            generator: Source of the starts and of the batches.

        Raises:
            ValueError: Too few rows, or numbers that are not finite.
        """
        rows = as_numbers("GaussianMixture.fit", "x", x)
        if rows.dim() != 2 or not rows.shape[1]:
            raise ValueError(
                f"GaussianMixture.fit: expected x of shape (N, D), got {tuple(rows.shape)}"
            )
        expect_counts("GaussianMixture.fit", components=components, steps=steps)
        expect_counts("GaussianMixture.fit", batch_size=batch_size)
        rows = rows if rows.is_floating_point() else rows.double()
        expect_finite("GaussianMixture.fit", "x", rows)
        weights, means, factors = fitted_mixture(
            rows, components, steps=steps, batch_size=batch_size, ridge=ridge, generator=generator
        )
        return cls(means, factors, weights)

    def log_prob(self, z: Tensor) -> Tensor:
        if self.full:
            mixture = Mixture(self.weights, self.means, self.scales)
            rows = z.reshape(-1, z.shape[-1])
            return log_densities(rows, mixture).logsumexp(-1).reshape(z.shape[:-1])
        standard = (z.unsqueeze(-2) - self.means) / self.scales
        parts = -0.5 * (standard**2 + LOG_2PI) - self.scales.log()
        return torch.logsumexp(parts.sum(-1) + self.weights.log(), -1)

    def sample(
        self, sample_shape: Sequence[int] = (), generator: torch.Generator | None = None
    ) -> Tensor:
        shape = expect_shape("sample", sample_shape)
        count = math.prod(shape)
        weights = self.weights.to(device_of(generator, self.weights))
        rows = torch.multinomial(weights, max(count, 1), replacement=True, generator=generator)
        rows = rows[:count].reshape(shape).to(self.means.device)
        noise = self._drawn(torch.randn, (*shape, *self.event_shape), generator)
        if self.full:
            return self.means[rows] + (self.scales[rows] @ noise.unsqueeze(-1)).squeeze(-1)
        return self.means[rows] + self.scales[rows] * noise

    def extra_repr(self) -> str:
        kind = ", full covariances" if self.full else ""
        return f"{super().extra_repr()}, {len(self.means)} components{kind}"


class Uniform(Base):
    """The uniform distribution on a box.

    Args:
        low: Lower corner, shape (D,).
        high: Upper corner, shape (D,).

    Raises:
        ValueError: A lower bound is not below the upper one.
    """

    low: Tensor
    high: Tensor

    def __init__(self, low: Tensor, high: Tensor) -> None:
        if not (high > low).all():
            raise ValueError(f"Uniform: expected low < high, got {low.tolist()}, {high.tolist()}")
        super().__init__(low.shape)
        self.register_buffer("low", low)
        self.register_buffer("high", high)
        self.to(low.dtype)

    @property
    def support(self) -> str:
        return f"from {self.low.tolist()} to {self.high.tolist()}"

    def log_prob(self, z: Tensor) -> Tensor:
        inside = ((z >= self.low) & (z < self.high)).all(-1)
        density = -(self.high - self.low).log().sum()
        return torch.where(inside, density, -torch.inf) + 0 * z.clamp(-1, 1).sum(-1)  # NaN

    def sample(
        self, sample_shape: Sequence[int] = (), generator: torch.Generator | None = None
    ) -> Tensor:
        draw = self._drawn(
            torch.rand, (*expect_shape("sample", sample_shape), *self.event_shape), generator
        )
        last = self.high.nextafter(self.low)  # rounding may reach the end, with density 0
        return (self.low + (self.high - self.low) * draw).minimum(last)


class UniformAngles(Base):
    """D independent angles, uniform on the circle, with the same density at every number.

    Args:
        dim: Number of angles D.
        period: Length of the circle; samples are in [-period/2, period/2).

    Raises:
        ValueError: The period is not positive.
    """

    def __init__(self, dim: int, period: float = 2 * math.pi) -> None:
        if period <= 0:
            raise ValueError(f"UniformAngles: expected period > 0, got {period}")
        super().__init__((dim,))
        self.period = period

    def log_prob(self, z: Tensor) -> Tensor:
        density = z.new_full(z.shape[:-1], -self.event_shape[0] * math.log(self.period))
        return density + 0 * z.clamp(-1, 1).sum(-1)  # NaN stays NaN

    def sample(
        self, sample_shape: Sequence[int] = (), generator: torch.Generator | None = None
    ) -> Tensor:
        draw = self._drawn(
            torch.rand, (*expect_shape("sample", sample_shape), *self.event_shape), generator
        )
        return self.period * (draw - 0.5)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, period {self.period:g}"


class UniformSphere(Base):
    """The uniform distribution on the unit sphere in R^D, with respect to its area.

    The density, 1/(4π) for D = 3, is the same in every direction, whatever the length of z, which
    an ODE solver may leave a little off 1.

    Args:
        dim: Number of coordinates D of a unit vector.

    Raises:
        ValueError: D is below 2.
    """

    def __init__(self, dim: int) -> None:
        if dim < 2:
            raise ValueError(f"UniformSphere: expected dim >= 2, got {dim}")
        super().__init__((dim,))
        self.log_area = math.log(2) + dim / 2 * math.log(math.pi) - math.lgamma(dim / 2)

    @property
    def support(self) -> str:
        return "the unit sphere"

    def log_prob(self, z: Tensor) -> Tensor:
        density = z.new_full(z.shape[:-1], -self.log_area)
        return density + 0 * z.clamp(-1, 1).sum(-1)  # NaN stays NaN

    def sample(
        self, sample_shape: Sequence[int] = (), generator: torch.Generator | None = None
    ) -> Tensor:
        shape = (*expect_shape("sample", sample_shape), *self.event_shape)
        return F.normalize(self._drawn(torch.randn, shape, generator), dim=-1)


class Empirical(Base):
    """The empirical distribution of points, which are drawn with replacement; it has no density.

    Args:
        points: Points, shape (N, *event).

    Raises:
        ValueError: There are no points, or one is not finite.
    """

    has_density = False
    points: Tensor

    def __init__(self, points: Tensor) -> None:
        if not len(points):
            raise ValueError("Empirical: expected one point or more, got none")
        expect_finite("Empirical", "points", points)
        super().__init__(points.shape[1:])
        self.register_buffer("points", points)
        self.to(points.dtype)

    def log_prob(self, z: Tensor) -> Tensor:
        """Raise ValueError, as there is no density."""
        raise ValueError(
            "log_prob: this flow's source is a set of points, which has no density; to have one, "
            "give the flow a base with a density, such as cnf.data.toy('moons') or a normal"
        )

    def sample(
        self, sample_shape: Sequence[int] = (), generator: torch.Generator | None = None
    ) -> Tensor:
        shape, device = expect_shape("sample", sample_shape), device_of(generator, self.points)
        rows = torch.randint(len(self.points), shape, generator=generator, device=device)
        return self.points[rows.to(self.points.device)]

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {len(self.points):,} points"


def as_base(base: Any, event_shape: Sequence[int]) -> Base:
    """The base distribution that an argument of `Flow` stands for.

    Args:
        base: None for a standard normal, a `Base`, a torch distribution, a density or points.
        event_shape: Shape of an event, for the standard normal.

    Raises:
        ValueError: It is something else.
    """
    if base is None:
        return StandardNormal(event_shape)
    if isinstance(base, Base):
        return base
    if isinstance(base, Distribution):
        return FromTorch(base)
    if all(hasattr(base, name) for name in ("dim", "sample", "log_prob")):
        return FromDensity(base)
    if is_rows(base):
        return Empirical(as_numbers("Flow", "base", base))
    raise ValueError(
        "Flow: expected base to be None, a cnf.distributions.Base, a torch Distribution, a "
        f"density such as cnf.data.toy('moons'), or points (N, D); got {type(base).__name__}"
    )


def _no_formula(name: str, instead: str) -> str:
    return (
        f"FlowDistribution.{name}: a flow has no formula for it; estimate it from samples: "
        f"{instead}"
    )


def _unknown(name: str, instead: str) -> property:
    """A property that raises NotImplementedError, and says how to estimate it."""

    def refuse(self: Distribution) -> NoReturn:
        """Raise NotImplementedError, as a flow has no formula for it."""
        raise NotImplementedError(_no_formula(name, instead))

    return property(refuse)


class FlowDistribution(Distribution):
    """A flow with a given context as a torch distribution; see `Flow.distribution`.

    Values broadcast with the batch shape, which is that of the context. The log-density of a value
    with NaN is NaN, and that of one outside of the support -inf, as in `Flow.log_prob`.

    Args:
        flow: The flow.
        context: Condition, shape (*batch, C), or None.
        batch_shape: The batch shape; that of the context if None.
    """

    arg_constraints: dict[str, constraints.Constraint] = {}
    # torch's own raise without a message.
    mean = _unknown("mean", "sample((n,)).mean(0)")
    variance = _unknown("variance", "sample((n,)).var(0)")
    stddev = _unknown("stddev", "sample((n,)).std(0)")
    mode = _unknown("mode", "start at the likeliest of sample((n,)) and climb log_prob")

    def __init__(
        self, flow: Any, context: Tensor | None, batch_shape: Sequence[int] | None = None
    ) -> None:
        if batch_shape is None:
            batch_shape = () if context is None else context.shape[:-1]
        self.flow, self.context = flow, context
        self.has_rsample = flow.dequantization is None  # pyright: ignore
        super().__init__(
            torch.Size(batch_shape), torch.Size(flow.event_shape), validate_args=False
        )

    @property
    def support(self) -> constraints.Constraint:
        """An interval if the flow ends in a map onto one, else the real numbers.

        Angles are real numbers, as in torch. Points outside of the image of a bounded base have a
        log-density of -inf.
        """
        last = self.flow.transform if self.flow.preprocess is None else self.flow.preprocess
        while hasattr(last, "transforms"):
            last = last.transforms[-1]
        low, high = getattr(last, "support", (-math.inf, math.inf))
        if math.isinf(low):
            inner = constraints.real
        else:
            bounded = math.isfinite(high)
            inner = (
                constraints.interval(low, high) if bounded else constraints.greater_than_eq(low)
            )
        return constraints.independent(inner, len(self.event_shape))

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> "FlowDistribution":
        """The same distribution with a larger batch shape; see `Distribution.expand` of torch.

        Args:
            batch_shape: The batch shape.
            _instance: Not used.

        Raises:
            ValueError: The present batch shape does not broadcast to it.
        """
        try:
            shape = torch.empty(self.batch_shape).expand(batch_shape).shape
        except RuntimeError:
            raise ValueError(
                f"FlowDistribution.expand: expected a shape that the batch shape "
                f"{tuple(self.batch_shape)} broadcasts to, got {tuple(batch_shape)}"
            ) from None
        context = self.context
        if context is not None:
            context = context.expand(*shape, context.shape[-1])
        return type(self)(self.flow, context, shape)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        with torch.no_grad():
            return self.rsample(sample_shape)

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        if self.context is None:
            return self.flow.rsample((*sample_shape, *self.batch_shape))
        return self.flow.rsample(tuple(sample_shape), self.context)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density in nats of values of shape (*batch, *event), see `Flow.log_prob`.

        Raises:
            ValueError: The value's shape does not broadcast with the batch shape.
        """
        expect_event("FlowDistribution.log_prob", "value", value, self.event_shape)
        batch = value.shape[: value.dim() - len(self.event_shape)]
        try:
            shape = torch.broadcast_shapes(batch, self.batch_shape)
        except RuntimeError:
            raise ValueError(
                "FlowDistribution.log_prob: expected a value that broadcasts with the batch shape "
                f"{tuple(self.batch_shape)}, got {tuple(value.shape)}"
            ) from None
        return self.flow.log_prob(value.expand(*shape, *self.event_shape), self.context)

    def entropy(self) -> NoReturn:
        """Raise NotImplementedError, and say how to estimate it from samples."""
        raise NotImplementedError(_no_formula("entropy", "-log_prob(sample((n,))).mean(0)"))

    def cdf(self, value: Tensor) -> NoReturn:
        """Raise NotImplementedError, and say how to estimate it from samples."""
        instead = "(sample((n,)) <= value).all(-1).double().mean(0)"
        raise NotImplementedError(_no_formula("cdf", instead))

    def icdf(self, value: Tensor) -> NoReturn:
        """Raise NotImplementedError, and say how to estimate it from samples."""
        instead = "sample((n,)).quantile(value, 0), of each column for itself"
        raise NotImplementedError(_no_formula("icdf", instead))

    def enumerate_support(self, expand: bool = True) -> NoReturn:
        """Raise NotImplementedError, as the support is not countable."""
        raise NotImplementedError(
            "FlowDistribution.enumerate_support: a flow is continuous, and its support cannot be "
            "listed; draw from it: sample((n,))"
        )

    def __repr__(self) -> str:
        kind = (self.flow.spec or {}).get("model") or type(self.flow.transform).__name__
        batch, event = tuple(self.batch_shape), tuple(self.event_shape)
        return f"{type(self).__name__}({kind}, batch_shape: {batch}, event_shape: {event})"


def flow_distribution(flow: Any, context: Tensor | None) -> FlowDistribution:
    """A flow as a torch distribution, which is Pyro's too if Pyro has been imported.

    Args:
        flow: The flow.
        context: Condition, shape (*batch, C), or None.
    """
    kind = _pyro_kind() if "pyro" in sys.modules else FlowDistribution
    return kind(flow, context)


@cache
def _pyro_kind() -> type[FlowDistribution]:
    mixin = importlib.import_module("pyro.distributions.torch_distribution").TorchDistributionMixin
    return type(mixin)("PyroFlowDistribution", (FlowDistribution, mixin), {})
