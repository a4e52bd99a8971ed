"""Couplings: which base sample is paired with which data point.

The functions here pair the rows of one batch; `cnf.matching.semidiscrete` pairs with a whole data
set.
"""

import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cnf.errors import expect_positive, optional
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
    _expect_rows("independent", x0, x1)
    _expect_as_many("independent", len(x0), len(x1))
    return Pairing()


@COUPLINGS.register("minibatch-ot")
def minibatch_ot(
    x0: Tensor,
    x1: Tensor,
    context: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Pairing:
    """The permutation that makes Σ‖x0 - x1‖² least: every row is used once.

    Takes about N² log N time, 100 ms for 1,024 rows. It does not look at the context, so that
    pairs of one context no longer start from the base distribution: see "conditional-ot"; nor,
    in large numbers, at little cost: see "semidiscrete".
    Source: Tong et al. (2024), https://arxiv.org/abs/2302.00482; Pooladian et al. (2023),
    https://arxiv.org/abs/2304.14772.

    Args: as for `independent`.
    """
    _warn_of_context("minibatch-ot", context)
    _expect_rows("minibatch-ot", x0, x1)
    return Pairing(j=_permutation("minibatch-ot", squared_distances(x0, x1)))


@COUPLINGS.register("conditional-ot")
def conditional_ot(
    x0: Tensor,
    x1: Tensor,
    context: Tensor | None = None,
    generator: torch.Generator | None = None,
    *,
    weight: float | None = None,
    candidates: float = 0.01,
) -> Pairing:
    """The permutation that makes Σ‖x0 - x1‖² + w·‖c0 - c1‖² least (C2OT).

    Row k of x0 goes with the context of row k of x1 before the rows are exchanged, so what is far
    apart in context is not exchanged. Where most contexts occur again (labels), rows are exchanged
    only among equals. Columns of the context count by their scale: `FlowMatching` gives contexts
    as the field sees them, standardized where the flow does so.
    Source: Cheng & Schwing (2025), https://arxiv.org/abs/2503.10636.

    Args: as for `independent`, and
        weight: w; None takes the one for which a row would rather have `candidates` of all rows
            than its own.
        candidates: Part of the batch, for contexts that vary continuously.
    """
    _expect_rows("conditional-ot", x0, x1)
    _expect_as_many("conditional-ot", len(x0), len(x1))
    cost = squared_distances(x0, x1)
    if context is None:
        return Pairing(j=_permutation("conditional-ot", cost))
    if len(context) != len(x1):
        raise ValueError(
            f"conditional-ot: expected a context for each of {len(x1)} rows, got {len(context)}"
        )
    exact = "donot_use_mm_for_euclid_dist"  # equal contexts are at distance 0, to the bit
    context = _with_missing(context.double())
    apart = torch.cdist(context, context, compute_mode=exact).square()
    if weight is None:
        equal = apart == 0
        labels = bool((equal.sum(1) > 1).float().mean() > 0.5)
        weight = _beyond(cost) if labels else _weight_for(cost, apart, candidates)
        apart = (~equal).to(cost) if labels else apart
    return Pairing(j=_permutation("conditional-ot", cost + weight * apart))


@COUPLINGS.register("sinkhorn")
def sinkhorn(
    x0: Tensor,
    x1: Tensor,
    context: Tensor | None = None,
    generator: torch.Generator | None = None,
    *,
    reg: float = 0.05,
    relative: bool = True,
) -> Pairing:
    """Entropic optimal transport: each x0 with an x1 drawn from its row of the plan.

    Takes 0.2 s for 1,024 rows, and seconds where reg is below 1/500 of the largest distance.
    Source: Cuturi (2013), https://arxiv.org/abs/1306.0895.

    Args: as for `independent`, and
        reg: Weight of the entropy.
        relative: Count it in the mean squared distance of the batch.
    """
    expect_positive("sinkhorn", reg=reg)
    _warn_of_context("sinkhorn", context)
    _expect_rows("sinkhorn", x0, x1)
    cost = _numpy(squared_distances(x0, x1))
    reg = reg * cost.mean() if relative else reg
    # Scaling takes a twentieth of the time, as long as exp(-cost / reg) stays in float64's range.
    method = "sinkhorn" if cost.max() < 500 * reg else "sinkhorn_log"
    plan = optional("ot", "matching").sinkhorn([], [], cost, reg, method=method)
    return _drawn(plan, x1, generator)._replace(weight=None)  # all rows weigh the same


@COUPLINGS.register("unbalanced")
def unbalanced(
    x0: Tensor,
    x1: Tensor,
    context: Tensor | None = None,
    generator: torch.Generator | None = None,
    *,
    reg: float = 0.05,
    marginal: float = 1.0,
) -> Pairing:
    """Entropic transport that may leave the marginals, as outliers ask for.

    Source: Chizat et al. (2018), https://arxiv.org/abs/1607.05816.

    Args: as for `independent`, and
        reg: Weight of the entropy, in the mean squared distance of the batch.
        marginal: Weight of the marginals' Kullback-Leibler divergences, counted likewise.
    """
    expect_positive("unbalanced", reg=reg, marginal=marginal)
    _warn_of_context("unbalanced", context)
    _expect_rows("unbalanced", x0, x1)
    cost = squared_distances(x0, x1)
    uniform = np.full(len(x0), 1 / len(x0))
    plan = optional("ot", "matching").unbalanced.sinkhorn_unbalanced(
        uniform, np.full(len(x1), 1 / len(x1)), _numpy(cost / cost.mean()), reg, marginal,
        method="sinkhorn_stabilized",
    )  # fmt: skip
    return _drawn(plan, x1, generator)


@COUPLINGS.register("partial")
def partial(
    x0: Tensor,
    x1: Tensor,
    context: Tensor | None = None,
    generator: torch.Generator | None = None,
    *,
    mass: float = 0.9,
) -> Pairing:
    """Exact transport of the cheapest part of the mass; the other rows get weight 0.

    Source: Chapel et al. (2020), https://arxiv.org/abs/2002.08276.

    Args: as for `independent`, and
        mass: The part, in (0, 1].
    """
    if not 0 < mass <= 1:
        raise ValueError(f"partial: expected 0 < mass <= 1, got {mass}")
    _warn_of_context("partial", context)
    _expect_rows("partial", x0, x1)
    cost = squared_distances(x0, x1)
    sides = [np.full(n, 1 / n) for n in cost.shape]
    plan = optional("ot", "matching").partial.partial_wasserstein(
        *sides, _numpy(cost), m=min(mass, *(side.sum() for side in sides)), numItermax=10_000_000
    )
    return _drawn(plan, x1, generator)


def optimal_duals(cost: Tensor) -> Tensor:
    """Of the cheapest plan between equal weights: u with u_i + v_j <= cost_ij, shape (N,)."""
    low, high = cost.min(), cost.max()
    cost = (cost - low) / (high - low).clamp(min=1e-300)
    duals = _exact("optimal_duals", cost)[1]["u"]
    return torch.from_numpy(duals).to(cost) * (high - low) + low


def squared_distances(x0: Tensor, x1: Tensor) -> Tensor:
    """‖x0_i - x1_j‖² between rows, whatever their shape: (N, M), in float64."""
    a, b = x0.detach().flatten(1).double(), x1.detach().flatten(1).double()
    center = b.mean(0)  # far from the origin the products would cancel
    a, b = a - center, b - center
    squares = a.square().sum(1)[:, None] + b.square().sum(1)
    return torch.addmm(squares, a, b.T, alpha=-2).clamp_(min=0)


def _permutation(who: str, cost: Tensor) -> Tensor:
    """The column of each row in the cheapest permutation."""
    plan, _ = _exact(who, cost / cost.abs().max().clamp(min=1e-300))
    return torch.from_numpy(plan.argmax(1)).to(cost.device)


def optimal(who: str, solve: Callable[..., Any], cost: np.ndarray) -> tuple[Any, dict[str, Any]]:
    """What POT's `emd` or `emd2` finds between equal weights, and its log.

    Raises:
        ValueError: It is not known to be the optimum.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the log says the same
        found, log = solve([], [], cost, numItermax=10_000_000, log=True)
    if log["warning"] is not None:
        raise ValueError(
            f"{who}: POT did not find the optimal plan: {log['warning']}; expected finite "
            "costs, look for rows that are NaN or very large"
        )
    return found, log


def _exact(who: str, cost: Tensor) -> tuple[np.ndarray, dict[str, Any]]:
    """The plan between equal weights, of costs within ±1: POT's tolerance is absolute."""
    _expect_as_many(who, *cost.shape)
    return optimal(who, optional("ot", "matching").emd, _numpy(cost.double()))


def _drawn(plan: np.ndarray, x1: Tensor, generator: torch.Generator | None) -> Pairing:
    """Each x0 with an x1 drawn from its row of the plan, weighted by the row's mass."""
    device = x1.device if generator is None else generator.device
    masses = torch.from_numpy(plan).to(device)
    rows = masses.sum(1)
    if not torch.isfinite(rows).all() or rows.sum() <= 0:
        raise ValueError("coupling: the plan came out empty or NaN; raise reg")
    # A row without mass has no partner: any will do, for its weight is 0.
    masses = torch.where(rows[:, None] > 0, masses, torch.ones_like(masses))
    j = torch.multinomial(masses, 1, generator=generator).squeeze(1)
    weight = rows * len(rows) / rows.sum()
    return Pairing(j=j.to(x1.device), weight=weight.to(x1))


def _warn_of_context(name: str, context: Tensor | None) -> None:
    if context is not None:
        warnings.warn(
            f"{name} pairs without looking at the context, so a conditional model starts "
            'from the wrong distribution when it samples; take coupling="conditional-ot"',
            stacklevel=3,
        )


def _weight_for(cost: Tensor, apart: Tensor, candidates: float) -> float:
    """The weight at which rows prefer `candidates` of all columns to their own."""
    preferred_below = (cost.diagonal()[:, None] - cost) / apart
    # Equal contexts, such as a row's own, are as near at any weight: 0/0 or x/0.
    found = torch.where(apart > 0, preferred_below, -torch.inf).flatten().sort().values
    return max(0.0, found[math.ceil((1 - candidates) * (len(found) - 1))].item())


def _beyond(cost: Tensor) -> float:
    """More than any exchange of rows can save."""
    return len(cost) * cost.max().item() + 1.0


def _with_missing(context: Tensor) -> Tensor:
    """Contexts in which a missing value, NaN, is one like any other: a place and a flag."""
    missing = context.isnan()
    return torch.cat([context.nan_to_num(0.0), missing.to(context)], 1)


def _numpy(tensor: Tensor) -> np.ndarray:
    return tensor.cpu().numpy()


def _expect_rows(who: str, x0: Tensor, x1: Tensor) -> None:
    """Raise unless both have rows, of events of one shape."""
    if not len(x0) or not len(x1):
        raise ValueError(
            f"{who}: expected one row of x0 and of x1 or more, got {len(x0)} and {len(x1)}"
        )
    if x0.shape[1:] != x1.shape[1:]:
        raise ValueError(
            f"{who}: expected x0 and x1 of one event shape, got {tuple(x0.shape[1:])} and "
            f"{tuple(x1.shape[1:])}"
        )


def _expect_as_many(who: str, base: int, data: int) -> None:
    if base != data:
        raise ValueError(f"{who}: expected as many x0 as x1, got {base} and {data}")
