"""The registered two-dimensional densities.

The first eight are those of FFJORD's code (Grathwohl et al. 2019,
https://arxiv.org/abs/1810.01367), with uniform angles instead of evenly spaced ones, so that draws
are independent and the formula is the density. Below, u is uniform on [0, 1), ξ and η are standard
normal, and alternatives are equally likely.
"""

import math
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from cnf.data.cells import Cells
from cnf.data.density import Toy
from cnf.data.noisy_curves import BlurredSquare, Curves, Gaussian, Rings
from cnf.data.pinwheel import Pinwheel
from cnf.registry import Registry

TOYS = Registry("density")


def toy(name: str) -> Toy:
    """The density with a name in `TOYS`.

    Raises:
        UnknownNameError: No density has the name, which is a ValueError.

    >>> moons = toy("moons")
    >>> moons.sample(3, torch.Generator().manual_seed(0)).shape
    torch.Size([3, 2])
    >>> moons.log_prob(torch.zeros(5, 2)).shape
    torch.Size([5])
    >>> round(moons.entropy, 3)
    2.394
    """
    TOYS[name]
    return _cached_toy(name)


@cache  # a toy never changes, and computes its entropy and quadrature nodes once
def _cached_toy(name: str) -> Toy:
    return TOYS[name]()


@TOYS.register("swissroll")
def swissroll() -> Toy:
    """Spiral (s·cos s, s·sin s), s = 1.5π(1 + 2u); + (ξ, η); divided by 5."""
    return Curves("swissroll", _swissroll_arms, Gaussian(1 / 5))


def _swissroll_arms(v: Tensor) -> Tensor:
    s = 1.5 * math.pi * (1 + 2 * v)
    return torch.stack([s * s.cos(), s * s.sin()], -1)[None] / 5


@TOYS.register("8gaussians")
def eight_gaussians() -> Toy:
    """Centers 4·(cos, sin)(kπ/4), k = 0…7; + 0.5·(ξ, η); divided by 1.414."""
    return Curves("8gaussians", _octagon(4 / 1.414), Gaussian(0.5 / 1.414), nodes=1)


def _octagon(radius: float) -> Callable[[Tensor], Tensor]:
    def arms(v: Tensor) -> Tensor:
        angle = torch.arange(8, dtype=v.dtype, device=v.device) * math.pi / 4
        centers = radius * torch.stack([angle.cos(), angle.sin()], -1)
        return centers[:, None].expand(-1, len(v), -1)

    return arms


@TOYS.register("pinwheel")
def pinwheel() -> Toy:
    """Arms a = 1 + 0.3ξ, b = 0.1η, turned by 2πk/5 + eᵃ/4, k = 0…4; times 2; see `Pinwheel`."""
    return Pinwheel("pinwheel")


@TOYS.register("circles")
def circles() -> Toy:
    """Circles of radius 1 and ½, angle 2πu; + 0.08·(ξ, η); times 3."""
    return Rings("circles", (3.0, 1.5), 3 * 0.08)


@TOYS.register("moons")
def moons() -> Toy:
    """Arcs (cos πu, sin πu), (1 − cos πu, ½ − sin πu); + 0.1·(ξ, η); times 2; − (1, 0.2)."""
    return Curves("moons", _moons(2.0, (1.0, 0.2)), Gaussian(2 * 0.1), nodes=256)


def _moons(scale: float, shift: tuple[float, float]) -> Callable[[Tensor], Tensor]:
    def arms(v: Tensor) -> Tensor:
        cos, sin = (math.pi * v).cos(), (math.pi * v).sin()
        both = torch.stack([cos, 1 - cos]), torch.stack([sin, 0.5 - sin])
        return torch.stack([scale * x - by for x, by in zip(both, shift, strict=True)], -1)

    return arms


@TOYS.register("2spirals")
def two_spirals() -> Toy:
    """Spirals ±(−s·cos s + ½u′, s·sin s + ½u″), s = 3π√u; divided by 3; + 0.1·(ξ, η)."""
    noise = BlurredSquare(width=0.5 / 3, sigma=0.1)
    return Curves("2spirals", _spiral_arms, noise, power=2)


