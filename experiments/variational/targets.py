"""Unnormalized densities whose integral and moments are known: closed forms, or one quadrature."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import HalfCauchy, Normal

# Rubin (1981), https://doi.org/10.3102/10769986006004377: effects of coaching, and their errors.
EFFECTS = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
ERRORS = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
SPREAD = 5.0  # of the priors of the mean and of the scale
SCHOOLS = len(EFFECTS)


@dataclass(frozen=True)
class Target:
    """A density up to a factor, and what is known of it.

    Attributes:
        dim: D.
        log_density: Points, (N, D) → (N,).
        log_evidence: The log of its integral, in nats.
        mean: Of each variable, shape (D,).
        std: Of each variable, shape (D,).
    """

    dim: int
    log_density: Callable[[Tensor], Tensor]
    log_evidence: float
    mean: Tensor
    std: Tensor


def banana() -> Target:
    """x ~ N(0, 2²), y ~ N(x²/2, ½²), without its factor 2π · 2 · ½."""

    def log_density(x: Tensor) -> Tensor:
        a, b = x.unbind(-1)
        return -0.5 * ((a / 2).square() + ((b - 0.5 * a.square()) / 0.5).square())

    # Var x² = 2 · 2⁴ for a normal x of variance 2²
    mean, std = torch.tensor([0.0, 2.0]), torch.tensor([2.0, math.sqrt(0.25 * 32 + 0.25)])
    return Target(2, log_density, math.log(2 * math.pi), mean, std)


def funnel(dim: int = 10) -> Target:
    """v ~ N(0, 3²) and nine of N(0, eᵛ): Neal (2003), https://doi.org/10.1214/aos/1056562461."""

    def log_density(x: Tensor) -> Tensor:
        v, rest = x[:, 0], x[:, 1:]
        scale = (0.5 * v)[:, None].exp()
        return Normal(0.0, 3.0).log_prob(v) + Normal(0.0, scale).log_prob(rest).sum(-1)

    std = torch.full((dim,), math.exp(9 / 4))  # E eᵛ = e^(9/2)
    std[0] = 3.0
    return Target(dim, log_density, 0.0, torch.zeros(dim), std)


def eight_schools(centered: bool) -> Target:
    """Effects θ_j ~ N(μ, τ²), seen with known errors; μ ~ N(0, 5²), τ ~ half-Cauchy(5).

    The variables are μ, log τ and θ, or, not centered, η = (θ - μ)/τ.
    Gelman et al. (2013), Bayesian Data Analysis, section 5.5.
    """

    def log_density(x: Tensor) -> Tensor:
        mean, log_scale, own = x[:, 0], x[:, 1], x[:, 2:]
        scale = log_scale.exp()
        effects = own if centered else mean[:, None] + scale[:, None] * own
        prior = Normal(mean[:, None], scale[:, None]) if centered else Normal(0.0, 1.0)
        return (
            Normal(0.0, SPREAD).log_prob(mean)
            + HalfCauchy(SPREAD).log_prob(scale) + log_scale
            + prior.log_prob(own).sum(-1)
            + Normal(effects, ERRORS).log_prob(EFFECTS).sum(-1)
        )  # fmt: skip

    return Target(2 + SCHOOLS, log_density, *_by_quadrature(centered))


def _by_quadrature(centered: bool, points: int = 4_001) -> tuple[float, Tensor, Tensor]:
    """Log evidence, means and standard deviations, by the normal posterior given log τ."""
    log_scale = torch.linspace(-12.0, 8.0, points, dtype=torch.float64)
    scale, one = log_scale.exp(), torch.ones(SCHOOLS, dtype=torch.float64)
    eye = torch.diag(one)
    # Given τ the variables (μ, own) have a normal prior, and effects = A (μ, own).
    both = torch.zeros(points, SCHOOLS + 1, SCHOOLS + 1, dtype=torch.float64)
    both[:, 0, 0] = SPREAD**2
    both[:, 1:, 1:] = eye
    lift = torch.cat([one[:, None].expand(points, -1, 1), scale[:, None, None] * eye], -1)
    seen = lift @ both @ lift.mT + torch.diag(ERRORS.double().square())
    gain = torch.linalg.solve(seen, lift @ both).mT
    mean = gain @ EFFECTS.double()
    covariance = both - gain @ lift @ both
    if centered:  # θ = A (μ, η), beside μ
        show = torch.cat([torch.eye(SCHOOLS + 1).double()[:1].expand(points, 1, -1), lift], 1)
        mean, covariance = (show @ mean[..., None])[..., 0], show @ covariance @ show.mT
    likelihood = torch.distributions.MultivariateNormal(torch.zeros_like(one), seen)
    log_weight = (
        likelihood.log_prob(EFFECTS.double()) + HalfCauchy(SPREAD).log_prob(scale) + log_scale
    )
    spacing = math.log(float(log_scale[1] - log_scale[0]))
    weight = log_weight.softmax(0)
    means = torch.cat([mean[:, :1], log_scale[:, None], mean[:, 1:]], 1)
    variances = covariance.diagonal(dim1=1, dim2=2)
    variances = torch.cat([variances[:, :1], 0 * log_scale[:, None], variances[:, 1:]], 1)
    first = weight @ means
    second = weight @ (variances + (means - first).square())
    return float(log_weight.logsumexp(0)) + spacing, first.float(), second.sqrt().float()


TARGETS = {
    "banana": banana,
    "funnel-10d": funnel,
    "eight-schools": lambda: eight_schools(centered=False),
    "eight-schools-centered": lambda: eight_schools(centered=True),
}
