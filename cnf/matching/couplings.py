"""Couplings: which base sample is paired with which data point.

The functions here pair the rows of one batch; `cnf.matching.semidiscrete` pairs base samples with
the rows of a whole data set.
"""

import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cnf.errors import expect_positive, optional, warn
from cnf.random import device_of
from cnf.registry import Registry

COUPLINGS = Registry("coupling")


class Pairing(NamedTuple):
    """Which rows of x0 and x1 form pairs, as indices, so that a context follows its data point.

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
    """Pair row k of x0 with row k of x1, which are independent draws.

    Args:
        x0: Base samples, shape (N, *event).
        x1: Data, shape (N, *event).
        context: Condition of each row of x1, shape (N, C); it has no influence.
        generator: Not used: the pairing is deterministic.

    Returns:
        All rows in order, with equal weights.

    Raises:
        ValueError: There are no rows, or x0 and x1 differ in shape.
    """
    _expect_rows("independent", x0, x1)
    _expect_equal_sizes("independent", len(x0), len(x1))
    return Pairing()


@COUPLINGS.register("minibatch-ot")
def minibatch_ot(
    x0: Tensor,
    x1: Tensor,
    context: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Pairing:
    """Pair rows by the permutation that minimizes Σ‖x0 - x1‖², so that each is used once.

    The cost grows as about N² log N, 100 ms for 1,024 rows; "semidiscrete" pairs large numbers at
    a lower cost. The context has no influence, so given one context, the paired base samples no
    longer follow the base distribution: with a context use "conditional-ot".

    Source: Tong et al. (2024), https://arxiv.org/abs/2302.00482; Pooladian et al. (2023),
    https://arxiv.org/abs/2304.14772.

    Args:
        x0: Base samples, shape (N, *event).
        x1: Data, shape (N, *event).
        context: Condition of each row of x1, shape (N, C); ignored, with a warning.
        generator: Not used: the pairing is deterministic.

    Returns:
        For each row of x0 a row of x1, with equal weights.

    Raises:
        ValueError: There are no rows, x0 and x1 differ in shape, or a distance is not finite.
    """
    _warn_context_ignored("minibatch-ot", context)
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
    """Pair rows by the permutation that minimizes Σ‖x0 - x1‖² + w·‖c0 - c1‖² (C2OT).

    Row k of x0 is assigned the context c0 of row k of x1 before the permutation, which penalizes
    pairs whose contexts differ. If more than half of the contexts occur more than once (labels),
    only rows with equal contexts are permuted. The scale of a context column determines its
    influence: `FlowMatching` gives contexts as the field sees them, standardized if the flow
    standardizes them. A missing value (NaN) is a value of its own.

    Source: Cheng & Schwing (2025), https://arxiv.org/abs/2503.10636.

    Args:
        x0: Base samples, shape (N, *event).
        x1: Data, shape (N, *event).
        context: Condition of each row of x1, shape (N, C); None is the same as minibatch-ot.
        generator: Not used: the pairing is deterministic.
        weight: The weight w of the contexts' squared distance. If None, labels are never mixed,
            and for continuous contexts w is such that a share `candidates` of all pairs has a
            lower cost than the row's own pair.
        candidates: That share, in [0, 1].

    Returns:
        For each row of x0 a row of x1, with equal weights.

    Raises:
        ValueError: There are no rows, x0 and x1 differ in shape, a distance is not finite, or
            there is not one context for each row.
    """
    _expect_rows("conditional-ot", x0, x1)
    _expect_equal_sizes("conditional-ot", len(x0), len(x1))
    cost = squared_distances(x0, x1)
    if context is None:
        return Pairing(j=_permutation("conditional-ot", cost))
    if len(context) != len(x1):
        raise ValueError(
            f"conditional-ot: expected a context for each of {len(x1)} rows, got {len(context)}"
        )
    exact = "donot_use_mm_for_euclid_dist"  # equal contexts are at distance 0, to the bit
    context = _with_missing_flags(context.double())
    apart = torch.cdist(context, context, compute_mode=exact).square()
    if weight is None:
        equal = apart == 0
        labels = bool((equal.sum(1) > 1).float().mean() > 0.5)
        weight = _prohibitive(cost) if labels else _context_weight(cost, apart, candidates)
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
    """Pair each x0 with an x1 drawn from its row of the entropic optimal transport plan.

    The plan P minimizes Σ P_ij‖x0_i - x1_j‖² - reg·H(P) with uniform marginals. It takes 0.2 s for
    1,024 rows, and seconds if reg is below 1/500 of the largest squared distance.

    Source: Cuturi (2013), https://arxiv.org/abs/1306.0895.

    Args:
        x0: Base samples, shape (N, *event).
        x1: Data, shape (M, *event).
        context: Condition of each row of x1, shape (M, C); ignored, with a warning.
        generator: Source of the draws; None for torch's global generator.
        reg: Weight of the entropy, above 0.
        relative: Whether reg is in units of the batch's mean squared distance.

    Returns:
        For each row of x0 a row of x1, with equal weights.

    Raises:
        ValueError: There are no rows, events differ in shape, reg is not positive, or it is too
            small for a finite plan.
    """
    expect_positive("sinkhorn", reg=reg)
    _warn_context_ignored("sinkhorn", context)
    _expect_rows("sinkhorn", x0, x1)
    cost = _numpy(squared_distances(x0, x1))
    reg = reg * cost.mean() if relative else reg
    # Without logarithms it is 20× faster, but needs exp(-cost / reg) in the range of float64.
    method = "sinkhorn" if cost.max() < 500 * reg else "sinkhorn_log"
    plan = optional("ot", "matching").sinkhorn([], [], cost, reg, method=method)
    return _sample_pairs(plan, x1, generator)._replace(weight=None)  # the marginals are uniform


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
    """Pair by entropic transport with relaxed marginals, which is robust to outliers.

    The plan minimizes the transport cost, minus the entropy, plus the Kullback-Leibler divergences
    of its marginals from uniform ones. Each x0 is paired with an x1 drawn from its row.

    Source: Chizat et al. (2018), https://arxiv.org/abs/1607.05816.

    Args:
        x0: Base samples, shape (N, *event).
        x1: Data, shape (M, *event).
        context: Condition of each row of x1, shape (M, C); ignored, with a warning.
        generator: Source of the draws; None for torch's global generator.
        reg: Weight of the entropy, in units of the batch's mean squared distance.
        marginal: Weight of the marginals' divergences, in the same units.

    Returns:
        For each row of x0 a row of x1, and weights: the mass of the plan's rows, of mean 1.

    Raises:
        ValueError: There are no rows, events differ in shape, a weight is not positive, or the
            plan is not finite.
    """
    expect_positive("unbalanced", reg=reg, marginal=marginal)
    _warn_context_ignored("unbalanced", context)
    _expect_rows("unbalanced", x0, x1)
    cost = squared_distances(x0, x1)
    uniform = np.full(len(x0), 1 / len(x0))
    plan = optional("ot", "matching").unbalanced.sinkhorn_unbalanced(
        uniform, np.full(len(x1), 1 / len(x1)), _numpy(cost / cost.mean()), reg, marginal,
        method="sinkhorn_stabilized",
    )  # fmt: skip
    return _sample_pairs(plan, x1, generator)


@COUPLINGS.register("partial")
def partial(
    x0: Tensor,
    x1: Tensor,
    context: Tensor | None = None,
    generator: torch.Generator | None = None,
    *,
    mass: float = 0.9,
) -> Pairing:
    """Pair by exact partial transport: a part of the mass at minimal cost, the rest at weight 0.

    Source: Chapel et al. (2020), https://arxiv.org/abs/2002.08276.

    Args:
        x0: Base samples, shape (N, *event).
        x1: Data, shape (M, *event).
        context: Condition of each row of x1, shape (M, C); ignored, with a warning.
        generator: Source of the draws; None for torch's global generator.
        mass: The part of the mass that is transported, in (0, 1].

    Returns:
        For each row of x0 a row of x1, and weights: the mass of the plan's rows, of mean 1.

    Raises:
        ValueError: There are no rows, events differ in shape, or mass is not in (0, 1].
    """
    if not 0 < mass <= 1:
        raise ValueError(f"partial: expected 0 < mass <= 1, got {mass}")
    _warn_context_ignored("partial", context)
    _expect_rows("partial", x0, x1)
    cost = squared_distances(x0, x1)
    sides = [np.full(n, 1 / n) for n in cost.shape]
    plan = optional("ot", "matching").partial.partial_wasserstein(
        *sides, _numpy(cost), m=min(mass, *(side.sum() for side in sides)), numItermax=10_000_000
    )
    return _sample_pairs(plan, x1, generator)


def optimal_duals(cost: Tensor) -> Tensor:
    """Optimal dual potentials u, shape (N,), of transport between uniform weights.

    They satisfy u_i + v_j <= cost_ij, with equality where the optimal plan has mass.
    """
    low, high = cost.min(), cost.max()
    cost = (cost - low) / (high - low).clamp(min=1e-300)
    duals = _optimal_plan("optimal_duals", cost)[1]["u"]
    return torch.from_numpy(duals).to(cost) * (high - low) + low


def squared_distances(x0: Tensor, x1: Tensor) -> Tensor:
    """Squared distances ‖x0_i - x1_j‖², shape (N, M), in float64.

    Args:
        x0: Base samples, shape (N, *event).
        x1: Data, shape (M, *event).
    """
    a, b = x0.detach().flatten(1).double(), x1.detach().flatten(1).double()
    center = b.mean(0)  # products of vectors far from the origin would lose digits
    a, b = a - center, b - center
    squares = a.square().sum(1)[:, None] + b.square().sum(1)
    return torch.addmm(squares, a, b.T, alpha=-2).clamp_(min=0)


def _permutation(who: str, cost: Tensor) -> Tensor:
    """The column of each row in the permutation of least cost."""
    plan, _ = _optimal_plan(who, cost / cost.abs().max().clamp(min=1e-300))
    return torch.from_numpy(plan.argmax(1)).to(cost.device)


def optimal(who: str, solve: Callable[..., Any], cost: np.ndarray) -> tuple[Any, dict[str, Any]]:
    """Solve exact optimal transport between uniform weights by POT.

    Args:
        who: The caller, for the message.
        solve: POT's `emd` or `emd2`.
        cost: Costs, shape (N, M).

    Returns:
        What `solve` returns, and its log.

    Raises:
        ValueError: POT does not certify that the plan is optimal.
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


