"""Fields made of fields: stacked blocks, a trainable end time, preconditioning."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cnf.fields.base import VectorField, exact_divergence

Stretch = tuple[float, float, VectorField]  # start, end, and the field in between


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

    def around(self, field: VectorField) -> "Wrapper | None":
        """The same wrapper, with the same weights, around a block of `field`; None for a wrapper
        that has a clock of its own."""
        return None

    @property
    def stretches(self) -> tuple[Stretch, ...]:
        """The wrapped pieces of a `Piecewise` inside, if there is one; made once for the same
        weights, since the field that a compiled solve knows must not change. Tuples, so that the
        weights are not counted twice."""
        pieces = pieces_of(self.field)
        made_of = (*(piece for _, _, piece in pieces), *self._parameters.values())
        kept, found = self.__dict__.get("_stretches", ((), ()))
        if len(kept) == len(made_of) and all(a is b for a, b in zip(kept, made_of, strict=True)):
            return found
        wrapped = [self.around(piece) for _, _, piece in pieces] if len(pieces) > 1 else [None]
        pairs = [] if None in wrapped else zip(pieces, wrapped, strict=True)
        found = tuple((a, b, w) for (a, b, _), w in pairs if w)
        object.__setattr__(self, "_stretches", (made_of, found))  # nn.Module would register them
        return found


class Piece(Wrapper):
    """Block k of K: v(t, x) = K · block(K t - k, x) on [k/K, (k+1)/K].

    Args:
        block: A field on [0, 1].
        index: k.
        count: K.
    """

    def __init__(self, block: VectorField, index: int, count: int) -> None:
        super().__init__(block)
        self.index, self.count = index, count
        self.start, self.end = index / count, (index + 1) / count

    def forward(self, t: Tensor, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self.count * self.field(self._local(t), x, context)

    def with_divergence(
        self, t: Tensor, x: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Velocity and exact divergence, the block's own where it has one."""
        v, div = exact_divergence(self.field, self._local(t), x, context)
        return self.count * v, self.count * div

    def _local(self, t: Tensor) -> Tensor:
        return self.count * t - self.index


class Piecewise(VectorField):
    """Blocks one after the other: block k moves the points while k/K ≤ t < (k+1)/K.

    Stacked blocks are one field, so that one flow holds them, flow matching trains them all, and
    a `Continuous` restarts its solver at each knot, where the velocity jumps.

    Args:
        blocks: Fields on [0, 1] with the same event shape and context.
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


class EndTime(Wrapper):
    """v(t, x) = T · field(T t, x) on [0, 1]: a solve to a trainable end time T > 0.

    The gradient reaches T as it reaches any weight, in every gradient mode.

    Args:
        field: A field on [0, ∞).
        initial: T at the start.
    """

    def __init__(self, field: VectorField, initial: float = 1.0) -> None:
        super().__init__(field)
        if initial <= 0:
            raise ValueError(f"EndTime: expected an initial end time > 0, got {initial}")
        self.log_end = nn.Parameter(torch.tensor(math.log(initial)))

    def forward(self, t: Tensor, x: Tensor, context: Tensor | None = None) -> Tensor:
        end = self.log_end.exp()
        return end * self.field(end * t, x, context)

    def with_divergence(
        self, t: Tensor, x: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Velocity and exact divergence, the field's own where it has one."""
        end = self.log_end.exp()
        v, div = exact_divergence(self.field, end * t, x, context)
        return end * v, end * div


class Preconditioned(Wrapper):
    r"""v(t, x) = (s'/s) x + field(t, x/s) with s(t)² = t² + (1 - t)².

    The first term alone carries N(0, I) to N(0, I) along linear paths, whose points at t have the
    spread s; the field sees inputs of unit scale and learns only how standardized data differ from
    a Gaussian. As Karras et al. (2022), https://arxiv.org/abs/2206.00364, do for diffusion.

    Args:
        field: What is learned, on [0, 1].
    """

    def around(self, field: VectorField) -> "Preconditioned":
        return Preconditioned(field)

    def forward(self, t: Tensor, x: Tensor, context: Tensor | None = None) -> Tensor:
        growth, shrink = self._coefficients(t.to(x.dtype))
        return torch.addcmul(self.field(t, shrink * x, context), growth, x)

    def with_divergence(
        self, t: Tensor, x: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Velocity and exact divergence, the field's own where it has one."""
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


def innermost(field: VectorField) -> VectorField:
    """The field inside all wrappers; of stacked blocks the first one's."""
    while isinstance(field, Piecewise | Wrapper):
        field = field.pieces[0] if isinstance(field, Piecewise) else field.field  # pyright: ignore
    return field


def pieces_of(field: VectorField) -> Sequence[Stretch]:
    """(start, end, field) in the order of time; one over [0, 1] unless there is a `Piecewise`,
    bare or wrapped."""
    if isinstance(field, Wrapper) and field.stretches:
        return field.stretches
    if not isinstance(field, Piecewise):
        return [(0.0, 1.0, field)]
    return [(piece.start, piece.end, piece) for piece in field.pieces]  # pyright: ignore
