"""Densities that are constant on the cells of a grid."""

import torch
from torch import Tensor

from cnf.data.density import Table, Toy, uniform


class Cells(Toy):
    r"""A density that is constant on each of the equal cells of a box.

    .. math:: p(x) = w_{ij} \,/\, (A {\textstyle\sum w}) \quad\text{on cell } ij \text{ of area } A

    A cell contains its lower and left edge, not its upper and right one. Outside the box the
    log-density is -inf; its gradient is zero everywhere.

    Args:
        name: Name of the density.
        weights: Mass of each cell up to a common factor, shape (rows, columns), row 0 at the
            bottom.
        low: Lower corner (x, y) of the box.
        high: Upper corner (x, y) of the box.
    """

    _chunk = 1 << 18  # only a few numbers per point are in memory

    def __init__(
        self, name: str, weights: Tensor, low: tuple[float, float], high: tuple[float, float]
    ) -> None:
        rows, columns = weights.shape
        super().__init__(name, low, high, (columns, rows))
        area = (high[0] - low[0]) * (high[1] - low[1]) / weights.numel()
        mass = weights.double() / weights.double().sum()
        self._cumulative = Table(mass.flatten().cumsum(0))
        self._log_weights = Table((mass / area).log())
        self._edges = [
            Table(torch.linspace(low[axis], high[axis], n + 1, dtype=torch.float64))
            for axis, n in enumerate((columns, rows))
        ]

    def _draw(self, n: int, generator: torch.Generator | None) -> Tensor:
        u = uniform(n, generator=generator)
        cumulative = self._cumulative.on(u.device)
        edges = [table.on(u.device) for table in self._edges]
        # right=True skips cells without mass, whose cumulative mass is that of the cell before
        cell = torch.searchsorted(cumulative, u * cumulative[-1], right=True)
        columns = len(edges[0]) - 1
        fraction = uniform(n, 2, generator=generator)
        index = torch.stack([cell % columns, cell // columns], -1)
        return torch.stack([points_in(edges[k], index[:, k], fraction[:, k]) for k in (0, 1)], -1)

    def _log_density(self, x: Tensor) -> Tensor:
        inside = torch.ones_like(x[:, 0], dtype=torch.bool)
        index = []
        for table, values in zip(self._edges, x.detach().unbind(-1), strict=True):
            edges = table.on(x.device)
            cell = torch.bucketize(values.contiguous(), edges, right=True) - 1
            inside &= (cell >= 0) & (cell < len(edges) - 1)
            index.append(cell.clamp(0, len(edges) - 2))
        log_weights = self._log_weights.on(x.device)[index[1], index[0]]
        return log_weights.where(inside, -torch.inf)


def points_in(edges: Tensor, cell: Tensor, fraction: Tensor) -> Tensor:
    """Points at a fraction of their cells that remain inside after rounding to float32.

    Args:
        edges: Edges of the n cells along an axis, shape (n + 1,).
        cell: Index of each point's cell, shape (N,).
        fraction: Position within the cell, in [0, 1), shape (N,).
    """
    low, high = edges[cell], edges[cell + 1]
    x = torch.lerp(low, high, fraction).float()
    up, down = torch.full_like(x, torch.inf), torch.full_like(x, -torch.inf)
    x = torch.where(x.double() < low, x.nextafter(up), x)
    return torch.where(x.double() >= high, x.nextafter(down), x).double()
