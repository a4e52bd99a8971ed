"""Samples of more than two dimensions: every pair of the first columns."""

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from cnf.plotting.style import (
    TRUTH,
    few_ticks,
    scatter,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMNS = 4


def corner(grid: Any, true: Tensor, drawn: Tensor, color: str) -> None:
    edges = torch.tensor([0.002, 0.998], dtype=torch.float64)
    low, high = true[:, : len(grid)].cpu().double().quantile(edges, 0)
    margin = torch.where(high > low, 0.1 * (high - low), 0.5)
    limits = torch.stack([low - margin, high + margin], 1).tolist()
    for (row, column), ax in np.ndenumerate(grid):
        if column > row:
            ax.remove()
            continue
        ax.set_xlim(limits[column])
        few_ticks(ax, 2)
        if column == row:
            _histograms(ax, true[:, row], drawn[:, row], limits[row], color)
            ax.set_yticks([])
        else:
            ax.set_ylim(limits[row])
            scatter(ax, true[:, [column, row]], TRUTH, 1.0, 0.25)
            scatter(ax, drawn[:, [column, row]], color, 1.0, 0.25)
        ax.tick_params(left=column == 0, labelleft=column == 0)
        ax.tick_params(bottom=row == len(grid) - 1, labelbottom=row == len(grid) - 1)


def _histograms(ax: "Axes", true: Tensor, drawn: Tensor, limits: list[float], color: str) -> None:
    low, high = limits
    bins = np.linspace(low, high, 31)
    for values, look in (
        (true, {"fill": True, "color": TRUTH, "alpha": 0.25}),
        (drawn, {"color": color, "lw": 1.2}),
    ):
        heights = np.histogram(values.cpu().double().numpy(), bins)[0] / len(values)
        ax.stairs(heights, bins, **look)
