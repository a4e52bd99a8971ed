"""Simulators of sbibm with reference posteriors: exact draws, or long chains.

Source: Lueckmann et al. (2021), Benchmarking Simulation-Based Inference,
https://arxiv.org/abs/2101.04653, whose names, priors and constants these are.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, MultivariateNormal, Normal, Uniform

CHAINS, STEPS = 2_000, 20_000  # of Metropolis, after a start from weighted prior draws


class Task(ABC):
    """A prior, a simulator, and draws of the posterior.

    Attributes:
        prior: Of theta, D variables.
    """

    prior: Distribution

    @abstractmethod
    def simulate(self, theta: Tensor) -> Tensor:
        """One x for each theta, (N, D) → (N, C)."""

    @abstractmethod
    def log_likelihood(self, x: Tensor, theta: Tensor) -> Tensor:
        """log p(x | theta) of one x, (C,), for each theta: (N, D) → (N,)."""

    @abstractmethod
    def posterior(self, x: Tensor, n: int) -> Tensor:
        """Draws of p(theta | x), (n, D)."""


class GaussianLinear(Task):
    """theta of N(0, 0.1 I) in ten dimensions, x of N(theta, 0.1 I)."""

    variance = 0.1
    prior = MultivariateNormal(torch.zeros(10), 0.1 * torch.eye(10))

    def simulate(self, theta: Tensor) -> Tensor:
        return theta + math.sqrt(self.variance) * torch.randn_like(theta)

    def log_likelihood(self, x: Tensor, theta: Tensor) -> Tensor:
        return Normal(theta, math.sqrt(self.variance)).log_prob(x).sum(-1)

    def posterior(self, x: Tensor, n: int) -> Tensor:
        """By conjugacy N(x / 2, 0.05 I)."""
        return x / 2 + math.sqrt(self.variance / 2) * torch.randn(n, 10)


class TwoMoons(Task):
    """A crescent, moved by theta in two ways that differ by a sign: two modes."""

    prior = Independent(Uniform(-torch.ones(2), torch.ones(2)), 1)
    radius = Normal(0.1, 0.01)

    def simulate(self, theta: Tensor) -> Tensor:
        return self._shift(theta) + self._crescent(len(theta))

    def log_likelihood(self, x: Tensor, theta: Tensor) -> Tensor:
        """In polar coordinates around (1/4, 0): N(r; 0.1, 0.01²) / (π r) where p₁ > 1/4."""
        p = x - self._shift(theta) - torch.tensor([0.25, 0.0])
        r = p.norm(dim=-1)
        inside = self.radius.log_prob(r) - (math.pi * r).log()
        return torch.where(p[:, 0] > 0, inside, -math.inf)

    def posterior(self, x: Tensor, n: int) -> Tensor:
        """The shift is linear on either side of theta₁ + theta₂ = 0: it is solved for draws."""

        def drawn(count: int) -> Tensor:
            q = x - self._crescent(count)
            total = -q[:, 0] * torch.randint(0, 2, (count,)).mul(2).sub(1)
            theta = torch.stack([total - q[:, 1], total + q[:, 1]], 1) / math.sqrt(2)
            return theta[(q[:, 0] <= 0) & (theta.abs() <= 1).all(1)]

        return _at_least(n, drawn)

    def _shift(self, theta: Tensor) -> Tensor:
        total, difference = theta.sum(1), theta[:, 1] - theta[:, 0]
        return torch.stack([-total.abs(), difference], 1) / math.sqrt(2)

    def _crescent(self, n: int) -> Tensor:
        angle, r = math.pi * (torch.rand(n) - 0.5), self.radius.sample((n,))
        return torch.stack([r * angle.cos() + 0.25, r * angle.sin()], 1)


class SLCP(Task):
    """Simple likelihood, complex posterior: four points of a Gaussian whose shape theta gives."""

    prior = Independent(Uniform(-3 * torch.ones(5), 3 * torch.ones(5)), 1)

    def simulate(self, theta: Tensor) -> Tensor:
        return self._normal(theta).sample((4,)).movedim(0, 1).flatten(1)

    def log_likelihood(self, x: Tensor, theta: Tensor) -> Tensor:
        return self._normal(theta).log_prob(x.view(4, 1, 2)).sum(0)

    def posterior(self, x: Tensor, n: int) -> Tensor:
        """Random-walk Metropolis, many chains; signs of theta₃ and theta₄ are free by symmetry."""
        start = self.prior.sample((500_000,))
        weights = self.log_likelihood(x, start).softmax(0)
        theta = start[torch.multinomial(weights, CHAINS, replacement=True)]
        density = self.log_likelihood(x, theta)
        for _ in range(STEPS):
            width = 0.4 * torch.rand(CHAINS, 1).square()  # of many sizes
            moved = theta + width * torch.randn_like(theta) * 2
            found = torch.full((CHAINS,), -math.inf)
            inside = (moved.abs() < 3).all(1)
            found[inside] = self.log_likelihood(x, moved[inside])
            taken = torch.rand(CHAINS).log() < found - density
            theta = torch.where(taken[:, None], moved, theta)
            density = torch.where(taken, found, density)
        theta[:, 2:4] *= torch.randint(0, 2, (CHAINS, 2)).mul(2).sub(1)
        return theta[torch.randperm(CHAINS)[:n]]

    def _normal(self, theta: Tensor) -> MultivariateNormal:
        s1, s2, rho = theta[:, 2].square(), theta[:, 3].square(), theta[:, 4].tanh()
        zero = torch.zeros_like(s1)
        rows = torch.stack([s1, zero]), torch.stack([rho * s2, (1 - rho**2).sqrt() * s2])
        root = torch.stack(rows).permute(2, 0, 1)
        tiny = 1e-6 * torch.eye(2)  # where a deviation is zero
        return MultivariateNormal(theta[:, :2], scale_tril=root + tiny, validate_args=False)


TASKS: dict[str, Callable[[], Task]] = {
    "gaussian-linear": GaussianLinear,
    "two-moons": TwoMoons,
    "slcp": SLCP,
}


def _at_least(n: int, drawn: Callable[[int], Tensor]) -> Tensor:
    """So many of the draws that were accepted, some at a time."""
    parts = [drawn(2 * n)]
    while sum(map(len, parts)) < n:
        parts.append(drawn(2 * n))
    return torch.cat(parts)[:n]
