"""Samples of flows beside true ones: on the plane, as histograms, or in pairs of columns."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from cnf.flow import Flow
from cnf.plotting.axes import (
    HEIGHT,
    WIDTH,
    attempt,
    axis_names,
    frame,
    is_known,
    legend_below,
    new_figure,
    panels,
    say_failed,
    scatter,
    window_of,
)
from cnf.plotting.corner import plot_corners
from cnf.plotting.densities import density_at
from cnf.plotting.style import TRUTH, color_of, dash_of, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_samples(data: Any, flows: Mapping[str, Flow], points: int = 3000) -> "Figure":
    """True samples and each flow's, on the same axes.

    Of more than two dimensions every pair of the first four is shown; of a single one histograms,
    under the exact densities.

    Args:
        data: A known density or `Points`, as `cnf.data.load` gives them.
        flows: Title → flow; a conditional one is drawn from under the contexts of the points.
        points: How many of each.

    Returns:
        The figure.
    """
    true = data.sample(points, generator=torch.Generator().manual_seed(0))
    drawn = {title: attempt(_samples, flow, data, points) for title, flow in flows.items()}
    if data.dim == 1:
        return _histograms(data, flows, true, drawn)
    if data.dim > 2:
        return plot_corners(true, drawn, axis_names(data))
    window, columns = window_of(data), axis_names(data)
    with styled():
        figure, axes = panels(len(drawn) + 1, window, below=0.3)
        frame(axes[0], window, "True samples" if is_known(data) else "Your points", names=columns)
        scatter(axes[0], true, TRUTH)
        for place, (title, dots) in enumerate(drawn.items()):
            ax = axes[place + 1]
            frame(ax, window, title, names=columns)
            if isinstance(dots, Tensor):
                scatter(ax, dots, color_of(place))
            else:
                say_failed(ax, dots)
    return figure


def _histograms(
    data: Any, flows: Mapping[str, Flow], true: Tensor, drawn: Mapping[str, Tensor | str]
) -> "Figure":
    """Histograms of samples of one dimension, (N, 1), under the lines of exact densities."""
    low, high = data.support[:, 0].tolist()
    grid, bins = torch.linspace(low, high, 400, dtype=torch.float64), np.linspace(low, high, 61)
    exact = {}
    if "context" not in data.sizes:
        exact = {title: attempt(density_at, flow, grid[:, None]) for title, flow in flows.items()}
    with styled():
        figure = new_figure(WIDTH, HEIGHT)
        ax = figure.subplots()
        real = "true samples" if is_known(data) else "your points"
        heights = _heights(true, bins)
        ax.stairs(heights, bins, fill=True, color=TRUTH, alpha=0.25, label=real)
        if is_known(data):
            ax.plot(grid, density_at(data, grid[:, None]), color=TRUTH, lw=2, label="true density")
        for place, (title, values) in enumerate(drawn.items()):
            look: dict[str, Any] = {"color": color_of(place), "ls": dash_of(place)}
            density = exact.get(title)
            known = isinstance(density, Tensor)
            if isinstance(values, str):
                ax.plot([], [], color=color_of(place), label=f"{title} (failed)")
            else:  # its density, where it is known, tells more
                ax.stairs(
                    _heights(values, bins), bins, **look, lw=0.8 if known else 1.8,
                    alpha=0.5 if known else 1.0, label=None if known else title,
                )  # fmt: skip
            if isinstance(density, Tensor):
                ax.plot(grid, density, **look, lw=2, label=title)
        ax.set(xlabel=next(iter(axis_names(data)), "value"), ylabel="density")
        ax.set_xlim(low, high)
        legend_below(figure, ax)
    return figure


def _heights(values: Tensor, bins: np.ndarray) -> np.ndarray:
    finite = values[:, 0].cpu().numpy()
    finite = finite[np.isfinite(finite)]
    return np.histogram(finite, bins)[0] / max(len(finite), 1) / (bins[1] - bins[0])


@torch.no_grad()
def _samples(flow: Flow, data: Any, points: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    if "context" not in data.sizes:
        return flow.sample((points,), generator=generator).cpu()
    context = data.take(data.draw(points, generator)).context
    return flow.sample((), context.to(flow.device), generator=generator).cpu()