def _optimal_plan(who: str, cost: Tensor) -> tuple[np.ndarray, dict[str, Any]]:
    """The optimal plan and POT's log, for costs within ±1, as POT's tolerance is absolute."""
    _expect_equal_sizes(who, *cost.shape)
    return optimal(who, optional("ot", "matching").emd, _numpy(cost.double()))


def _sample_pairs(plan: np.ndarray, x1: Tensor, generator: torch.Generator | None) -> Pairing:
    """Pair each x0 with an x1 drawn from its row of the plan, weighted by the row's mass."""
    masses = torch.from_numpy(plan).to(device_of(generator, x1))
    rows = masses.sum(1)
    if not torch.isfinite(rows).all() or rows.sum() <= 0:
        raise ValueError(
            "coupling: expected a finite plan, got one that is empty or NaN; raise reg"
        )
    # multinomial needs a positive mass in each row; the pair of a row without mass has weight 0.
    masses = torch.where(rows[:, None] > 0, masses, torch.ones_like(masses))
    j = torch.multinomial(masses, 1, generator=generator).squeeze(1)
    weight = rows * len(rows) / rows.sum()
    return Pairing(j=j.to(x1.device), weight=weight.to(x1))


# These pair without the context.
UNCONDITIONAL = frozenset({minibatch_ot, sinkhorn, unbalanced, partial})


