"""The interface of vector fields, and an adapter for any network."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from cnf.errors import expect_choice, expect_shape
from cnf.fields.trace import groups_of, jacobian_times, trace_of_jacobian
from cnf.printing import named, shaped
from cnf.registry import Registry

FIELDS = Registry("field")

EXACT_LIMIT = 1024  # largest D for which D forward-mode passes per evaluation are feasible


class VectorField(nn.Module, ABC):
    """A time-dependent velocity v(t, x, c).

    Attributes:
        event_shape: Shape of one x: (D,) for vectors, (C, H, W) for images.
        context_dim: Size of the context vector c; 0 for an unconditional field.
        optional_context: Whether a conditional field also accepts context=None.
    """

    optional_context = False

    def __init__(self, event_shape: int | Sequence[int], context_dim: int = 0) -> None:
        super().__init__()
        self.event_shape = expect_shape(type(self).__name__, event_shape, "event_shape")
        self.context_dim = context_dim

    @property
    def knots(self) -> tuple[float, ...]:
        """Times from 0 to 1 between which the velocity is smooth; a solver restarts at each."""
        return (0.0, 1.0)

    def block(self, k: int) -> "VectorField":
        """The field between knots k and k + 1, both ends included."""
        return self

    def until(self, stop: float | Tensor) -> "VectorField":
        """The average velocity from t until `stop`, as a field; only a `FlowMap` has it.

        Args:
            stop: A time, or one for each row, shape (*batch,).

        Raises:
            TypeError: The field has no average velocities.
        """
        raise TypeError(
            f"{type(self).__name__}: expected a field of average velocities, a "
            "cnf.fields.FlowMap, as of cnf.models.cnf(…, flow_map=True); other fields take a "
            "solver such as Solver('midpoint', steps=4)"
        )

    @property
    def learns_divergence(self) -> bool:
        """Whether `average_divergence` has an answer."""
        return False

    def average_divergence(self, t: Tensor, x: Tensor, context: Tensor | None = None) -> Tensor:
        """The learned average divergence of a `FlowMap` with a head, shape (*batch,).

        Args:
            t: Time, shape () or (*batch,).
            x: Points, shape (*batch, *event).
            context: Condition, shape (*batch, C), or None.

        Raises:
            TypeError: The field has none.
        """
        raise TypeError(
            f"divergence='learned': expected a cnf.fields.FlowMap with a head, as of "
            f"cnf.models.cnf(…, flow_map=True, divergence_head=True), got a "
            f"{type(self).__name__} without one; take divergence='exact'"
        )

    @abstractmethod
    def forward(self, t: Tensor, x: Tensor, context: Tensor | None = None) -> Tensor:
        """The velocity at (t, x).

        Args:
            t: Time, shape () or (*batch,).
            x: Points, shape (*batch, *event_shape).
            context: Condition, shape (*batch, context_dim) or one that broadcasts to it.

        Returns:
            dx/dt, of x's shape.
        """

    def extra_repr(self) -> str:
        """The text of `repr`; `torch.nn.Module.__repr__(field)` also shows the networks."""
        return shaped(self.event_shape, self.context_dim)

    def __repr__(self) -> str:
        return named(self, self.extra_repr())


@runtime_checkable
class HasDivergence(Protocol):
    """A field that computes its exact divergence itself, in closed form."""

    def with_divergence(
        self, t: Tensor, x: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Velocity, of x's shape, and its exact divergence ∇·v, shape (*batch,).

        Args:
            t: Time, shape () or (*batch,).
            x: Points, shape (*batch, *event).
            context: Condition, shape (*batch, C), or None.
        """
        ...


