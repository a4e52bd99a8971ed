"""Stacks of layers, with what mixes the variables between them."""

from collections.abc import Callable

import torch

from cnf.distributions import Base, UniformAngles
from cnf.errors import expect_choice
from cnf.flow import Flow
from cnf.models.build import assembled
from cnf.transforms.base import Compose, Transform
from cnf.transforms.elementwise import ElementwiseMap, Inverted
from cnf.transforms.linear import LU, Permutation
from cnf.transforms.splines import CircularSpline, RationalQuadratic

HALVES = (None, "shuffle", "lu")  # reversed, the next layer would keep the same half again
ORDERS = (*HALVES, "reverse")


def stacked(
    transforms: list[Transform],
    dim: int,
    preprocess: str | None,
    context_preprocess: str | None,
    base: Base | None = None,
) -> Flow:
    """A flow of vectors through transforms, listed from base to data."""
    return assembled(Compose(transforms), (dim,), preprocess, context_preprocess, base)


def layered(
    layer: Callable[[int], Transform],
    layers: int,
    dim: int,
    between: str | None,
    halves: bool = True,
) -> list[Transform]:
    """Layers 0, 1, … with something that mixes the variables between them.

    Args:
        layer: k → layer k.
        layers: How many.
        dim: D.
        between: "shuffle", "lu", None, or, for layers that are not of halves, "reverse".
        halves: Whether layers come in pairs with complementary masks, which a shuffle must not
            part: it could keep the same variable in all layers.
    """
    expect_choice("models", "between", between, HALVES if halves else ORDERS)
    if layers < 1:
        raise ValueError(f"models: expected layers >= 1, got {layers}")
    mixers: dict[str | None, Callable[[int], list[Transform]]] = {
        None: lambda k: [],
        "reverse": lambda k: [Permutation(dim)],
        "shuffle": lambda k: [] if halves and k % 2 else [Permutation(dim, _another_order(dim))],
        "lu": lambda k: [LU(dim)],
    }
    stack = [layer(0)]
    for k in range(1, layers):
        stack += [*mixers[between](k), layer(k)]
    return stack


def _another_order(dim: int) -> list[int]:
    """Drawn at random, but not the order that is there."""
    order = list(range(dim))
    while dim > 1 and order == sorted(order):
        order = torch.randperm(dim).tolist()
    return order


def half(dim: int, k: int) -> range:
    """The first half of the variables, or the last, in turn."""
    middle = (dim + 1) // 2
    return range(middle, dim) if k % 2 else range(middle)


def spline(
    who: str,
    bins: int,
    bound: float | None,
    period: float | None,
    between: str | None,
    preprocess: str | None,
) -> ElementwiseMap:
    """Data to base, the way that training goes, by the spline's formula; the other by its root."""
    if period is None:
        return Inverted(RationalQuadratic(bins, 5.0 if bound is None else bound))
    if between == "lu" or (preprocess, bound) != (None, None):
        raise ValueError(
            f"{who}: angles have no linear map, are not standardized and end at half a period; "
            "with period=… give preprocess=None, no bound and between=None or 'shuffle', got "
            f"{preprocess!r}, {bound} and {between!r}"
        )
    return Inverted(CircularSpline(bins, period / 2))


def angles(dim: int, period: float | None) -> Base | None:
    """The base of a flow of angles, or None for the usual one."""
    return None if period is None else UniformAngles(dim, period)
