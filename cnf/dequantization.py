r"""Dequantization: whole numbers, such as the levels of pixels, made continuous.

A density p of y models whole numbers x by P(x) = ∫ p(x + u) du, u in [0, 1)^D. With any density
q(u|x) of the noise,

.. math:: \log P(x) \ge E_{u \sim q}[\log p(x + u) - \log q(u|x)],

and one draw of the right-hand side is what `Flow.log_prob` gives.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cnf.dynamics.fixed import captured
from cnf.errors import abbreviated, expect_counts, expect_shape
from cnf.random import draw
from cnf.registry import Registry
from cnf.transforms.base import Compose, Inverse, Transform
from cnf.transforms.coupling import Coupling
from cnf.transforms.image import ConvCoupling, PerPixel, Squeeze
from cnf.transforms.linear import Permutation


class Dequantization(nn.Module, ABC):
    """Whole numbers 0, …, levels - 1 and the cells [x, x + 1) that stand for them.

    Args:
        levels: How many whole numbers there are: 256 for pixels of 8 bits.
    """

    def __init__(self, levels: int = 256) -> None:
        super().__init__()
        expect_counts(type(self).__name__, least=2, levels=levels)
        self.levels = levels
        self._calls = 0
        self.options: dict[str, Any] = {"levels": levels}

    @property
    def spec(self) -> dict[str, Any] | None:
        """Its name and options, from which `cnf.load` builds it again; None without a name."""
        name = DEQUANTIZATIONS.name_of(self)
        return {"name": name, **self.options} if name else None

    @abstractmethod
    def noise(self, x: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor | float]:
        """A draw u in [0, 1)^D given x, of its shape, and log q(u|x), shape (*batch,) or 0.

        Args:
            x: Whole numbers, shape (*batch, *event), of floating dtype.
            generator: Source of the draw; torch's default generator if None.
        """

    def encode(
        self, x: Tensor, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor | float]:
        """A point y of each cell, of x's shape, and the log-weight -log q(y - x|x).

        Other numbers than levels are refused: on the CPU in any call, on a GPU, which looking
        waits for, in the 1st, 2nd, 4th, 8th, … call.

        Args:
            x: Whole numbers, shape (*batch, *event), of floating dtype.
            generator: Source of the draw; torch's default generator if None.

        Raises:
            ValueError: Numbers that are not whole, below 0, or not below `levels`.
        """
        self._expect_levels(x)
        u, log_q = self.noise(x, generator)
        # Rounding must not carry a point into the next cell, nor out of the last one.
        return torch.minimum(x + u, torch.nextafter(x + 1, x)), -log_q

    def decode(self, y: Tensor) -> Tensor:
        """The whole number whose cell holds y, or the nearest one there is; NaN stays NaN.

        Args:
            y: Points, shape (*batch, *event).
        """
        return y.floor().clamp(0, self.levels - 1)

    def extra_repr(self) -> str:
        return f"{self.levels} levels"

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.extra_repr()})"

    def _expect_levels(self, x: Tensor) -> None:
        self._calls += 1
        if captured() or x.is_meta or not (x.is_cpu or self._calls.bit_count() == 1):
            return
        wrong = (x != x.floor()) | (x < 0) | (x > self.levels - 1)
        if wrong.any():
            values = abbreviated([f"{value:g}" for value in x[wrong][:6].tolist()])
            raise ValueError(
                f"{type(self).__name__}: expected whole numbers from 0 to {self.levels - 1}, got "
                f"{values}; give levels=…, or the pixels as they are, not divided by 255"
            )


DEQUANTIZATIONS = Registry("dequantization", Dequantization)


@DEQUANTIZATIONS.register("uniform")
class UniformDequantization(Dequantization):
    """Uniform noise: q(u|x) = 1.

    Source: Theis et al. (2016), A note on the evaluation of generative models,
    https://arxiv.org/abs/1511.01844.
    """

    def noise(self, x: Tensor, generator: torch.Generator | None) -> tuple[Tensor, float]:
        return draw(torch.rand, x.shape, generator, like=x), 0.0


@DEQUANTIZATIONS.register("variational")
class VariationalDequantization(Dequantization):
    """Noise from a flow given x, trained with the density by maximum likelihood.

    u = Φ(f(e, x)) with e from a standard normal, Φ its distribution function, and f a stack of
    affine couplings, whose conditioners get x and the part of e that they leave unchanged. It
    begins as uniform noise. Flow matching, which trains the field alone, leaves it so.

    Source: Ho et al. (2019), Flow++, https://arxiv.org/abs/1902.00275, with Φ for the sigmoid.

    Args:
        event_shape: (D,), or (C, H, W) with even H and W, or two channels or more.
        levels: How many whole numbers there are.
        layers: Number of couplings.
        hidden: Hidden widths (channels, for images) of their conditioners.

    Raises:
        ValueError: An image of one channel and an odd side.
    """

    def __init__(
        self,
        event_shape: int | Sequence[int],
        levels: int = 256,
        *,
        layers: int = 4,
        hidden: Sequence[int] = (64, 64),
    ) -> None:
        super().__init__(levels)
        expect_counts("VariationalDequantization", layers=layers)
        self.options |= {"layers": layers, "hidden": list(hidden)}
        self.event_shape = expect_shape("VariationalDequantization", event_shape, "event_shape")
        make = _of_vectors if len(self.event_shape) == 1 else _of_images
        self.transform = make(self.event_shape, layers, hidden)

    def noise(self, x: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        event = tuple(range(-len(self.event_shape), 0))
        e = draw(torch.randn, x.shape, generator, like=x)
        centered = 2 * x / (self.levels - 1) - 1
        own = next(self.parameters()).dtype  # of the couplings, whatever the data's
        moved, ladj = self.transform(torch.cat([centered, e], event[0]).to(own))
        v = moved.tensor_split(2, event[0])[1].to(x.dtype)
        return torch.special.ndtr(v), 0.5 * (v.square() - e.square()).sum(event) - ladj

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.transform}"


def _of_vectors(event_shape: tuple[int, ...], layers: int, hidden: Sequence[int]) -> Transform:
    """Couplings of (x, e), 2D numbers, that keep x and every other of the e's in turn."""
    (dim,) = event_shape
    kept = [[i for i in range(dim) if dim > 1 and i % 2 == k % 2] for k in range(layers)]
    return Compose(
        [Coupling(2 * dim, [*range(dim), *(dim + i for i in e)], hidden=hidden) for e in kept]
    )


def _of_images(event_shape: tuple[int, ...], layers: int, hidden: Sequence[int]) -> Transform:
    """Couplings of the channels of (x, e) that keep x and half of the e's in turn."""
    channels, height, width = event_shape
    squeezes = height % 2 == width % 2 == 0
    if channels == 1 and not squeezes:
        raise ValueError(
            "VariationalDequantization: expected images of even height and width, or of two "
            f"channels or more, got {event_shape}; take dequantization='uniform'"
        )
    channels *= 4 if squeezes else 1
    order = torch.arange(2 * channels)
    order[channels:] = order[channels:].roll(channels // 2)
    steps: list[Transform] = []
    for _ in range(layers):
        steps.append(ConvCoupling(2 * channels, channels + channels // 2, hidden=hidden))
        steps.append(PerPixel(Permutation(2 * channels, order.tolist())))
    return Compose([Inverse(Squeeze()), *steps, Squeeze()] if squeezes else steps)
