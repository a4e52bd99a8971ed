"""Densities of noisy curves, by quadrature, and of noisy circles, in closed form."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from cnf.data.density import Table, Toy, cells, choice, grouped_logsumexp, normal, uniform


@dataclass(frozen=True)
class Gaussian:
    """Isotropic normal noise of standard deviation sigma."""

    sigma: float

    @property
    def reach(self) -> float:
        """Distance per coordinate beyond which there is next to nothing."""
        return 5 * self.sigma

    def draw(self, n: int, generator: torch.Generator | None) -> Tensor:
        """Draw offsets, shape (n, 2)."""
        return self.sigma * normal(n, 2, generator=generator)

    def log_mixture(self, x: Tensor, centers: Tensor, log_weights: Tensor) -> Tensor:
        r"""Log-density :math:`\log\sum_j w_j\,N(x; c_j, \sigma^2 I)`, shape (N,).

        Args:
            x: Points, shape (N, 2).
            centers: Centers c, shape (M, 2).
            log_weights: Logarithms of the weights w, shape (M,).
        """
        x, centers = x / self.sigma, centers / self.sigma
        # Multiplied out, the squares of all pairs take a single matrix product.
        exponents = torch.addmm(log_weights - centers.square().sum(-1) / 2, x, centers.T)
        constant = math.log(2 * math.pi * self.sigma**2)
        return exponents.logsumexp(-1) - x.square().sum(-1) / 2 - constant


@dataclass(frozen=True)
class BlurredSquare:
    """Uniform noise on a centered square of side `width` plus normal noise of deviation sigma."""

    width: float
    sigma: float

    @property
    def reach(self) -> float:
        """Distance per coordinate beyond which there is next to nothing."""
        return self.width / 2 + 5 * self.sigma

    def draw(self, n: int, generator: torch.Generator | None) -> Tensor:
        """Draw offsets, shape (n, 2)."""
        flat = self.width * (uniform(n, 2, generator=generator) - 0.5)
        return flat + self.sigma * normal(n, 2, generator=generator)

    def log_mixture(self, x: Tensor, centers: Tensor, log_weights: Tensor) -> Tensor:
        r"""Log-density of the noise around weighted centers, shape (N,).

        At distance d from a center, each coordinate has the density
        :math:`[\mathrm{erfc}(p) - \mathrm{erfc}(q)] / 2w`, with
        :math:`p, q = (d \mp w/2)/\sqrt2\sigma`.

        Args:
            x: Points, shape (N, 2).
            centers: Centers, shape (M, 2).
            log_weights: Logarithms of their weights, shape (M,).
        """
        relevant = self._relevant(x.detach(), centers, log_weights)
        row, center = relevant.nonzero(as_tuple=True)
        distance = (x[row] - centers[center]).abs()
        p = (distance - self.width / 2) / (math.sqrt(2) * self.sigma)
        q = (distance + self.width / 2) / (math.sqrt(2) * self.sigma)
        # The factor e^{-p²} is taken out, so that far tails do not underflow; where the clamp has
        # an effect, erfc(q) is 0.
        scaled = torch.special.erfcx(p) - p.square().clamp(max=700).exp() * torch.special.erfc(q)
        exponents = scaled.prod(-1).log() - p.square().sum(-1) + log_weights[center]
        constant = 2 * math.log(2 * self.width)
        return grouped_logsumexp(exponents, row, len(x)) - constant

    def _relevant(self, x: Tensor, centers: Tensor, log_weights: Tensor) -> Tensor:
        """Mask (N, M) of the pairs that contribute; the others sum to below e^-25 of the total."""
        outside = ((x[:, None] - centers).abs() - self.width / 2).clamp(min=0)
        bound = log_weights - outside.square().sum(-1) / (2 * self.sigma**2)
        return bound >= bound.amax(-1, keepdim=True) - 40


class Curves(Toy):
    r"""Equally likely curves with noise, where a curve's parameter v has the density m v^(m-1).

    .. math:: p(x) = \frac1K \sum_k \int_0^1 m v^{m-1}\, p_\text{noise}(x - c_k(v))\, dv

    The integral is computed by Gauss-Legendre quadrature. For the registered densities its error
    is below 1e-4 nats wherever the log-density is above -100. With constant curves and one node
    the density is a finite mixture, without quadrature error.

    Args:
        name: Name of the density.
        arms: Function from parameters v in [0, 1], shape (n,), to points on the K curves,
            shape (K, n, 2).
        noise: Noise that is added to a point of the curve.
        nodes: Number of quadrature nodes per curve.
        power: The exponent m: v is the m-th root of a uniform draw.
    """

    def __init__(
        self,
        name: str,
        arms: Callable[[Tensor], Tensor],
        noise: Gaussian | BlurredSquare,
        nodes: int = 512,
        power: int = 1,
    ) -> None:
        self.arms, self.noise, self.nodes, self.power = arms, noise, nodes, power
        curve = arms(torch.linspace(0, 1, 1001, dtype=torch.float64)).flatten(0, 1)
        low = (curve.amin(0) - noise.reach).tolist()
        high = (curve.amax(0) + noise.reach).tolist()
        nx, ny = (cells(b - a, noise.sigma) for a, b in zip(low, high, strict=True))
        super().__init__(name, (low[0], low[1]), (high[0], high[1]), (nx, ny))

    def _draw(self, n: int, generator: torch.Generator | None) -> Tensor:
        points = self.arms(uniform(n, generator=generator) ** (1 / self.power))
        arm = choice(len(points), n, generator)
        return points[arm, torch.arange(n, device=arm.device)] + self.noise.draw(n, generator)

    def _log_density(self, x: Tensor) -> Tensor:
        centers, log_weights = (table.on(x.device) for table in self._mixture)
        return self.noise.log_mixture(x, centers, log_weights)

    @cached_property
    def _mixture(self) -> tuple[Table, Table]:
        v, weights = legendre(self.nodes, self.power)
        points = self.arms(v)  # (K, nodes, 2)
        log_weights = (weights * self.power * v ** (self.power - 1) / len(points)).log()
        return Table(points.flatten(0, 1)), Table(log_weights.repeat(len(points)))


def legendre(nodes: int, power: int = 1, order: int = 16) -> tuple[Tensor, Tensor]:
    """Composite Gauss-Legendre nodes and weights on [0, 1], each of shape (nodes,).

    Args:
        nodes: Number of nodes, a multiple of the order (or at most the order).
        power: The panels are of equal length in v**power.
        order: Nodes per panel.
    """
    order = min(order, nodes)
    panels = nodes // order
    t, w = (torch.from_numpy(values) for values in np.polynomial.legendre.leggauss(order))
    edges = torch.linspace(0, 1, panels + 1, dtype=torch.float64) ** (1 / power)
    half = (edges[1:] - edges[:-1])[:, None] / 2
    return (edges[:-1, None] + half * (1 + t)).flatten(), (half * w).flatten()


class Rings(Toy):
    r"""Equally likely concentric circles with normal noise around them.

    .. math:: p(x) = \frac1K \sum_k \frac{1}{2\pi\sigma^2} I_0\Big(\frac{r\rho_k}{\sigma^2}\Big)
              \exp\Big({-\frac{r^2+\rho_k^2}{2\sigma^2}}\Big), \quad r = |x|

    Args:
        name: Name of the density.
        radii: Radii of the circles.
        sigma: Standard deviation of the noise per coordinate.
    """

    def __init__(self, name: str, radii: Sequence[float], sigma: float) -> None:
        self.radii, self.sigma = tuple(radii), sigma
        self._radii = Table(torch.tensor(self.radii, dtype=torch.float64))
        edge = max(radii) + 5 * sigma
        side = cells(2 * edge, sigma)
        super().__init__(name, (-edge, -edge), (edge, edge), (side, side))

    def _draw(self, n: int, generator: torch.Generator | None) -> Tensor:
        angle = 2 * math.pi * uniform(n, generator=generator)
        ring = choice(len(self.radii), n, generator)
        radius = self._radii.on(angle.device)[ring, None]
        circle = torch.stack([angle.cos(), angle.sin()], -1)
        return radius * circle + self.sigma * normal(n, 2, generator=generator)

    def _log_density(self, x: Tensor) -> Tensor:
        r = torch.linalg.vector_norm(x, dim=-1)[:, None]
        radii = self._radii.on(x.device)
        variance = self.sigma**2
        # With i0e(z) = e^{-z} I0(z), the exponent is the squared distance to the circle.
        terms = torch.special.i0e(r * radii / variance).log() - (r - radii).square() / (
            2 * variance
        )
        return terms.logsumexp(-1) - math.log(2 * math.pi * variance * len(self.radii))