def context_ignored(name: str) -> str:
    """The warning that a coupling pairs without the context."""
    return (
        f"{name} ignores the context, so that a conditional model samples from another base "
        'distribution than it was trained with; take coupling="conditional-ot"'
    )


def _warn_context_ignored(name: str, context: Tensor | None) -> None:
    if context is not None:
        warn(context_ignored(name))


def _context_weight(cost: Tensor, apart: Tensor, candidates: float) -> float:
    """The weight at which a share `candidates` of all pairs costs less than the row's own pair."""
    cheaper_below = (cost.diagonal()[:, None] - cost) / apart
    # Pairs of equal contexts, such as a row's own, are the same at every weight: 0/0 or x/0.
    found = torch.where(apart > 0, cheaper_below, -torch.inf).flatten().sort().values
    return max(0.0, found[math.ceil((1 - candidates) * (len(found) - 1))].item())


def _prohibitive(cost: Tensor) -> float:
    """A weight above the cost of any permutation, so that unequal contexts are never paired."""
    return len(cost) * cost.max().item() + 1.0


def _with_missing_flags(context: Tensor) -> Tensor:
    """Contexts with 0 for each NaN and a flag beside it, so that distances are finite."""
    missing = context.isnan()
    return torch.cat([context.nan_to_num(0.0), missing.to(context)], 1)


def _numpy(tensor: Tensor) -> np.ndarray:
    return tensor.cpu().numpy()


def _expect_rows(who: str, x0: Tensor, x1: Tensor) -> None:
    """Raise ValueError unless both have rows, and their events have one shape."""
    if not len(x0) or not len(x1):
        raise ValueError(
            f"{who}: expected one row of x0 and of x1 or more, got {len(x0)} and {len(x1)}"
        )
    if x0.shape[1:] != x1.shape[1:]:
        raise ValueError(
            f"{who}: expected x0 and x1 of one event shape, got {tuple(x0.shape[1:])} and "
            f"{tuple(x1.shape[1:])}"
        )


def _expect_equal_sizes(who: str, base: int, data: int) -> None:
    if base != data:
        raise ValueError(f"{who}: expected as many x0 as x1, got {base} and {data}")
