"""Two energies on the plane with two basins, and their free energies by quadrature.

Energies are in units of kT; a free energy is F = -log Z, and the difference between the basins is
F(second) - F(first).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Generator, Tensor

PANELS, NODES = 40, 16  # of the quadrature along each axis: Gauss-Legendre nodes of each panel


@dataclass(frozen=True)
class System:
    """An energy with two basins, on either side of a line.

    Attributes:
        energy: Points, (N, 2) → (N,), in kT.
        axes: Orthonormal rows, shape (2, 2), float64: the first is the coordinate that tells the
            basins apart, the second runs along the line between them.
        split: The line's value of the coordinate; below it is the first basin.
        box: Low and high end of the coordinate and of the other axis, beyond which there is no
            mass.
        minima: The deepest point of each basin, shape (2, 2).
    """

    energy: Callable[[Tensor], Tensor]
    axes: Tensor
    split: float
    box: tuple[tuple[float, float], tuple[float, float]]
    minima: Tensor

    def log_density(self, x: Tensor) -> Tensor:
        """-U(x)/kT, shape (N,)."""
        return -self.energy(x)

    def coordinate(self, x: Tensor) -> Tensor:
        """What tells the basins apart, shape (N,)."""
        return x @ self.axes[0].to(x)

    def log_density_in(self, basin: int) -> Callable[[Tensor], Tensor]:
        """The log-density inside of a basin, -inf outside of it.

        Args:
            basin: 0 for the first, below the split, or 1.
        """

        def restricted(x: Tensor) -> Tensor:
            outside = (self.coordinate(x) >= self.split) != bool(basin)
            return self.log_density(x).masked_fill(outside, -math.inf)

        return restricted

    def free_energies(self) -> tuple[float, float]:
        """F = -log Z of each basin, by quadrature."""
        (low, high), _ = self.box
        first = self._free_energy(low, self.split)
        return first, self._free_energy(self.split, high)

    def log_evidence(self) -> float:
        """The log of the integral of exp(-U) over the plane."""
        return float(np.logaddexp(*(-f for f in self.free_energies())))

    def difference(self) -> float:
        """The free energy of the second basin above that of the first."""
        first, second = self.free_energies()
        return second - first

    def profile(self, edges: Tensor) -> Tensor:
        """F = -log of the mass between edges of the coordinate, of the whole mass, (bins,).

        Args:
            edges: Ends of the bins, ascending, shape (bins + 1,).
        """
        ends = edges.tolist()
        bins = [self._free_energy(*pair, panels=1) for pair in zip(ends, ends[1:], strict=False)]
        return torch.tensor(bins, dtype=torch.float64) + self.log_evidence()

    def _free_energy(self, low: float, high: float, panels: int = PANELS) -> float:
        """F of a strip of the coordinate."""
        s, log_s = gauss_legendre(low, high, panels)
        r, log_r = gauss_legendre(*self.box[1], PANELS)
        grid = torch.cartesian_prod(s, r) @ self.axes
        log_weight = (log_s[:, None] + log_r).flatten()
        return -float((log_weight + self.log_density(grid)).logsumexp(0))


def gauss_legendre(low: float, high: float, panels: int) -> tuple[Tensor, Tensor]:
    """Nodes of a Gauss-Legendre rule in equal panels, and the logs of their weights, float64.

    Args:
        low: Lower end.
        high: Upper end.
        panels: How many.
    """
    node, weight = (torch.from_numpy(each) for each in np.polynomial.legendre.leggauss(NODES))
    half = (high - low) / panels / 2
    middle = low + half * (2 * torch.arange(panels, dtype=torch.float64) + 1)
    return (middle[:, None] + half * node).flatten(), (half * weight).log().repeat(panels)


def double_well(a: float = 1.0, b: float = 6.0, c: float = 1.0, d: float = 1.0) -> System:
    """U = a x⁴/4 - b x²/2 + c x + d y²/2; the second basin is higher by about 2 c √(b/a).

    The form is that of Noé et al. (2019), https://arxiv.org/abs/1812.01729.

    Args:
        a: Coefficient of x⁴/4.
        b: Coefficient of -x²/2.
        c: Coefficient of x.
        d: Coefficient of y²/2.
    """

    def energy(x: Tensor) -> Tensor:
        u, v = x.unbind(-1)
        return a * u**4 / 4 - b * u.square() / 2 + c * u + d * v.square() / 2

    roots = np.sort(np.roots([a, 0.0, -b, c]).real)  # of dU/dx: minimum, barrier, minimum
    minima = torch.tensor([[roots[0], 0.0], [roots[2], 0.0]]).float()
    return System(
        energy,
        torch.eye(2, dtype=torch.float64),
        float(roots[1]),
        ((-6.0, 6.0), (-9.0, 9.0)),
        minima,
    )


# Müller & Brown (1979), https://doi.org/10.1007/BF00547608: heights, quadratic forms, centers.
HEIGHTS = (-200.0, -100.0, -170.0, 15.0)
FORMS = ((-1.0, 0.0, -10.0), (-1.0, 0.0, -10.0), (-6.5, 11.0, -6.5), (0.7, 0.6, 0.7))
CENTERS = ((1.0, 0.0), (0.0, 0.5), (-0.5, 1.5), (-1.0, 1.0))
SADDLE = (-0.822002, 0.624313)  # between the deepest minimum and the two others


def mueller_brown(temperature: float = 10.0) -> System:
    """The potential of Müller and Brown (1979); the second basin holds two of its three minima.

    The basins are told apart by (x - y)/√2, at the saddle.

    Args:
        temperature: kT, in the units of the heights.
    """

    def energy(x: Tensor) -> Tensor:
        total = torch.zeros_like(x[..., 0])
        for height, (a, b, c), (u0, v0) in zip(HEIGHTS, FORMS, CENTERS, strict=True):
            u, v = x[..., 0] - u0, x[..., 1] - v0
            total = total + height * (a * u.square() + b * u * v + c * v.square()).exp()
        return total / temperature

    axes = torch.tensor([[1.0, -1.0], [1.0, 1.0]], dtype=torch.float64) / math.sqrt(2)
    minima = torch.tensor([[-0.558224, 1.441726], [0.623499, 0.028038]])
    split = (SADDLE[0] - SADDLE[1]) / math.sqrt(2)
    return System(energy, axes, split, ((-4.0, 3.0), (-3.0, 4.0)), minima)


SYSTEMS = {"double-well": double_well, "mueller-brown": mueller_brown}


def metropolis(
    system: System, chains: int, steps: int, width: float, generator: Generator
) -> Tensor:
    """Every tenth point of random-walk Metropolis chains, half of which start in each minimum.

    Args:
        system: What is sampled.
        chains: How many.
        steps: Of each chain; the first tenth is left out.
        width: Standard deviation of a proposed step.
        generator: Source of the draws.

    Returns:
        Points, shape (steps kept, chains, 2): between them a chain may have stayed, but seldom.
    """
    x = system.minima.repeat_interleave(chains // 2, 0)
    log_p, path = system.log_density(x), []
    for _ in range(steps):
        proposal = x + width * torch.randn(x.shape, generator=generator)
        log_q = system.log_density(proposal)
        take = torch.rand(len(x), generator=generator).log() < log_q - log_p
        x, log_p = torch.where(take[:, None], proposal, x), torch.where(take, log_q, log_p)
        path.append(x)
    return torch.stack(path[steps // 10 :: 10])
