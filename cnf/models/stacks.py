"""Stacks of layers, with what mixes the variables between them."""

from collections.abc import Callable

import torch

from cnf.distributions import Base
from cnf.errors import expect_choice
from cnf.flow import Flow
from cnf.models.build import assembled
from cnf.transforms.base import Compose, Transform
from cnf.transforms.linear import LU, Permutation

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
        halves: Whether layers keep one half of the variables and then the other: those of the
            same order belong together, or a shuffle could keep a variable in all of them.
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
