"""Base distributions: normal, mixtures, uniform, any torch distribution, a toy, points."""

import copy
import importlib
import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.distributions import (
    Distribution,
    Independent,
    MixtureSameFamily,
    TransformedDistribution,
    constraints,
)

from cnf.data.arrays import as_numbers, is_rows
from cnf.errors import expect_event, expect_finite, expect_generator, expect_shape
from cnf.printing import named, shaped
from cnf.random import reseed, untouched

LOG_2PI = math.log(2 * math.pi)
SURFACES = tuple(  # supports of fewer dimensions than a draw has numbers
    type(constraint)
    for constraint in (
        constraints.simplex, constraints.corr_cholesky, constraints.lower_triangular,
        constraints.lower_cholesky, constraints.symmetric, constraints.positive_semidefinite,
        constraints.positive_definite,
    )
)  # fmt: skip


class Base(nn.Module, ABC):
    """The distribution that a flow starts from.

    Attributes:
        event_shape: Shape of one z.
        has_density: Whether `log_prob` means anything.
    """

    has_density = True
    _like: Tensor  # follows the module's dtype and device

    def __init__(self, event_shape: Sequence[int]) -> None:
        super().__init__()
        self.event_shape = tuple(event_shape)
        self.register_buffer("_like", torch.empty(0), persistent=False)

    @property
    def support(self) -> str:
        """Where the density is above 0, in words."""
        return "everywhere"

    @abstractmethod
    def log_prob(self, z: Tensor) -> Tensor:
        """Log-density in nats of z, shape (*batch, *event_shape) → (*batch,)."""

    @abstractmethod
    def sample(
        self, sample_shape: Sequence[int] = (), generator: torch.Generator | None = None
    ) -> Tensor:
        """Independent draws, (*sample_shape, *event_shape), of the module's dtype and device.

        Args:
            sample_shape: Shape of the draws; an int n is (n,).
            generator: Source of the draw; torch's default generator if None.
        """

    def extra_repr(self) -> str:
        """What `repr` says of it."""
        return shaped(self.event_shape)

    def __repr__(self) -> str:
        return named(self, self.extra_repr())

    def _drawn(
        self,
        draw: Callable[..., Tensor],
        shape: Sequence[int],
        generator: torch.Generator | None,
    ) -> Tensor:
        """By `torch.randn` or `torch.rand`, on the generator's device, then on the module's."""
        expect_generator("sample", generator)
        like = self._like
        device = like.device if generator is None else generator.device
        drawn = draw(tuple(shape), generator=generator, device=device, dtype=like.dtype)
        return drawn.to(like.device)


class StandardNormal(Base):
    """N(0, I).

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


class FromTorch(Base):
    """Any `torch.distributions.Distribution`, its batch dimensions counted as part of the event.

    Its parameters stay where they were made: give it tensors of the flow's dtype and device.

    Args:
        distribution: The distribution; moved batch dimensions make one joint event.
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
        expect_generator("sample", generator)
        if generator is None:
            return self.distribution.sample(shape)
        # torch.distributions draw from the global generators only.
        seed = torch.randint(2**62, (), generator=generator, device=generator.device).item()
        device = self._device()
        with untouched(device):
            reseed(int(seed), device)
            return self.distribution.sample(shape)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.distribution}"

    def _device(self) -> torch.device:
        """Where it draws: a distribution does not tell, an empty sample does."""
        if not torch.cuda.is_initialized() and not torch.backends.mps.is_available():
            return torch.device("cpu")
        return self.distribution.sample(torch.Size((0,))).device


def _innermost(support: Any) -> Any:
    """The constraint that each number, or each vector, is under."""
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    return support


def expect_volume(distribution: Distribution, who: str = "Flow", what: str = "base") -> None:
    """Raise unless a torch distribution has a density on the space of its draws.

    It must be continuous, and fill that space.

    Args:
        distribution: The distribution.
        who: Whose argument it is.
        what: What it is there: the "base", or the "data".

    Raises:
        ValueError: It is discrete, or on a surface, as a Dirichlet is.
    """
    part = distribution
    while (inner := getattr(part, "base_dist", None)) is not None:  # transforms hide its support
        part = inner
    name = type(part).__name__
    for one in (distribution, part):
        try:
            support = _innermost(one.support)
        except NotImplementedError:
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
    """A distribution whose log-density outside of its support is -inf, and no error.

    A point inside, where the gradient is finite, stands in for one that is not.
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
    """The distribution for its `log_prob` alone: -inf outside of the support, part by part."""
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
    """A toy density (anything with `dim`, `sample(n, generator)` and `log_prob`) as a base."""

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
    """A mixture of K Gaussians with diagonal covariance, as buffers that follow the module.

    >>> means = torch.tensor([[-2.0, 0.0], [2.0, 0.0]])
    >>> GaussianMixture(means, scales=torch.ones(2, 2)).sample((3,)).shape
    torch.Size([3, 2])

    Args:
        means: Centers, shape (K, D).
        scales: Standard deviations, shape (K, D).
        weights: Mixture weights, shape (K,), equal if None; they need not sum to one.
    """

    means: Tensor
    scales: Tensor
    weights: Tensor

    def __init__(self, means: Tensor, scales: Tensor, weights: Tensor | None = None) -> None:
        super().__init__(means.shape[1:])
        weights = torch.ones_like(means[:, 0]) if weights is None else weights
        self.register_buffer("means", means)
        self.register_buffer("scales", scales)
        self.register_buffer("weights", weights / weights.sum())
        self.to(means.dtype)

    def log_prob(self, z: Tensor) -> Tensor:
        standard = (z.unsqueeze(-2) - self.means) / self.scales
        parts = -0.5 * (standard**2 + LOG_2PI) - self.scales.log()
        return torch.logsumexp(parts.sum(-1) + self.weights.log(), -1)

    def sample(
        self, sample_shape: Sequence[int] = (), generator: torch.Generator | None = None
    ) -> Tensor:
        shape = expect_shape("sample", sample_shape)
        count = math.prod(shape)
        weights = self.weights.to(self.weights.device if generator is None else generator.device)
        rows = torch.multinomial(weights, max(count, 1), replacement=True, generator=generator)
        rows = rows[:count].reshape(shape).to(self.means.device)
        noise = self._drawn(torch.randn, (*shape, *self.event_shape), generator)
        return self.means[rows] + self.scales[rows] * noise

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {len(self.means)} components"


class Uniform(Base):
    """The uniform distribution on a box, density 0 outside.

    Args:
        low: Lower corner, shape (D,).
        high: Upper corner, shape (D,).

    Raises:
        ValueError: A corner that is not above the other.
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
        last = self.high.nextafter(self.low)  # rounding may reach the upper end, of density 0
        return (self.low + (self.high - self.low) * draw).minimum(last)


