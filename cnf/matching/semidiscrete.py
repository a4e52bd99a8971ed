"""The semi-discrete coupling: each base sample finds its partner in the whole data set."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cnf.errors import expect_counts, optional
from cnf.matching.couplings import COUPLINGS, Pairing, conditional_ot, minibatch_ot, optimal_duals

Draw = Callable[[int, torch.Generator | None], Tensor]  # so many base samples, (n, *event)
Search = Callable[[Tensor], Tensor]  # points (n, D) → the row that each belongs to, (n,)

START = (512, 2_000)  # sides of the exact problem whose solution the ascent starts from
QUANTILES = 2**20  # base samples whose quantiles are taken in one dimension
DRAWN = (2**12, 2**15)  # base samples of one step of the ascent, at least and at most
TREE_DIMS = (3, 4)  # above, a tree for the exact partner, or for the near cells, does not pay
NEAR = (5, 6, 8, 16, 32)  # cells looked at, until `AGREED` of all partners are the exact ones
AGREED = 0.995
FEWER = 8  # groups of one level, of which the next has one
BLOCK = 2**24  # numbers of a block of products


@COUPLINGS.register("semidiscrete")
@dataclass(frozen=True)
class SemiDiscrete:
    """Optimal transport from the base distribution itself to the rows of a data set.

    The partner of x0 is the x_j with the least ‖x0 - x_j‖² - ψ_j, where ψ, fitted once, makes each
    row the partner of an equal share of the base. A training step then costs one look-up for each
    base sample, and pairs are not biased by the size of the batch. With a context (labels), each
    label's rows have a ψ of their own, so that samples of every label start from the base.

    `cnf.fit` calls `fit` with the training data; until then a batch is paired within itself, as by
    minibatch-ot or conditional-ot. Of a density, `rows` points are drawn, and trained on.
    Source: Genevay et al. (2016), https://arxiv.org/abs/1605.08527; for flow matching
    Mousavi-Hosseini et al. (2025), https://arxiv.org/abs/2509.25519.

    Args:
        steps: Of the ascent that finds ψ; more for masses that are more equal.
        rows: Data points at most.
    """

    steps: int = 300
    rows: int = 20_000

    def __post_init__(self) -> None:
        expect_counts("SemiDiscrete", steps=self.steps, rows=self.rows)

    def __call__(
        self,
        x0: Tensor,
        x1: Tensor,
        context: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Pairing:
        """Pairs within a batch, by optimal transport between its own rows."""
        coupling = minibatch_ot if context is None else conditional_ot
        return coupling(x0, x1, context, generator)

    def fit(
        self,
        x1: Tensor,
        draw: Draw,
        context: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> "Plan":
        """The coupling of a base and these rows; takes some ten seconds for 10,000 in 2-D.

        Args:
            x1: Data, shape (M, *event).
            draw: Base samples: (n, generator) → (n, *event).
            context: Labels, shape (M, C): rows that have one in common are a group.
            generator: Source of draws.

        Raises:
            ValueError: Contexts that vary continuously, which make no groups; no rows.
        """
        if not len(x1):
            raise ValueError("semidiscrete: expected one row of x1 or more, got 0")
        if context is not None and len(context) != len(x1):
            raise ValueError(
                f"semidiscrete: expected a context for each of {len(x1)} rows, got {len(context)}"
            )

        def solve(rows: Tensor) -> Search:
            flat = rows.detach().flatten(1)
            if flat.shape[1] == 1:
                return _in_order(flat[:, 0], draw(QUANTILES, generator).flatten())
            return _solved(flat, draw, self.steps, generator)

        if context is None:
            return Plan(len(x1), None, [(torch.arange(len(x1), device=x1.device), solve(x1))])
        labels, group = context.nan_to_num(torch.inf).unique(dim=0, return_inverse=True)
        if 2 * len(labels) > len(x1):
            raise ValueError(
                f"semidiscrete: expected a context of labels, got {len(labels)} different ones in "
                f'{len(x1)} rows; for one that varies continuously take coupling="conditional-ot"'
            )
        members = [(group == k).nonzero()[:, 0] for k in range(len(labels))]
        return Plan(len(x1), labels, [(rows, solve(x1[rows])) for rows in members])


@dataclass(frozen=True)
class Plan:
    """A fitted semi-discrete coupling: x0 → rows of the data that it was fitted to.

    Attributes:
        size: M, how many rows there are.
        labels: The contexts of the groups, shape (G, C); None for one group.
        groups: Each group's row numbers, and the search for a partner among them.
    """

    size: int
    labels: Tensor | None
    groups: list[tuple[Tensor, Search]]

    def __call__(
        self,
        x0: Tensor,
        x1: Tensor,
        context: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Pairing:
        """Partners of base samples.

        Args:
            x0: Base samples, shape (N, *event).
            x1: The rows that it was fitted to, shape (M, *event).
            context: The label that each x0 is to have, shape (N, C).
            generator: Not used: a base sample has one partner.
        """
        if len(x1) != self.size:
            raise ValueError(
                f"semidiscrete: expected the {self.size} rows it was fitted to, got {len(x1)}"
            )
        x, j = x0.detach().flatten(1), torch.empty(len(x0), dtype=torch.long, device=x0.device)
        if (context is None) != (self.labels is None):
            raise ValueError("semidiscrete: expected a context if it was fitted with one, only")
        if context is None or self.labels is None:
            rows, search = self.groups[0]
            return Pairing(j=rows[search(x)])
        wanted = (context.nan_to_num(torch.inf)[:, None] == self.labels).all(-1)
        if not wanted.any(1).all():
            raise ValueError("semidiscrete: a context is none of the labels it was fitted with")
        for (rows, search), mine in zip(self.groups, wanted.unbind(1), strict=True):
            if mine.any():
                j[mine] = rows[search(x[mine])]
        return Pairing(j=j)


def _in_order(x1: Tensor, x0: Tensor) -> Search:
    """In one dimension the cells follow each other as the rows do: their ends are quantiles."""
    order, m = x1.argsort(), len(x1)
    ends = x0.sort().values[torch.arange(1, m, device=x0.device) * len(x0) // m]
    return lambda x: order[torch.searchsorted(ends, x[:, 0].to(ends).contiguous())]


@torch.no_grad()
def _solved(x1: Tensor, draw: Draw, steps: int, generator: torch.Generator | None) -> Search:
    """The search for partners among (M, D) rows.

    It maximizes ⟨x, y_j⟩ + p_j, with p = (ψ - ‖y‖²)/2, of points that are moved and scaled so that
    base and data have the origin and the spread in common: trees then prune well.
    """
    x1 = x1.double() if x1.shape[1] <= TREE_DIMS[1] else x1  # few dimensions have narrow cells

    def sample(n: int) -> Tensor:
        return draw(n, generator).detach().flatten(1).to(x1)

    first, center = sample(10_000), x1.mean(0)
    origin = first.mean(0)
    spreads = [(rows - rows.mean(0)).square().mean().sqrt() for rows in (first, x1)]
    scale = (spreads[0] / spreads[1].clamp(min=1e-12)).sqrt()
    y = scale * (x1 - center)

    def standard(n: int) -> Tensor:
        return (sample(n) - origin) / scale

    p, mass, sums = _ascended(y, standard, steps, float(spreads[0] * spreads[1]))
    search = _near(y, p, mass, sums, standard)
    return lambda x: search((x.to(origin) - origin) / scale)


def _ascended(
    y: Tensor, sample: Callable[[int], Tensor], steps: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Potentials p by ascent of the dual, and of each cell the samples' number and sum.

    The dual's gradient is 1/M less the cell's mass, estimated from ever more samples. A potential
    is a sum over groups of rows, from coarse to fine, so that mass also moves far in few steps.
    """
    m = len(y)
    first = _first_potentials(y, sample(min(START[1], max(START[0], m))))
    groups = _groups(y)
    parts = [torch.zeros_like(first) for _ in groups]
    optimizer = torch.optim.Adam(
        parts, lr=0.01 * scale * (y.shape[1] / 2) ** 0.5, betas=(0.9, 0.99), maximize=True
    )
    fall = min(0.1, 100 * m ** (-2 / y.shape[1])) ** (1 / steps)  # to the size of a cell
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, fall)
    mean, mass, sums = torch.zeros_like(first), torch.zeros_like(first), torch.zeros_like(y)
    last = max(1, steps // 5)
    for k in range(steps):
        x = sample(int(min(DRAWN[1], max(DRAWN[0], m * 2 ** (6 * k / steps - 3)))))  # M/8 to 8M
        p = first + sum(part[group] for part, group in zip(parts, groups, strict=True))
        j = _exact(y, p)(x)
        count = torch.bincount(j, minlength=m).to(y)
        if k >= steps - last:
            mean += p / last
            mass += count
            sums.index_add_(0, j, x)
        slope = 1 - count * (m / len(x))
        for part, group in zip(parts, groups, strict=True):
            part.grad = torch.zeros_like(part).index_add_(0, group, slope)
        optimizer.step()
        schedule.step()
    return mean, mass, sums


def _groups(y: Tensor) -> list[Tensor]:
    """The group of each row, at levels from single rows to a few groups."""
    groups, n = [torch.arange(len(y), device=y.device)], len(y) // FEWER
    while n > 1:
        centers = y[_spread_out(len(y), n, y.device)]
        groups.append(torch.cat([torch.cdist(part, centers).argmin(1) for part in y.split(1024)]))
        n //= FEWER
    return groups


def _spread_out(m: int, n: int, device: torch.device) -> Tensor:
    """n of m row numbers, evenly, for the rows may be in an order; each several times if n > m."""
    return torch.arange(n, device=device) * m // n


def _first_potentials(y: Tensor, x: Tensor) -> Tensor:
    """Exact potentials of as many rows as x has, carried over to all rows: from x's side.

    Few rows are repeated, since as few base samples would say little of the base's halves.
    """
    n = len(x)
    few = y[_spread_out(len(y), n, y.device)]
    duals = optimal_duals(-x @ few.T).to(y)
    return torch.cat([(-x @ part.T - duals[:, None]).amin(0) for part in y.split(BLOCK // n)])


def _exact(y: Tensor, p: Tensor) -> Search:
    """argmax_j ⟨x, y_j⟩ + p_j: the nearest of (y_j, √(c - ψ_j)) to (x, 0), or by products."""
    if y.shape[1] > TREE_DIMS[0] or y.device.type != "cpu":
        blocks = max(1, BLOCK // len(y))
        return lambda x: torch.cat(
            [torch.addmm(p, part, y.T).argmax(1) for part in x.split(blocks)]
        )
    square = -2 * p - y.square().sum(1)  # c - ψ, for the least c that there may be
    height = (square - square.min()).sqrt()
    tree = optional("scipy.spatial", "matching").cKDTree(
        _numpy(torch.cat([y, height[:, None]], 1))
    )

    def search(x: Tensor) -> Tensor:
        lifted = np.concatenate([_numpy(x), np.zeros((len(x), 1))], 1)
        return torch.from_numpy(tree.query(lifted, workers=-1)[1])

    return search


def _near(
    y: Tensor, p: Tensor, mass: Tensor, sums: Tensor, sample: Callable[[int], Tensor]
) -> Search:
    """The same, of the cells whose centers are nearest only: a tenth of the time.

    Cells are convex and of equal mass, so that x is in one of the nearest; how many must be looked
    at is found by trying. A cell without a sample is nobody's.
    """
    exact, inside = _exact(y, p), mass.nonzero()[:, 0]
    if y.shape[1] > TREE_DIMS[1] or y.device.type != "cpu":
        return exact
    y, p = y[inside], p[inside]
    tree = optional("scipy.spatial", "matching").cKDTree(_numpy(sums[inside] / mass[inside, None]))

    def search(x: Tensor, cells: int) -> Tensor:
        near = torch.from_numpy(tree.query(_numpy(x), k=np.arange(1, cells + 1))[1])
        value = torch.baddbmm(p[near][..., None], y[near], x[..., None])
        return inside[near.gather(1, value.argmax(1))[:, 0]]

    x = sample(4_096)
    expected = exact(x)
    for cells in NEAR:
        if cells <= len(inside) and (search(x, cells) == expected).float().mean() >= AGREED:
            return lambda x: search(x, cells)
    return exact


def _numpy(tensor: Tensor) -> Any:
    return tensor.cpu().double().numpy()
