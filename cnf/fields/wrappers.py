"""Fields that wrap other fields: stacked blocks, a trainable end time, preconditioning."""

import copy
import math
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from cnf.errors import expect_positive
from cnf.fields.base import HasTangents, VectorField, exact_divergence, tangent_products
from cnf.printing import grouped


class Wrapper(VectorField):
    """A field that is computed from another field.

    Attributes:
        field: The wrapped field.
    """

    field: VectorField

    def __init__(self, field: VectorField) -> None:
        super().__init__(field.event_shape, field.context_dim)
        self.field = field
        self.optional_context = field.optional_context
        self._copies: dict[Any, Self] = {}

    def extra_repr(self) -> str:
        return repr(self.field)

    @property
    def knots(self) -> tuple[float, ...]:
        return self.field.knots

    def block(self, k: int) -> VectorField:
        """The same wrapper, with the same weights, of the k-th block of the wrapped field."""
        inner = self.field.block(k)
        return self if inner is self.field else self._around(inner, ("block", k))

    def until(self, stop: float | Tensor) -> VectorField:
        """The same wrapper, with the same weights, of the wrapped field's average velocity."""
        inner = self.field.until(stop)
        return self._around(inner, None if isinstance(stop, Tensor) else ("until", stop))

    def _around(self, inner: VectorField, name: Any) -> Self:
        """A copy that wraps another field, made once for each name unless that is None.

        Compiled code is cached for the field that it belongs to.
        """
        parts = {**self._modules, "field": inner}
        found = self._copies.get(name)
        if found is None or found._modules != parts:
            found = copy.copy(self)
            found._modules, found._copies = parts, {}
            if name is not None:
                self._copies[name] = found
        return found