def _spiral_arms(v: Tensor) -> Tensor:
    s = 3 * math.pi * v
    # The mean ¼ of ½u′ is part of the curve, so that the noise is centered for both signs.
    arm = torch.stack([0.25 - s * s.cos(), 0.25 + s * s.sin()], -1) / 3
    return torch.stack([arm, -arm])


@TOYS.register("checkerboard")
def checkerboard() -> Toy:
    """Uniform on eight of the squares of side 2 of [-4, 4]², including the lower left one."""
    board = 1 - (torch.arange(4)[:, None] + torch.arange(4)) % 2
    return Cells("checkerboard", board, (-4.0, -4.0), (4.0, 4.0))


@TOYS.register("rings")
def rings() -> Toy:
    """Circles of radius 1, ¾, ½ and ¼, angle 2πu; times 3; + 0.08·(ξ, η)."""
    return Rings("rings", (3.0, 2.25, 1.5, 0.75), 0.08)


@TOYS.register("25gaussians")
def twenty_five_gaussians() -> Toy:
    """Centers (2i, 2j), i, j = −2…2; + 0.05·(ξ, η); divided by 2.828.

    Source: the code of Gulrajani et al. (2017), https://arxiv.org/abs/1704.00028.
    """
    return Curves("25gaussians", _grid_arms, Gaussian(0.05 / 2.828), nodes=1)


def _grid_arms(v: Tensor) -> Tensor:
    steps = torch.arange(-2, 3, dtype=v.dtype, device=v.device) * 2 / 2.828
    return torch.cartesian_prod(steps, steps)[:, None].expand(-1, len(v), -1)


@TOYS.register("scurve")
def scurve() -> Toy:
    """Arcs ±(sin t, cos t − 1), t = 3πu/2; + 0.05·(ξ, η); times 1.5.

    These are the first and last coordinate of scikit-learn's s-curve, with the noise and scale of
    Tong et al. (2024), https://arxiv.org/abs/2302.00482.
    """
    return Curves("scurve", _scurve_arms, Gaussian(1.5 * 0.05), nodes=256)


def _scurve_arms(v: Tensor) -> Tensor:
    t = 1.5 * math.pi * v
    half = 1.5 * torch.stack([t.sin(), t.cos() - 1], -1)
    return torch.stack([half, -half])


@TOYS.register("8gaussians-r5")
def eight_gaussians_r5() -> Toy:
    """Centers 5·(cos, sin)(kπ/4), k = 0…7; + (ξ, η).

    This is called 8gaussians in the literature on flow matching.

    Source: Tong et al. (2024), https://arxiv.org/abs/2302.00482.
    """
    return Curves("8gaussians-r5", _octagon(5.0), Gaussian(1.0), nodes=1)


@TOYS.register("8gaussians-r12")
def eight_gaussians_r12() -> Toy:
    """Centers 12·(cos, sin)(kπ/4), k = 0…7; + 1.5·(ξ, η).

    It is the target of "moons-x7" in Tong et al. (2024), https://arxiv.org/abs/2302.00482.
    """
    return Curves("8gaussians-r12", _octagon(12.0), Gaussian(1.5), nodes=1)


@TOYS.register("moons-x2")
def moons_x2() -> Toy:
    """Arcs as of moons, but with + 0.05·(ξ, η) and − (1, 1).

    This is called moons in the literature on flow matching.

    Source: Tong et al. (2024), https://arxiv.org/abs/2302.00482.
    """
    return Curves("moons-x2", _moons(2.0, (1.0, 1.0)), Gaussian(2 * 0.05), nodes=256)


@TOYS.register("moons-x7")
def moons_x7() -> Toy:
    """Arcs of moons with + 0.1·(ξ, η), standardized over both coordinates; times 7.

    It is the source that Tong et al. (2024), https://arxiv.org/abs/2302.00482, map to
    "8gaussians-r12".
    """
    # Before scaling E x² = 1.01 and E y² = 0.635 - 1/π, and both coordinates have the mean 3/8.
    scale = 7 / math.sqrt((1.01 + 0.635 - 1 / math.pi) / 2 - 0.375**2)
    shift = 0.375 * scale
    return Curves("moons-x7", _moons(scale, (shift, shift)), Gaussian(scale * 0.1), nodes=256)
