"""The semi-discrete coupling: optimal transport from the base distribution to a data set."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cnf.errors import expect_counts, optional
from cnf.matching.couplings import COUPLINGS, Pairing, conditional_ot, minibatch_ot, optimal_duals
from cnf.random import draw as draw_numbers

Draw = Callable[[int, torch.Generator | None], Tensor]  # (n, generator) → base samples (n, *event)
Assignment = Callable[[Tensor], Tensor]  # points (n, D) → the cell that each is assigned to, (n,)

EXACT_ROWS = (512, 2_000)  # rows of the exact problem that initializes the ascent, least and most
QUANTILES = 2**20  # base samples whose quantiles are taken in one dimension, at least
QUANTILES_OF_ROW = 64  # of them for each row
SAMPLES = (2**12, 2**15)  # base samples per step of the ascent, least and most
TREE_DIMS = (3, 4)  # most dimensions in which a tree is faster: for rows, and for cell centers
CANDIDATES = (5, 6, 8, 16, 32)  # cells compared, the first for which `AGREEMENT` is reached
AGREEMENT = 0.995  # share of base samples that are assigned as by all cells
COARSENING = 8  # groups of one level that are one group of the next
BLOCK = 2**24  # entries of a matrix of products


@COUPLINGS.register("semidiscrete")
@dataclass(frozen=True)
class SemiDiscrete:
    """Optimal transport from the base distribution itself to the rows of a data set.

    A base sample x0 is assigned to the row x_j that minimizes ‖x0 - x_j‖² - ψ_j. The potentials ψ
    are fitted once, such that every row is assigned an equal mass of the base. A training step
    then needs one search per base sample, and the pairs have no bias from the batch size. With a
    context (labels), each label's rows have potentials of their own, so that the base samples of
    every label follow the base distribution.

    More rows than `cells` are divided into so many cells of near rows. A base sample is then
    assigned to a cell, by its mean and number of rows, and paired with one of its rows, drawn with
    equal probabilities: the best plan among those that draw within the cells. So training sees
    many rows after a fit to few cells. In one dimension each row is a cell of its own.

    `cnf.fit` calls `fit` with the training data. Before that, a batch is paired as by
    minibatch-ot, or conditional-ot with a context. From a density, `rows` points are drawn and
    trained on.

    Source: Genevay et al. (2016), https://arxiv.org/abs/1605.08527; for flow matching
    Mousavi-Hosseini et al. (2025), https://arxiv.org/abs/2509.25519.

    Args:
        steps: Steps of the stochastic ascent that fits ψ; more for masses that are more equal.
        rows: Largest number of data points, which are held in memory.
        cells: Largest number of cells, of each label if there is a context; more for pairs that
            are nearer to optimal, by a longer fit.

    Raises:
        ValueError: A number is not a whole one of at least 1.
    """

    steps: int = 300
    rows: int = 200_000
    cells: int = 5_000

    def __post_init__(self) -> None:
        expect_counts("SemiDiscrete", steps=self.steps, rows=self.rows, cells=self.cells)

    def __call__(
        self,
        x0: Tensor,
        x1: Tensor,
        context: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Pairing:
        """Pair the rows of a batch by optimal transport between them.

        Args:
            x0: Base samples, shape (N, *event).
            x1: Data, shape (N, *event).
            context: Condition of each row of x1, shape (N, C).
            generator: Not used: the pairing is deterministic.
        """
        coupling = minibatch_ot if context is None else conditional_ot
        return coupling(x0, x1, context, generator)

    def fit(
        self,
        x1: Tensor,
        draw: Draw,
        context: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> "Plan":
        """Fit the coupling of a base and a data set, in about 20 s for 200,000 rows in 2-D.

        Args:
            x1: Data, shape (M, *event).
            draw: Function (n, generator) → base samples of shape (n, *event).
            context: Labels, shape (M, C); rows with equal labels form a group.
            generator: Source of the draws.

        Returns:
            The fitted coupling.

        Raises:
            ValueError: There are no rows, not one context for each, or contexts that vary
                continuously and form no groups.
        """
        if not len(x1):
            raise ValueError("semidiscrete: expected one row of x1 or more, got 0")
        if context is not None and len(context) != len(x1):
            raise ValueError(
                f"semidiscrete: expected a context for each of {len(x1)} rows, got {len(context)}"
            )

        def solve(rows: Tensor) -> tuple[Cells, Assignment]:
            """The cells of some of the rows, and the assignment of base samples to these."""
            flat = x1[rows].detach().flatten(1)
            if flat.shape[1] == 1:
                count = max(QUANTILES, QUANTILES_OF_ROW * len(flat))
                assign = _assignment_1d(flat[:, 0], draw(count, generator).flatten())
                return _single(rows), assign
            cells, centers = _cells(flat, self.cells)
            shares = cells.sizes * (len(centers) / len(rows))
            assign = _fitted_assignment(centers, shares, flat, draw, self.steps, generator)
            return replace(cells, rows=rows[cells.rows]), assign

        if context is None:
            return Plan(len(x1), None, [solve(torch.arange(len(x1), device=x1.device))])
        labels, group = context.nan_to_num(torch.inf).unique(dim=0, return_inverse=True)
        if 2 * len(labels) > len(x1):
            raise ValueError(
                f"semidiscrete: expected a context of labels, got {len(labels)} different ones in "
                f'{len(x1)} rows; for one that varies continuously take coupling="conditional-ot"'
            )
        members = [(group == k).nonzero()[:, 0] for k in range(len(labels))]
        return Plan(len(x1), labels, [solve(rows) for rows in members])


@dataclass(frozen=True)
class Cells:
    """Parts of a data set, of which each consists of rows that are near each other.

    Attributes:
        rows: Indices of all rows, those of one cell in sequence, shape (N,).
        first: Where the rows of each cell begin, shape (M,).
        sizes: How many rows each cell has, at least 1, shape (M,).
    """

    rows: Tensor
    first: Tensor
    sizes: Tensor

    @property
    def single(self) -> bool:
        """Whether each cell has one row."""
        return len(self.rows) == len(self.sizes)

    def pick(self, cell: Tensor, within: Tensor | None) -> Tensor:
        """A row of each of these cells, shape (n,).

        Args:
            cell: Numbers of cells, shape (n,).
            within: Where among the rows of the cell, in [0, 1), shape (n,); None for the first.
        """
        first = self.first[cell]
        if within is None:
            return self.rows[first]
        sizes = self.sizes[cell]
        return self.rows[first + (within * sizes).long().minimum(sizes - 1)]


@dataclass(frozen=True)
class Plan:
    """A fitted semi-discrete coupling, which pairs base samples with rows of its data set.

    Attributes:
        size: Number of rows M.
        labels: The contexts of the groups, shape (G, C); None for one group without a context.
        groups: The cells of each group's rows, and the assignment of base samples to them.
    """

    size: int
    labels: Tensor | None
    groups: list[tuple[Cells, Assignment]]

    def __call__(
        self,
        x0: Tensor,
        x1: Tensor,
        context: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Pairing:
        """Pair each base sample with a row of the cell that it is assigned to.

        Args:
            x0: Base samples, shape (N, *event).
            x1: The rows that the coupling was fitted to, shape (M, *event).
            context: The label whose rows each x0 is assigned to, shape (N, C).
            generator: Source of the draws from cells of several rows; one row each needs none.

        Returns:
            For each row of x0 a row of x1, with equal weights.

        Raises:
            ValueError: The rows or labels are not those that it was fitted to.
        """
        if len(x1) != self.size:
            raise ValueError(
                f"semidiscrete: expected the {self.size} rows that it was fitted to, got {len(x1)}"
            )
        x, j = x0.detach().flatten(1), torch.empty(len(x0), dtype=torch.long, device=x0.device)
        if (context is None) != (self.labels is None):
            with_or_without = "no context" if self.labels is None else "a context"
            raise ValueError(
                f"semidiscrete: expected {with_or_without}, as the coupling was fitted, got "
                f"{'none' if context is None else 'one'}"
            )
        within = None
        if not all(cells.single for cells, _ in self.groups):
            within = draw_numbers(torch.rand, j.shape, generator, like=x)
        if context is None or self.labels is None:
            cells, assign = self.groups[0]
            return Pairing(j=cells.pick(assign(x), within))
        wanted = (context.nan_to_num(torch.inf)[:, None] == self.labels).all(-1)
        if not wanted.any(1).all():
            raise ValueError(
                "semidiscrete: expected the labels that the coupling was fitted to, got a context "
                "that is none of them; fit it to data with all labels"
            )
        for (cells, assign), members in zip(self.groups, wanted.unbind(1), strict=True):
            if members.any():
                own = None if within is None else within[members]
                j[members] = cells.pick(assign(x[members]), own)
        return Pairing(j=j)


def _single(rows: Tensor) -> Cells:
    """Each row as a cell of its own."""
    return Cells(rows, torch.arange(len(rows), device=rows.device), torch.ones_like(rows))


def _cells(x1: Tensor, count: int) -> tuple[Cells, Tensor]:
    """Divide rows x1, shape (N, D), into at most `count` cells, and give the means of these.

    The rows of a cell have the same nearest one among `count` of them. The mean squared distance
    from x0 to a row that is drawn from a cell is that to the cell's mean plus the variance within
    the cell. As the masses of the cells are given, the variances add a constant to the cost of a
    plan, and the one that is optimal for the means is optimal.
    """
    n = len(x1)
    if n <= count:
        return _single(torch.arange(n, device=x1.device)), x1
    center = x1.mean(0)
    y = (x1.double() if x1.shape[1] <= TREE_DIMS[1] else x1) - center
    some = y[_evenly_spaced(n, count, y.device)]
    nearest = _exact_assignment(some, -0.5 * some.square().sum(1))(y)
    _, cell = nearest.unique(return_inverse=True)  # equal centers leave cells without a row
    sizes = torch.bincount(cell)
    means = torch.zeros_like(y[: len(sizes)]).index_add_(0, cell, y) / sizes[:, None]
    return Cells(cell.argsort(stable=True), sizes.cumsum(0) - sizes, sizes), means + center


def _assignment_1d(x1: Tensor, x0: Tensor) -> Assignment:
    """In one dimension the cells have the rows' order, and quantiles of the base as their ends."""
    order, m = x1.argsort(), len(x1)
    ends = x0.sort().values[torch.arange(1, m, device=x0.device) * len(x0) // m]
    return lambda x: order[torch.searchsorted(ends, x[:, 0].to(ends).contiguous())]


@torch.no_grad()
def _fitted_assignment(
    centers: Tensor,
    shares: Tensor,
    x1: Tensor,
    draw: Draw,
    steps: int,
    generator: torch.Generator | None,
) -> Assignment:
    """The optimal assignment of base samples to cells of some centers and shares of the base.

    It maximizes ⟨x, y_j⟩ + p_j, with p = (ψ - ‖y‖²)/2, over points that are shifted and scaled to
    a common origin and spread of base and data, which makes a search by trees faster.

    Args:
        centers: Of the cells, shape (M, D).
        shares: The mass of each cell in units of an equal one, of mean 1, shape (M,).
        x1: The rows in the cells, shape (N, D).
        draw: Base samples.
        steps: Of the ascent.
        generator: Source of the draws.
    """
    if x1.shape[1] <= TREE_DIMS[1]:  # cells are narrow in few dimensions
        x1, centers = x1.double(), centers.double()

    def sample(n: int) -> Tensor:
        return draw(n, generator).detach().flatten(1).to(x1)

    first, center = sample(10_000), x1.mean(0)
    origin = first.mean(0)
    spreads = [(rows - rows.mean(0)).square().mean().sqrt() for rows in (first, x1)]
    scale = (spreads[0] / spreads[1].clamp(min=1e-12)).sqrt()
    rows, y = scale * (x1 - center), scale * (centers - center)

    def standard(n: int) -> Tensor:
        return (sample(n) - origin) / scale

    p, mass, sums = _dual_ascent(
        y, shares.to(y), rows, standard, steps, float(spreads[0] * spreads[1])
    )
    assign = _approximate_assignment(y, p, mass, sums, standard)
    return lambda x: assign((x.to(origin) - origin) / scale)


def _dual_ascent(
    y: Tensor,
    shares: Tensor,
    rows: Tensor,
    sample: Callable[[int], Tensor],
    steps: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Potentials p by stochastic ascent of the dual, and each cell's number and sum of samples.

    The gradient of the dual with respect to p_j is the mass that cell j is to have minus the one
    that it has, estimated from a number of samples that increases over the steps. A potential is
    a sum over groups of cells, from coarse to fine, so that few steps also move mass over long
    distances.
    """
    m = len(y)
    first = _initial_potentials(y, rows, sample(min(EXACT_ROWS[1], max(EXACT_ROWS[0], m))))
    groups = _groups(y)
    parts = [torch.zeros_like(first) for _ in groups]
    optimizer = torch.optim.Adam(
        parts, lr=0.01 * scale * (y.shape[1] / 2) ** 0.5, betas=(0.9, 0.99), maximize=True
    )
    fall = min(0.1, 100 * m ** (-2 / y.shape[1])) ** (1 / steps)  # down to a cell's size
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, fall)
    mean, mass, sums = torch.zeros_like(first), torch.zeros_like(first), torch.zeros_like(y)
    last = max(1, steps // 5)
    for k in range(steps):
        x = sample(
            int(min(SAMPLES[1], max(SAMPLES[0], m * 2 ** (6 * k / steps - 3))))
        )  # M/8 to 8M
        p = first + sum(part[group] for part, group in zip(parts, groups, strict=True))
        j = _exact_assignment(y, p)(x)
        count = torch.bincount(j, minlength=m).to(y)
        if k >= steps - last:
            mean += p / last
            mass += count
            sums.index_add_(0, j, x)
        slope = shares - count * (m / len(x))
        for part, group in zip(parts, groups, strict=True):
            part.grad = torch.zeros_like(part).index_add_(0, group, slope)
        optimizer.step()
        schedule.step()
    return mean, mass, sums


def _groups(y: Tensor) -> list[Tensor]:
    """The group of each cell, at each level from single cells to a few groups."""
    groups, n = [torch.arange(len(y), device=y.device)], len(y) // COARSENING
    while n > 1:
        centers = y[_evenly_spaced(len(y), n, y.device)]
        groups.append(torch.cat([torch.cdist(part, centers).argmin(1) for part in y.split(1024)]))
        n //= COARSENING
    return groups


def _evenly_spaced(m: int, n: int, device: torch.device) -> Tensor:
    """Indices of n of m rows, evenly spaced as rows may be sorted; they repeat if n > m."""
    return torch.arange(n, device=device) * m // n


def _initial_potentials(y: Tensor, rows: Tensor, x: Tensor) -> Tensor:
    """Potentials of all cells, by the c-transform of exact ones between x and as many rows.

    If there are fewer rows than base samples, rows are repeated: fewer base samples would be a
    poor estimate of the base.
    """
    n = len(x)
    subset = rows[_evenly_spaced(len(rows), n, y.device)]
    duals = optimal_duals(-x @ subset.T).to(y)
    return torch.cat([(-x @ part.T - duals[:, None]).amin(0) for part in y.split(BLOCK // n)])


def _exact_assignment(y: Tensor, p: Tensor) -> Assignment:
    """The row j that maximizes ⟨x, y_j⟩ + p_j, by a tree in few dimensions, else by all products.

    It is the nearest neighbor of (x, 0) among the points (y_j, √(c - ψ_j)).
    """
    if y.shape[1] > TREE_DIMS[0] or y.device.type != "cpu":
        blocks = max(1, BLOCK // len(y))
        return lambda x: torch.cat(
            [torch.addmm(p, part, y.T).argmax(1) for part in x.split(blocks)]
        )
    square = -2 * p - y.square().sum(1)  # c - ψ up to the least c
    height = (square - square.min()).sqrt()
    tree = optional("scipy.spatial", "matching").cKDTree(
        _numpy(torch.cat([y, height[:, None]], 1))
    )

    def assign(x: Tensor) -> Tensor:
        lifted = np.concatenate([_numpy(x), np.zeros((len(x), 1))], 1)
        return torch.from_numpy(tree.query(lifted, workers=-1)[1])

    return assign


def _approximate_assignment(
    y: Tensor, p: Tensor, mass: Tensor, sums: Tensor, sample: Callable[[int], Tensor]
) -> Assignment:
    """The assignment among the cells with the nearest centers, which is 10× faster.

    Cells are convex and of similar mass, so x lies in one whose center is close. The number of
    cells to compare is the least one that agrees with the exact assignment on a sample. A cell
    without mass is never assigned.
    """
    exact, inside = _exact_assignment(y, p), mass.nonzero()[:, 0]
    if y.shape[1] > TREE_DIMS[1] or y.device.type != "cpu":
        return exact
    y, p = y[inside], p[inside]
    tree = optional("scipy.spatial", "matching").cKDTree(_numpy(sums[inside] / mass[inside, None]))

    def assign(x: Tensor, cells: int) -> Tensor:
        near = torch.from_numpy(tree.query(_numpy(x), k=np.arange(1, cells + 1))[1])
        value = torch.baddbmm(p[near][..., None], y[near], x[..., None])
        return inside[near.gather(1, value.argmax(1))[:, 0]]

    x = sample(4_096)
    expected = exact(x)
    for cells in CANDIDATES:
        if cells <= len(inside) and (assign(x, cells) == expected).float().mean() >= AGREEMENT:
            return lambda x: assign(x, cells)
    return exact


def _numpy(tensor: Tensor) -> Any:
    return tensor.cpu().double().numpy()
