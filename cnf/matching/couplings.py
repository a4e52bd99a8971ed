"""Couplings: which base sample is paired with which data point."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from cnf.registry import Registry

COUPLINGS = Registry("coupling")


class Pairing(NamedTuple):
    """Rows that belong together; indices, so that a context follows its data point.

    Attributes:
        i: Rows of x0, shape (P,); None for all of them in order.
        j: Rows of x1, shape (P,); None for all of them in order.
        weight: Weight of each pair, shape (P,); None for equal weights.
    """

    i: Tensor | None = None
    j: Tensor | None = None
    weight: Tensor | None = None


Coupling = Callable[[Tensor, Tensor, Tensor | None, torch.Generator | None], Pairing]


@COUPLINGS.register("independent")
def independent(
    x0: Tensor,
    x1: Tensor,
    context: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Pairing:
    """Row k of x0 with row k of x1: independent draws, so pairs are independent too.

    Args:
        x0: Base samples, shape (N, *event).
        x1: Data, shape (N, *event).
        context: Condition of each row of x1, shape (N, C); not looked at.
        generator: Not used.
    """
    if len(x0) != len(x1):
        raise ValueError(f"independent: expected as many x0 as x1, got {len(x0)} and {len(x1)}")
    return Pairing()
