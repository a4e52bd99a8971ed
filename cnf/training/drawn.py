"""A torch distribution, a base or a flow as a density to learn: the interface of a `Toy`."""

from functools import cached_property

import torch
from torch import Tensor
from torch.distributions import Distribution

from cnf.data import Points
from cnf.distributions import Base, FromTorch, as_base
from cnf.flow import Flow

DRAWS = 100_000  # for an entropy that has no formula


class Drawn:
    """What can be drawn from and evaluated, under the names that a `Toy` has.

    Args:
        source: The distribution; what it draws must be of shape (D,) for `dim` and the like.

    Attributes:
        name: The name of its class.
    """

    source: str | None = None  # no file
    columns: tuple[str, ...] | None = None

    def __init__(self, source: Distribution | Base | Flow) -> None:
        self.name = type(source).__name__
        self.inner = as_base(source, ()) if isinstance(source, Distribution) else source

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """n draws."""
        return self.inner.sample((n,), generator=generator)

    @torch.no_grad()
    def log_prob(self, x: Tensor) -> Tensor:
        """Log-density in nats, of the distribution's batch."""
        return self.inner.log_prob(x)

    @property
    def dim(self) -> int:
        """D."""
        shape = self.inner.event_shape
        if len(shape) != 1:
            raise ValueError(
                f"{self.name}: expected a distribution of vectors, shape (D,), got {shape}; one "
                "number is a vector of one: Normal(torch.zeros(1), torch.ones(1))"
            )
        return shape[0]

    @property
    def sizes(self) -> dict[str, int]:
        """The options of a model of it."""
        return {"dim": self.dim}

    @cached_property
    def support(self) -> Tensor:
        """A box with nearly all draws, low and high corner, shape (2, D)."""
        return Points(self.sample(10_000, _generator())).support

    @cached_property
    def entropy(self) -> float:
        """In nats: torch's formula, else the mean of -log p over 100,000 draws."""
        if isinstance(self.inner, FromTorch):
            try:
                return float(self.inner.distribution.entropy())
            except NotImplementedError:
                pass
        drawn = self.sample(DRAWS, _generator())
        return -float(self.log_prob(drawn).double().mean())


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)
