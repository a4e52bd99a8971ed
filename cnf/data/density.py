"""The base class of two-dimensional densities with a formula."""

import math
from abc import ABC, abstractmethod
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from cnf.errors import expect_event, expect_generator, is_count
from cnf.random import device_of


class Toy(ABC):
    r"""A density on the plane with exact draws, log-density and entropy.

    A subclass draws rows and evaluates rows, both in float64; this class handles shapes, dtypes
    and memory. `cnf.data.toy(name)` returns a registered one.

    Args:
        name: Name of the density.
        low: Lower corner (x, y) of a box that contains all mass up to 1e-5.
        high: Upper corner (x, y) of that box.
        shape: Number of cells along x and along y for an accurate midpoint rule over the box.

    Attributes:
        dim: 2.
        support: The box as a float32 tensor of shape (2, 2): row 0 the lower corner, row 1 the
            upper corner.
    """

    dim = 2
    sizes = {"dim": 2}  # options of a model for it
    source: str | None = None  # the file it was read from
    columns: tuple[str, ...] | None = None  # names, which only tables have

    def __init__(
        self,
        name: str,
        low: tuple[float, float],
        high: tuple[float, float],
        shape: tuple[int, int],
    ) -> None:
        self.name = name
        self.support = torch.tensor([low, high], dtype=torch.float32)
        self._low, self._high, self._shape = low, high, shape

    @abstractmethod
    def _draw(self, n: int, generator: torch.Generator | None) -> Tensor:
        """Draw independent rows, shape (n, 2), float64."""

    @abstractmethod
    def _log_density(self, x: Tensor) -> Tensor:
        """Log-density in nats, shape (N,), of at most `_chunk` float64 rows x, shape (N, 2)."""

    _chunk = 1024  # times a few hundred quadrature nodes: float64 tables of a few megabytes

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw independent points, shape (n, 2), in float32.

        Args:
            n: Number of points.
            generator: Source of the draws, on whose device they are; None for torch's global one
                on the CPU.

        Raises:
            ValueError: n is not an integer of at least 0.
        """
        expect_count(f"{self.name}.sample", n)
        expect_generator(f"{self.name}.sample", generator)
        return self._draw(n, generator).float()

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-density in nats, shape (*batch,), at points x of shape (*batch, 2).

        It is -inf where there is no mass. It is computed in float64, returned in x's dtype and on
        its device, and differentiable in x.

        Raises:
            ValueError: x is not a floating tensor of shape (*batch, 2).
        """
        expect_event(f"{self.name}.log_prob", "x", x, (2,))
        # Clamped, so that the square of an infinite coordinate is finite.
        rows = x.reshape(-1, 2).double().clamp(-1e100, 1e100)
        value = torch.cat([self._log_density(part) for part in rows.split(self._chunk)])
        # Adding a zero that depends on x keeps NaN, and gives constant densities a zero gradient.
        value = value + 0 * rows.clamp(-1, 1).sum(-1)
        return value.reshape(x.shape[:-1]).to(x)

    def grid(self) -> tuple[Tensor, float]:
        """Midpoints of cells over the support, shape (nx, ny, 2), float64, and the area of a cell.

        The grid is fine enough that the density's sum times the area is its integral over the
        plane.
        """
        axes = []
        for low, high, count in zip(self._low, self._high, self._shape, strict=True):
            edges = torch.linspace(low, high, count + 1, dtype=torch.float64)
            axes.append((edges[1:] + edges[:-1]) / 2)
        box = zip(self._low, self._high, self._shape, strict=True)
        area = math.prod((high - low) / count for low, high, count in box)
        return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1), area

    @cached_property
    def entropy(self) -> float:
        r"""The entropy :math:`-\int p \log p` in nats, by the midpoint rule on `grid()`."""
        points, area = self.grid()
        with torch.no_grad():
            return float(torch.special.entr(self.log_prob(points).exp()).sum() * area)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r})"


class Table:
    """A constant tensor that is copied to each device once, as a copy waits for a GPU.

    >>> Table(torch.tensor([1.0, 2.0])).on(torch.device("cpu"))
    tensor([1., 2.])

    Args:
        value: The tensor.
    """

    def __init__(self, value: Tensor) -> None:
        self._copies = {value.device: value}

    def on(self, device: torch.device) -> Tensor:
        """The tensor on a device."""
        if device not in self._copies:
            self._copies[device] = next(iter(self._copies.values())).to(device)
        return self._copies[device]

    def __reduce__(self) -> Any:  # a process that reads it may have other devices
        return Table, (next(iter(self._copies.values())),)


def expect_count(who: str, n: object) -> None:
    """Raise ValueError, in the name of `who`, unless n is an integer of at least 0."""
    if not is_count(n):
        raise ValueError(f"{who}: expected n to be an integer of at least 0, got {n!r}")


def uniform(*shape: int, generator: torch.Generator | None) -> Tensor:
    """Draw uniform numbers in [0, 1), in float64 and on the generator's device."""
    device = device_of(generator)
    return torch.rand(shape, generator=generator, device=device, dtype=torch.float64)


def normal(*shape: int, generator: torch.Generator | None) -> Tensor:
    """Draw standard normal numbers, in float64 and on the generator's device."""
    device = device_of(generator)
    return torch.randn(shape, generator=generator, device=device, dtype=torch.float64)


def choice(options: int, n: int, generator: torch.Generator | None) -> Tensor:
    """Draw n indices from 0 to options - 1, equally likely, on the generator's device."""
    device = device_of(generator)
    return torch.randint(options, (n,), generator=generator, device=device)


def cells(extent: float, scale: float) -> int:
    """The number of cells along `extent` that resolves a normal of standard deviation `scale`.

    With three cells per standard deviation, the midpoint rule's relative error on a normal is
    below 1e-70.
    """
    return math.ceil(3 * extent / scale)


def grouped_logsumexp(terms: Tensor, group: Tensor, groups: int) -> Tensor:
    """Log of the sum of exponentials over each group, shape (groups,).

    Args:
        terms: Exponents, shape (N,).
        group: Index of each term's group, shape (N,).
        groups: Number of groups; one without terms gives -inf.
    """
    floor = torch.full((groups,), -math.inf, dtype=terms.dtype, device=terms.device)
    top = floor.scatter_reduce(0, group, terms.detach(), "amax")
    total = torch.zeros_like(top).index_add(0, group, (terms - top[group]).exp())
    return total.log() + top
