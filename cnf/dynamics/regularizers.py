"""Per-sample quantities integrated along a trajectory: costs, penalties, diagnostics."""

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
    """Where an integrand is evaluated, and what is known there.

    Attributes:
        field: The vector field.
        t: Time, shape ().
        x: Points, shape (*batch, *event).
        context: Condition, shape (*batch, C).
        v: Velocity there, of x's shape.
        products: εᵀJ for each probe, shape (probes, *batch, *event), where the divergence is
            estimated by them.
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
    """‖v‖², shape (*batch,): over a trajectory, the cost of Benamou and Brenier (2000).

    Source: Finlay et al. (2020), RNODE, https://arxiv.org/abs/2002.02798.
    """
    return point.v.square().flatten(_batch_dims(point)).sum(-1)


@REGULARIZERS.register("jacobian")
def jacobian_norm(point: Point) -> Tensor:
    """‖J‖² in the Frobenius norm, shape (*batch,).

    Where the divergence is Hutchinson's, the estimate ‖εᵀJ‖² from its own products, at no further
    cost; where it is exact, exact, by D tangents.
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
    """|∂φ/∂t + ‖∇φ‖²/2|, shape (*batch,), of a field that is the gradient of a potential φ.

    It is zero along optimal transport (the Hamilton-Jacobi-Bellman equation).
    Source: Onken et al. (2021), OT-Flow, https://arxiv.org/abs/2006.00104.

    Raises:
        TypeError: The field is no `PotentialField`.
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