class Retimed(Wrapper):
    """The field v(t, x) = r · field(s, x) with a reparametrized time s of rate r = ds/dt.

    The time may be trained, so that the knots of the wrapped field are at no fixed t. Therefore
    it is solved as a single block.
    """

    @property
    def knots(self) -> tuple[float, ...]:
        return (0.0, 1.0)

    def block(self, k: int) -> VectorField:
        return self

    def until(self, stop: float | Tensor) -> VectorField:
        return VectorField.until(self, stop)

    def forward(self, t: Tensor, x: Tensor, context: Tensor | None = None) -> Tensor:
        rate, local = self._clock(t)
        return rate * self.field(local, x, context)

    def with_divergence(
        self, t: Tensor, x: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Velocity and exact divergence, the field's own where it has one.

        Args:
            t: Time, shape () or (*batch,).
            x: Points, shape (*batch, *event).
            context: Condition, shape (*batch, C), or None.
        """
        rate, local = self._clock(t)
        v, div = exact_divergence(self.field, local, x, context)
        return rate * v, rate * div

    def with_tangents(
        self, t: Tensor, x: Tensor, context: Tensor | None, tangents: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See `cnf.fields.HasTangents`, which this is if the wrapped field is.

        Args:
            t: Time, shape () or (*batch,).
            x: Points, shape (*batch, *event).
            context: Condition, shape (*batch, C), or None.
            tangents: Shape (n, *batch, *event).
        """
        rate, local = self._clock(t)
        v, products = tangent_products(self.field, local, x, context, tangents)
        return rate * v, rate * products

    @abstractmethod
    def _clock(self, t: Tensor) -> tuple[Tensor | int, Tensor]:
        """The rate r and the time s of the wrapped field, at time t."""


class Piece(Retimed):
    """Block k of K, v(t, x) = K · block(K t - k, x) for t in [k/K, (k+1)/K].

    Args:
        block: A field on [0, 1].
        index: Index k of the block.
        count: Number of blocks K.
    """

    def __init__(self, block: VectorField, index: int, count: int) -> None:
        super().__init__(block)
        self.index, self.count = index, count

    def _clock(self, t: Tensor) -> tuple[int, Tensor]:
        return self.count, self.count * t - self.index


class Piecewise(VectorField):
    """Stacked blocks: the velocity is that of block k for k/K ≤ t < (k+1)/K.

    Stacked blocks are a single field, so that flow matching trains all of them. A `Continuous`
    restarts its solver at each knot, where the velocity is discontinuous.

    Args:
        blocks: Fields on [0, 1] with the same event shape and context size.

    Raises:
        ValueError: The blocks have different event shapes or context sizes.
    """

    def __init__(self, blocks: Sequence[VectorField]) -> None:
        kinds = {(block.event_shape, block.context_dim) for block in blocks}
        if len(kinds) != 1:
            raise ValueError(
                f"Piecewise: expected blocks of one event shape and context size, got {kinds}"
            )
        super().__init__(*kinds.pop())
        self.optional_context = all(block.optional_context for block in blocks)
        self.pieces = nn.ModuleList(Piece(block, k, len(blocks)) for k, block in enumerate(blocks))

    @property
    def knots(self) -> tuple[float, ...]:
        count = len(self.pieces)
        return tuple(k / count for k in range(count + 1))

    def block(self, k: int) -> VectorField:
        return self.pieces[k]  # pyright: ignore

    def extra_repr(self) -> str:
        return grouped([piece.field for piece in self.pieces])

    def forward(self, t: Tensor, x: Tensor, context: Tensor | None = None) -> Tensor:
        count = len(self.pieces)
        batch = x.shape[: x.dim() - len(self.event_shape)]
        at = (t.detach() * count).long().clamp(0, count - 1).expand(batch)
        v = torch.empty_like(x)
        for k, piece in enumerate(self.pieces):
            rows = at == k
            if not rows.any():
                continue
            own_t = t if t.dim() == 0 else t.expand(batch)[rows]
            own = None if context is None else context.expand(*batch, -1)[rows]
            v[rows] = piece(own_t, x[rows], own).to(v.dtype)
        return v


class EndTime(Retimed):
    """A field with a trainable end time T > 0, v(t, x) = T · field(T t, x) for t in [0, 1].

    T is a parameter like any other, in every gradient mode of the solver.

    Args:
        field: A field on [0, ∞).
        initial: Initial value of T.

    Raises:
        ValueError: The initial end time is not positive.
    """

    def __init__(self, field: VectorField, initial: float = 1.0) -> None:
        super().__init__(field)
        expect_positive("EndTime", initial=initial)
        self.log_end = nn.Parameter(torch.tensor(math.log(initial)))

    def _clock(self, t: Tensor) -> tuple[Tensor, Tensor]:
        end = self.log_end.exp()
        return end, end * t


class Preconditioned(Wrapper):
    r"""A preconditioned field, v(t, x) = (s'/s) x + field(t, x/s) with s(t)² = t² + (1 - t)².

    On a linear path between N(0, I) and N(0, I), points at t have the standard deviation s, and
    the first term is the exact velocity. So the wrapped field has inputs of unit scale, and only
    learns how standardized data differ from a Gaussian.

    Source: Karras et al. (2022), https://arxiv.org/abs/2206.00364, for diffusion models.

    Args:
        field: The field to be trained, on [0, 1].
    """

    def forward(self, t: Tensor, x: Tensor, context: Tensor | None = None) -> Tensor:
        growth, shrink = self._coefficients(t.to(x.dtype))
        return torch.addcmul(self.field(t, shrink * x, context), growth, x)

    def with_divergence(
        self, t: Tensor, x: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Velocity and exact divergence, the field's own where it has one.

        Args:
            t: Time, shape () or (*batch,).
            x: Points, shape (*batch, *event).
            context: Condition, shape (*batch, C), or None.
        """
        growth, shrink = self._coefficients(t.to(x.dtype))
        v, div = exact_divergence(self.field, t, shrink * x, context)
        event = [1] * len(self.event_shape)
        trace = math.prod(self.event_shape) * growth + shrink * div.reshape(*div.shape, *event)
        return growth * x + v, trace.reshape(div.shape)

    def with_tangents(
        self, t: Tensor, x: Tensor, context: Tensor | None, tangents: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See `cnf.fields.HasTangents`, which this is if the wrapped field is.

        Args:
            t: Time, shape () or (*batch,).
            x: Points, shape (*batch, *event).
            context: Condition, shape (*batch, C), or None.
            tangents: Shape (n, *batch, *event).
        """
        growth, shrink = self._coefficients(t.to(x.dtype))
        v, products = tangent_products(self.field, t, shrink * x, context, shrink * tangents)
        return growth * x + v, growth * tangents + products

    def _coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """The coefficients s'/s and 1/s, in a shape that broadcasts over the event."""
        if t.dim():
            t = t.reshape(*t.shape, *[1] * len(self.event_shape))
        u = 2 * t - 1
        twice = 2 / (1 + u * u)  # 1/s²
        return u * twice, twice.sqrt()


def has_tangents(field: VectorField) -> bool:
    """Whether the field, and each that it wraps, is one that `HasTangents`."""
    return all(isinstance(each, HasTangents) for each in wrapped(field))


def wrapped(field: VectorField) -> Iterator[VectorField]:
    """The field and the fields that it wraps, from the outside to the inside."""
    yield field
    while isinstance(field, Wrapper):
        field = field.field
        yield field
