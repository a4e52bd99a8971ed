"""Fields made of fields: stacked blocks, a trainable end time, preconditioning."""

import copy
import math
from abc import abstractmethod
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from cnf.fields.base import VectorField, exact_divergence
from cnf.printing import grouped


class Wrapper(VectorField):
    """A field around another.

    Attributes:
        field: The field inside.
    """

    field: VectorField

    def __init__(self, field: VectorField) -> None:
        super().__init__(field.event_shape, field.context_dim)
        self.field = field
        self.optional_context = field.optional_context
        self._blocks: dict[int, Wrapper] = {}

    def extra_repr(self) -> str:
        return repr(self.field)

    @property
    def knots(self) -> tuple[float, ...]:
        return self.field.knots

    def block(self, k: int) -> VectorField:
        """The same wrapper, with the same weights, around the k-th block of the field inside.

        Made once for each k: compiled code is cached under the field that it was compiled for.
        """
        inner = self.field.block(k)
        if inner is self.field:
            return self
        parts = {**self._modules, "field": inner}
        if k not in self._blocks or self._blocks[k]._modules != parts:
            self._blocks[k] = block = copy.copy(self)
            block._modules, block._blocks = parts, {}
        return self._blocks[k]


class Retimed(Wrapper):
    """v(t, x) = r · field(s, x) with a clock s of rate r = ds/dt, solved in one go.

    The clock may be trained, so that knots inside have no fixed time outside.
    """

    @property
    def knots(self) -> tuple[float, ...]:
        return (0.0, 1.0)

    def block(self, k: int) -> VectorField:
        return self

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

    @abstractmethod
    def _clock(self, t: Tensor) -> tuple[Tensor | int, Tensor]:
        """The rate r, and the time s inside at the time t outside."""


class Piece(Retimed):
    """Block k of K: v(t, x) = K · block(K t - k, x) on [k/K, (k+1)/K].

    Args:
        block: A field on [0, 1].
        index: k.
        count: K.
    """

    def __init__(self, block: VectorField, index: int, count: int) -> None:
        super().__init__(block)
        self.index, self.count = index, count

    def _clock(self, t: Tensor) -> tuple[int, Tensor]:
        return self.count, self.count * t - self.index


class Piecewise(VectorField):
    """Blocks one after the other: block k moves the points while k/K ≤ t < (k+1)/K.

    Stacked blocks are one field, so that one flow holds them, flow matching trains them all, and
    a `Continuous` restarts its solver at each knot, where the velocity jumps.

    Args:
        blocks: Fields on [0, 1] with the same event shape and context.

    Raises:
        ValueError: Blocks of different event shapes or context sizes.
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
    """v(t, x) = T · field(T t, x) on [0, 1]: a solve to a trainable end time T > 0.

    The gradient reaches T as it reaches any weight, in every gradient mode.

    Args:
        field: A field on [0, ∞).
        initial: T at the start.

    Raises:
        ValueError: An initial end time that is not positive.
    """

    def __init__(self, field: VectorField, initial: float = 1.0) -> None:
        super().__init__(field)
        if initial <= 0:
            raise ValueError(f"EndTime: expected an initial end time > 0, got {initial}")
        self.log_end = nn.Parameter(torch.tensor(math.log(initial)))

    def _clock(self, t: Tensor) -> tuple[Tensor, Tensor]:
        end = self.log_end.exp()
        return end, end * t


class Preconditioned(Wrapper):
    r"""v(t, x) = (s'/s) x + field(t, x/s) with s(t)² = t² + (1 - t)².

    The first term alone carries N(0, I) to N(0, I) along linear paths, whose points at t have the
    spread s; the field sees inputs of unit scale and learns only how standardized data differ from
    a Gaussian. As Karras et al. (2022), https://arxiv.org/abs/2206.00364, do for diffusion.

    Args:
        field: What is learned, on [0, 1].
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

    def _coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """s'/s and 1/s, broadcasting over the event."""
        if t.dim():
            t = t.reshape(*t.shape, *[1] * len(self.event_shape))
        u = 2 * t - 1
        twice = 2 / (1 + u * u)  # 1/s²
        return u * twice, twice.sqrt()


def wrapped(field: VectorField) -> Iterator[VectorField]:
    """The field, and what its wrappers hold, from the outside to the inside."""
    yield field
    while isinstance(field, Wrapper):
        field = field.field
        yield field
