"""Quantities that are integrated along each trajectory: penalties and diagnostics."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from cnf.fields.base import VectorField
from cnf.fields.guidance import NullContext
from cnf.fields.potential import PotentialField
from cnf.fields.trace import jacobian_columns
from cnf.registry import Registry

REGULARIZERS = Registry("regularizer")


class Point(NamedTuple):
    """The arguments of an integrand.

    Attributes:
        field: The vector field.
        t: Time, shape ().
        x: Points, shape (*batch, *event).
        context: Condition, shape (*batch, C), or None.
        v: Velocity at (t, x), of x's shape.
        products: The product εᵀJ, or J ε, of each probe, shape (probes, *batch, *event), if the
            divergence is estimated from them, else None.
    """

    field: VectorField
    t: Tensor
    x: Tensor
    context: Tensor | None
    v: Tensor
    products: Tensor | None = None


Integrand = Callable[[Point], Tensor]


@REGULARIZERS.register("kinetic")
def kinetic_energy(point: Point) -> Tensor:
    """The squared speed ‖v‖², shape (*batch,).

    Its integral is the transport cost of Benamou and Brenier (2000).

    Source: Finlay et al. (2020), RNODE, https://arxiv.org/abs/2002.02798.
    """
    return point.v.square().flatten(_batch_dims(point)).sum(-1)


@REGULARIZERS.register("jacobian")
def jacobian_norm(point: Point) -> Tensor:
    """The squared Frobenius norm ‖J‖² of the Jacobian, shape (*batch,).

    With Hutchinson's divergence it is estimated by ‖εᵀJ‖² or ‖J ε‖², whose means are equal, from
    the same products, at no further cost. With the exact divergence it is exact, from D tangents.

    Source: Finlay et al. (2020), RNODE, https://arxiv.org/abs/2002.02798.
    """
    start = _batch_dims(point)
    if point.products is not None:
        return point.products.square().flatten(start + 1).sum(-1).mean(0)
    _, columns = jacobian_columns(
        lambda y: point.field(point.t, y, point.context),
        point.x,
        len(point.field.event_shape),
        point.field,
    )
    return columns.square().flatten(start + 1).sum((0, -1))


@REGULARIZERS.register("hjb")
def hjb_residual(point: Point) -> Tensor:
    """The residual |∂φ/∂t + ‖∇φ‖²/2| of the Hamilton-Jacobi-Bellman equation, shape (*batch,).

    The field is the gradient of a potential φ. The residual is zero for optimal transport.

    Source: Onken et al. (2021), OT-Flow, https://arxiv.org/abs/2006.00104.

    Raises:
        TypeError: The field is not a `PotentialField`.
    """
    field, context = point.field, point.context
    if isinstance(field, NullContext):
        field, context = field.field, field.filled(context)
    if not isinstance(field, PotentialField):
        raise TypeError(
            f"hjb: expected a PotentialField, got {type(field).__name__}; "
            "only the gradient of a potential has a Hamilton-Jacobi-Bellman residual"
        )
    change = field.time_derivative(point.t, point.x, context)
    return (change + kinetic_energy(point) / 2).abs()


def _batch_dims(point: Point) -> int:
    return point.x.dim() - len(point.field.event_shape)
