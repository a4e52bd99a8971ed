"""Samples of more than two dimensions: every pair of the first columns."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from cnf.plotting.axes import few_ticks, new_figure, say_failed, scatter
from cnf.plotting.style import FAINT, TRUTH, color_of, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMNS = 4


def plot_corners(
    true: Tensor, samples: Mapping[str, Tensor | str], names: Sequence[str] = ()
) -> "Figure":
    """A corner plot for each flow, of its samples over the true ones.

    It shows every pair of the first four columns, and histograms of each on the diagonal.

    Args:
        true: True samples, shape (N, D).
        samples: Title → samples (N, D), or words where there are none.
        names: Of the columns.

    Returns:
        The figure.
    """
    total = true.shape[1]
    count = min(total, COLUMNS)
    names = names or [f"x{k + 1}" for k in range(count)]
    across = min(len(samples), 2)
    side, down = 6.4 / across + 0.3, math.ceil(len(samples) / across)
    with styled():
        figure = new_figure(side * across, side * down)
        parts = figure.subfigures(down, across, squeeze=False).flat
        for place, (part, (title, drawn)) in enumerate(zip(parts, samples.items(), strict=False)):
            part.suptitle(title, fontsize=11, fontweight="bold")
            if isinstance(drawn, str):
                ax = part.subplots()
                ax.axis("off")
                say_failed(ax, drawn)
                continue
            grid = part.subplots(count, count)
            _corner(grid, true, drawn, color_of(place))
            for k, column in enumerate(names[:count]):
                short = textwrap.shorten(column, 14, placeholder="…")
                grid[-1, k].set_xlabel(short, fontsize=9)
                grid[k, 0].set_ylabel(short if k else "", fontsize=9)
        few = f"the first {count} of {total} dimensions    " if total > count else ""
        figure.supxlabel(f"{few}gray: data    colored: samples", color=FAINT, fontsize=11)
    return figure


def _corner(grid: Any, true: Tensor, drawn: Tensor, color: str) -> None:
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
