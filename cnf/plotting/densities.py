"""Exact densities of two-dimensional flows on a grid."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cnf.dynamics.solver import Solver
from cnf.flow import Flow
from cnf.metrics.flows import log_prob_chunked
from cnf.plotting.axes import (
    attempt,
    axis_names,
    frame,
    is_known,
    panels,
    say_failed,
    scatter,
    unlike,
    window_of,
)
from cnf.plotting.style import styled
from cnf.transforms.continuous import Continuous

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAP = "magma"  # perceptually uniform: equal steps of density look equal
RESOLUTION = 160  # cells along the longer side
PICTURE_SOLVER = Solver("dopri5", rtol=1e-5, atol=1e-5)  # far below what an eye can tell


def plot_density(
    flow_or_density: Any,
    window: Tensor | None = None,
    ax: "Axes | None" = None,
    vmax: float | None = None,
    resolution: int = RESOLUTION,
) -> "Figure":
    """The exact density of a two-dimensional flow or known density, evaluated on a grid.

    Args:
        flow_or_density: Anything with `log_prob` of points (N, 2).
        window: Low and high corner of what is shown, shape (2, 2); by default where its mass is.
        ax: Where to draw; a new figure with a color bar by default.
        vmax: Density of the brightest color; by default the largest on the grid.
        resolution: Cells along the longer side.

    Returns:
        The figure.

    Raises:
        ValueError: It is not two-dimensional.
    """
    dim = _dim(flow_or_density)
    if dim != 2:
        raise ValueError(f"plot_density: expected two dimensions, got {dim}")
    window = window_of(flow_or_density) if window is None else torch.as_tensor(window)
    density = _on_grid(flow_or_density, window, resolution)
    with styled():
        if ax is not None:
            _draw(ax, density, window, _brightest([density]) if vmax is None else vmax)
            return ax.get_figure(root=True)  # pyright: ignore[reportReturnType]
        figure, (own,) = panels(1, window, side=4.6, below=0.5)
        drawn = _draw(own, density, window, _brightest([density]) if vmax is None else vmax)
        frame(own, window, "")
        _color_bar(figure, drawn, [own])
        return figure


def plot_densities(
    data: Any,
    flows: Mapping[str, Any],
    notes: Mapping[str, str] | None = None,
    resolution: int = RESOLUTION,
) -> "Figure":
    """The true density, or one's own points, beside what flows have learned, on one color scale.

    Args:
        data: A known density or `Points` of two dimensions, as `cnf.data.load` gives them.
        flows: Title → flow.
        notes: Title → what is written under it.
        resolution: Cells along the longer side.

    Returns:
        The figure.

    Raises:
        ValueError: The data are not two-dimensional.
    """
    if data.dim != 2:
        raise ValueError(f"plot_densities: expected data of dim 2, got {data.dim}")
    window, columns, notes = window_of(data), axis_names(data), notes or {}
    grids: dict[str, Tensor | str] = {
        title: attempt(_on_grid, flow, window, resolution) for title, flow in flows.items()
    }
    truth = _on_grid(data, window, resolution) if is_known(data) else None
    vmax = _brightest([grid for grid in grids.values() if isinstance(grid, Tensor)])
    vmax = vmax if truth is None else _brightest([truth])
    with styled():
        figure, axes = panels(len(grids) + 1, window, below=0.7)
        drawn = _draw(axes[0], torch.zeros(2, 2) if truth is None else truth, window, vmax)
        if truth is None:
            scatter(axes[0], data.x[:4000], "white", size=2.0)
        first = "Your points" if truth is None else "True density"
        frame(axes[0], window, first, data.name, columns)
        for ax, (title, grid) in zip(axes[1:], grids.items(), strict=True):
            frame(ax, window, title, notes.get(title, ""), columns)
            _draw(ax, grid, window, vmax) if isinstance(grid, Tensor) else say_failed(ax, grid)
        _color_bar(figure, drawn, axes)
    return figure


def density_at(flow_or_density: Any, points: Tensor) -> Tensor:
    """Exact density at points (N, D), float64, shape (N,)."""
    if isinstance(flow_or_density, Flow):
        flow = flow_or_density
        like = next(iter(flow.parameters()), points)
        if isinstance(flow.transform, Continuous) and not flow.transform.solver.discrete:
            flow = flow.with_solver(PICTURE_SOLVER)
        log_prob = log_prob_chunked(flow, points.to(like.device, flow.data_dtype))
    else:
        log_prob = log_prob_chunked(flow_or_density, points)
    return log_prob.exp().cpu()


def _on_grid(flow_or_density: Any, window: Tensor, resolution: int) -> Tensor:
    """Density at the midpoints of the window's cells, shape (ny, nx); bottom row first."""
    (left, bottom), (right, top) = window.tolist()
    cell = max(right - left, top - bottom) / resolution
    count_x, count_y = (max(2, round(side / cell)) for side in (right - left, top - bottom))
    if unlike(window):
        count_x = count_y = resolution
    x = left + (torch.arange(count_x, dtype=torch.float64) + 0.5) * (right - left) / count_x
    y = bottom + (torch.arange(count_y, dtype=torch.float64) + 0.5) * (top - bottom) / count_y
    points = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).reshape(-1, 2)
    return density_at(flow_or_density, points).reshape(count_y, count_x)


def _draw(ax: "Axes", density: Tensor, window: Tensor, vmax: float) -> Any:
    (left, bottom), (right, top) = window.tolist()
    return ax.imshow(
        density.nan_to_num(0.0, posinf=vmax).numpy(), origin="lower", cmap=MAP, vmin=0.0,
        vmax=vmax, extent=(left, right, bottom, top), interpolation="bilinear",
        aspect="auto" if unlike(window) else "equal",
    )  # fmt: skip


def _brightest(grids: list[Tensor]) -> float:
    """The largest density but for the top thousandth of cells, where a spike may sit."""
    finite = [grid[torch.isfinite(grid)].double() for grid in grids]
    tops = [float(grid.quantile(0.999)) for grid in finite if grid.numel()]
    return max([top for top in tops if top > 0], default=1.0)


def _color_bar(figure: "Figure", drawn: Any, axes: list["Axes"]) -> None:
    bar = figure.colorbar(
        drawn, ax=axes, location="bottom", shrink=0.6, aspect=40, pad=0.02, extend="max"
    )
    bar.set_label("density, one color scale for all" if len(axes) > 1 else "density")
    bar.outline.set_visible(False)  # pyright: ignore
    bar.ax.locator_params(nbins=5)


def _dim(flow_or_density: Any) -> int:
    shape = getattr(flow_or_density, "event_shape", None)
    return flow_or_density.dim if shape is None else shape[0] if len(shape) == 1 else len(shape)
