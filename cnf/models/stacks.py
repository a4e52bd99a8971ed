"""Stacks of layers with maps between them that mix the variables."""

from collections.abc import Callable

import torch

from cnf.distributions import Base, UniformAngles
from cnf.errors import expect_choice, expect_counts
from cnf.flow import Flow
from cnf.models.build import Dequantize, Preprocess, assembled
from cnf.transforms.base import Compose, Transform
from cnf.transforms.elementwise import ElementwiseMap, Inverted
from cnf.transforms.linear import LU, Permutation
from cnf.transforms.splines import CircularSpline, RationalQuadratic

HALVES = (None, "shuffle", "lu")  # "reverse" would undo the alternation of the masks
ORDERS = (*HALVES, "reverse")


def stacked(
    transforms: list[Transform],
    dim: int,
    preprocess: Preprocess,
    context_preprocess: str | None,
    dequantization: Dequantize,
    base: Base | None = None,
) -> Flow:
    """A flow of vectors whose transforms are listed from base to data; see `assembled`."""
    return assembled(
        Compose(transforms), (dim,), preprocess, context_preprocess, dequantization, base
    )


def layered(
    layer: Callable[[int], Transform],
    layers: int,
    dim: int,
    between: str | None,
    halves: bool = True,
) -> list[Transform]:
    """Layers 0, 1, … with maps between them that mix the variables.

    Args:
        layer: Function that returns layer k.
        layers: Number of layers.
        dim: Number of variables D.
        between: "shuffle", "lu", None or, if `halves` is false, "reverse".
        halves: Whether layers come in pairs with complementary masks. A shuffle then stands before
            each pair: within one, it could leave a variable unchanged in all layers.

    Raises:
        ValueError: `between` is unknown, or there is no layer.
    """
    expect_choice("models", "between", between, HALVES if halves else ORDERS)
    expect_counts("models", layers=layers)
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
    """A random permutation other than the identity."""
    order = list(range(dim))
    while dim > 1 and order == sorted(order):
        order = torch.randperm(dim).tolist()
    return order


def half(dim: int, k: int) -> range:
    """The half of the variables that layer k leaves unchanged: the first or the last in turn."""
    middle = (dim + 1) // 2
    return range(middle, dim) if k % 2 else range(middle)


def spline(
    who: str,
    bins: int,
    bound: float | None,
    period: float | None,
    between: str | None,
    preprocess: Preprocess,
) -> ElementwiseMap:
    """The spline of a neural spline flow, in closed form from data to base, as in training.

    Args:
        who: Name of the model, for messages.
        bins: Number of bins.
        bound: The spline is the identity beyond ±bound; 5 if None.
        period: Period of the data, for a circular spline; None if they are not angles.
        between: Map between layers, see `layered`.
        preprocess: Preprocessing of the data.

    Raises:
        ValueError: There is a period, and a bound, preprocessing or a linear map too.
    """
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
    """The uniform base of a flow of angles; None without a period, for the default base."""
    return None if period is None else UniformAngles(dim, period)