class UniformAngles(Base):
    """D angles, each uniform on the circle: any number is an angle, of the same density.

    Args:
        dim: D.
        period: Length of the circle; samples lie in [-period/2, period/2).

    Raises:
        ValueError: A period that is not positive.
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


class Empirical(Base):
    """Points as a source: samples are rows drawn with replacement; there is no density.

    Args:
        points: Shape (N, *event).

    Raises:
        ValueError: No points, or some that are not finite.
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
        """Raise: a set of points has no density.

        Raises:
            ValueError: Always: points have no density.
        """
        raise ValueError(
            "log_prob: this flow's source is a set of points, which has no density; to have one, "
            "give the flow a base with a density, such as cnf.data.toy('moons') or a normal"
        )

    def sample(
        self, sample_shape: Sequence[int] = (), generator: torch.Generator | None = None
    ) -> Tensor:
        device = self.points.device if generator is None else generator.device
        shape = expect_shape("sample", sample_shape)
        rows = torch.randint(len(self.points), shape, generator=generator, device=device)
        return self.points[rows.to(self.points.device)]

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {len(self.points):,} points"


def as_base(base: Any, event_shape: Sequence[int]) -> Base:
    """A `Base` from None (standard normal), a Base, a torch distribution, a density or points.

    Args:
        base: What to make a base of.
        event_shape: Shape of one z, where base is None.

    Raises:
        ValueError: Anything else.
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
    """A property that raises, and says how to estimate what it stands for."""

    def refuse(self: Distribution) -> NoReturn:
        """Raise: it is known by samples only."""
        raise NotImplementedError(_no_formula(name, instead))

    return property(refuse)


class FlowDistribution(Distribution):
    """A flow, given its context, as a torch distribution; see `Flow.distribution`.

    Values broadcast against the batch shape, which is the context's. A value that is NaN or
    outside of the support is no error: its log-density is NaN or -inf, as in `Flow.log_prob`.

    Args:
        flow: The flow.
        context: Condition, shape (*batch, C), or None.
        batch_shape: The context's if None.
    """

    arg_constraints: dict[str, constraints.Constraint] = {}
    # Torch has these as properties and methods that raise without a message.
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
        """A box where the flow ends in a map onto one, else real.

        Angles are real as torch's are, and what is outside of a bounded base's image has a
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
        """The same distribution for a larger batch shape.

        Raises:
            ValueError: A shape that the batch shape does not broadcast to.
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
        """Log-density in nats, of the value's and the batch's common shape.

        Raises:
            ValueError: A value that does not broadcast with the batch shape.
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
        """Raise: it is known by samples only."""
        raise NotImplementedError(_no_formula("entropy", "-log_prob(sample((n,))).mean(0)"))

    def cdf(self, value: Tensor) -> NoReturn:
        """Raise: it is known by samples only."""
        instead = "(sample((n,)) <= value).all(-1).double().mean(0)"
        raise NotImplementedError(_no_formula("cdf", instead))

    def icdf(self, value: Tensor) -> NoReturn:
        """Raise: it is known by samples only."""
        instead = "sample((n,)).quantile(value, 0), of each column for itself"
        raise NotImplementedError(_no_formula("icdf", instead))

    def enumerate_support(self, expand: bool = True) -> NoReturn:
        """Raise: the support is a continuum."""
        raise NotImplementedError(
            "FlowDistribution.enumerate_support: a flow is continuous, and its support cannot be "
            "listed; draw from it: sample((n,))"
        )

    def __repr__(self) -> str:
        kind = (self.flow.spec or {}).get("model") or type(self.flow.transform).__name__
        batch, event = tuple(self.batch_shape), tuple(self.event_shape)
        return f"{type(self).__name__}({kind}, batch_shape: {batch}, event_shape: {event})"


def flow_distribution(flow: Any, context: Tensor | None) -> FlowDistribution:
    """The flow as a torch distribution; as Pyro's too where Pyro has been imported.

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