@runtime_checkable
class HasTangents(Protocol):
    """A field that computes products of its Jacobian together with its velocity."""

    def with_tangents(
        self, t: Tensor, x: Tensor, context: Tensor | None, tangents: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Velocity, of x's shape, and J·τ for each tangent τ, of the tangents' shape.

        Args:
            t: Time, shape () or (*batch,).
            x: Points, shape (*batch, *event).
            context: Condition, shape (*batch, C), or None.
            tangents: Shape (n, *batch, *event).
        """
        ...


def tangent_products(
    field: VectorField, t: Tensor, x: Tensor, context: Tensor | None, tangents: Tensor
) -> tuple[Tensor, Tensor]:
    """What `with_tangents` gives, of any field.

    Of one that does not have it, by forward mode, or by D vector-Jacobian products where torch has
    no forward mode for an operation of the field.

    Args:
        field: The field.
        t: Time, shape () or (*batch,).
        x: Points, shape (*batch, *event).
        context: Condition, shape (*batch, C), or None.
        tangents: Shape (n, *batch, *event).
    """
    if isinstance(field, HasTangents):
        return field.with_tangents(t, x, context, tangents)
    dims = len(field.event_shape)
    return jacobian_times(lambda y: field(t, y, context), x, tangents, dims, field)


def exact_divergence(
    field: VectorField, t: Tensor, x: Tensor, context: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Velocity and exact divergence of any field.

    It is computed by the field's closed form, if it has one, else by D tangents in one pass of
    forward mode, or by D vector-Jacobian products in reverse mode if torch has no forward mode for
    an operation of the field. The tangents of many or large rows are computed in groups of
    `cnf.fields.trace.BYTES`; with gradients, if their graph would be large, they are computed
    once more in the backward pass.

    Args:
        field: The field.
        t: Time, shape () or (*batch,).
        x: Points, shape (*batch, *event).
        context: Condition, shape (*batch, C), or None.

    Raises:
        ValueError: The field has no closed form, and D is above `EXACT_LIMIT`.
    """
    if isinstance(field, HasDivergence):
        return field.with_divergence(t, x, context)
    size = math.prod(field.event_shape)
    if size > EXACT_LIMIT:
        raise ValueError(
            f"log_prob: the exact divergence of {type(field).__name__} takes {size} "
            f"forward-mode directions per evaluation (limit {EXACT_LIMIT}); "
            "use an estimate: log_prob(x, divergence=Hutchinson(probes=8))"
        )
    return _by_groups(field, t, x, context)


def _by_groups(
    field: VectorField, t: Tensor, x: Tensor, context: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Velocity and exact divergence, of as many rows and tangents at once as memory permits."""
    dims = len(field.event_shape)

    def trace(
        t: Tensor, x: Tensor, context: Tensor | None, together: int
    ) -> tuple[Tensor, Tensor]:
        return trace_of_jacobian(
            lambda y: field(t, y, context), x, dims, field, together, (t, context)
        )

    rows, together = groups_of(lambda y: field(t, y, context), x, dims, field)
    batch = x.shape[: x.dim() - dims]
    if rows >= math.prod(batch):
        return trace(t, x, context, together)
    points = x.reshape(-1, *field.event_shape).split(rows)
    times: Sequence[Tensor] = [t] * len(points)
    if t.dim():
        times = t.expand(batch).reshape(-1).split(rows)
    contexts: Sequence[Tensor | None] = [context] * len(points)
    if context is not None and context.dim() > 1:
        contexts = context.expand(*batch, -1).reshape(-1, field.context_dim).split(rows)
    parts = [trace(*own, together) for own in zip(times, points, contexts, strict=True)]
    velocities, divergences = zip(*parts, strict=True)
    return torch.cat(velocities).reshape(x.shape), torch.cat(divergences).reshape(batch)


@FIELDS.register("adapter")
class Adapter(VectorField):
    """Any `nn.Module` as a vector field.

    >>> net = nn.Sequential(nn.Linear(3, 64), nn.SiLU(), nn.Linear(64, 2))
    >>> field = Adapter(net, event_shape=(2,), call="concat")      # net(cat[x, t])
    >>> field(torch.tensor(0.5), torch.zeros(5, 2)).shape
    torch.Size([5, 2])

    Args:
        net: The network.
        event_shape: Shape of one x.
        context_dim: Size of the context; 0 for none.
        call: Arguments with which the network is called: "t, x" or "x, t", where t has shape
            (*batch,) and a context follows as third argument, or "concat" for one tensor
            [x, t, context], concatenated along the last axis.
    """

    def __init__(
        self,
        net: nn.Module,
        event_shape: int | Sequence[int],
        context_dim: int = 0,
        call: str = "t, x",
    ) -> None:
        super().__init__(event_shape, context_dim)
        expect_choice("Adapter", "call", call, ("t, x", "x, t", "concat"))
        self.net = net
        self.call = call

    def extra_repr(self) -> str:
        return f"{type(self.net).__name__}, {super().extra_repr()}"

    def forward(self, t: Tensor, x: Tensor, context: Tensor | None = None) -> Tensor:
        """The velocity, which is the network's output.

        Raises:
            ValueError: The output does not have x's shape.
        """
        batch = x.shape[: x.dim() - len(self.event_shape)]
        t = t.expand(batch)
        if context is not None:
            context = context.expand(*batch, self.context_dim)
        if self.call == "concat":
            parts = [x, t.unsqueeze(-1)] + ([] if context is None else [context])
            v = self._call_concatenated(torch.cat(parts, -1))
        else:
            first, second = (t, x) if self.call == "t, x" else (x, t)
            v = self.net(first, second, *([] if context is None else [context]))
        if not isinstance(v, Tensor) or v.shape != x.shape:
            got = tuple(v.shape) if isinstance(v, Tensor) else f"a {type(v).__name__}"
            raise ValueError(
                f"Adapter: expected {type(self.net).__name__} to return a velocity of x's shape "
                f"{tuple(x.shape)}, got {got}"
            )
        return v

    def _call_concatenated(self, inputs: Tensor) -> Tensor:
        try:
            return self.net(inputs)
        except RuntimeError as error:
            if "shapes cannot be multiplied" not in str(error):
                raise
            parts = "x, t and the context" if self.context_dim else "x and t"
            raise ValueError(
                f"Adapter: expected {type(self.net).__name__} to accept {parts} in one tensor of "
                f"{inputs.shape[-1]} columns, got an error: {error}"
            ) from error
