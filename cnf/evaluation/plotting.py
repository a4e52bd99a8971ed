"""Pictures of one flow and of a race: densities, samples, paths, learning, quality and cost.

Every function returns a `matplotlib.figure.Figure` that pyplot does not know: show it in a
notebook by naming it, write it with `figure.savefig(...)`. Contestants are shown by their first
seed; curves show all seeds.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cnf.dynamics.solver import Solver
from cnf.evaluation import curves
from cnf.evaluation.animation import animate, layer_path, plot_trajectories
from cnf.evaluation.comparison import Results
from cnf.evaluation.corner import plot_corners
from cnf.evaluation.curves import largest_nfe, plot_gap_over_time, plot_quality_against_nfe
from cnf.evaluation.metrics import log_prob_chunked
from cnf.evaluation.style import (
    TRUTH,
    attempt,
    axis_names,
    colors,
    device_of,
    frame,
    panels,
    say_failed,
    scatter,
    score_text,
    styled,
    titles,
    unlike,
    window_of,
)
from cnf.flow import Flow
from cnf.transforms.continuous import Continuous

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "animate",
    "layer_path",
    "plot_densities",
    "plot_density",
    "plot_gap_over_time",
    "plot_quality_against_nfe",
    "plot_samples",
    "plot_trajectories",
    "save_figures",
]

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


def plot_densities(results: Results, resolution: int = RESOLUTION) -> "Figure":
    """The true density, or one's own points, beside what each contestant learned, on one color
    scale.

    Args:
        results: Of a race on two-dimensional data.
        resolution: Cells along the longer side.
    Raises:
        ValueError: The data are not two-dimensional.
    """
    if results.density.dim != 2:
        raise ValueError(f"plot_densities: expected data of dim 2, got {results.density.dim}")
    window, names, known = window_of(results.density), titles(results), results.score == "gap"
    grids: dict[str, Tensor | str] = {
        name: attempt(_on_grid, results.of(name)[0].flow, window, resolution) for name in names
    }
    truth = _on_grid(results.density, window, resolution) if known else None
    vmax = _brightest([grid for grid in grids.values() if isinstance(grid, Tensor)])
    vmax = vmax if truth is None else _brightest([truth])
    columns = axis_names(results.density)
    with styled():
        figure, axes = panels(len(names) + 1, window, below=0.7)
        if truth is not None:
            drawn = _draw(axes[0], truth, window, vmax)
            frame(axes[0], window, "True density", results.data, columns)
        else:
            drawn = _draw(axes[0], torch.zeros(2, 2), window, vmax)
            scatter(axes[0], results.density.x[:4000], "white", size=2.0)
            frame(axes[0], window, "Your points", results.data, columns)
        for ax, (name, grid) in zip(axes[1:], grids.items(), strict=True):
            frame(ax, window, names[name], score_text(results, name), columns)
            _draw(ax, grid, window, vmax) if isinstance(grid, Tensor) else say_failed(ax, grid)
        _color_bar(figure, drawn, axes)
    return figure


def plot_samples(results: Results, points: int = 3000) -> "Figure":
    """True samples and each contestant's, on the same axes; of more than two dimensions every pair
    of the first four; of a single one histograms, under the exact densities.

    Args:
        results: Of a race.
        points: How many of each.
    """
    draw = torch.Generator().manual_seed(0)
    true = results.density.sample(points, generator=draw)
    shown = {"": true} | {
        name: attempt(_samples, results.of(name)[0].flow, results.density, points)
        for name in results.contestants
    }
    if results.density.dim == 1:
        low, high = results.density.support[:, 0].tolist()
        grid = torch.linspace(low, high, 400, dtype=torch.float64)
        exact = {} if "context" in results.density.sizes else _exact(results, grid)
        return curves.plot_histograms(results, shown, grid, exact)
    if results.density.dim > 2:
        return plot_corners(results, shown.pop(""), shown)
    window, names, color = window_of(results.density), titles(results), colors(results)
    real = "True samples" if results.score == "gap" else "Your points"
    with styled():
        figure, axes = panels(len(shown), window, below=0.3)
        for ax, (name, dots) in zip(axes, shown.items(), strict=True):
            frame(ax, window, names.get(name, real), names=axis_names(results.density))
            if isinstance(dots, Tensor):
                scatter(ax, dots, color.get(name, TRUTH))
            else:
                say_failed(ax, dots)
    return figure


def save_figures(results: Results, folder: str | Path) -> dict[str, Path]:
    """Write every picture that makes sense for these data: PNGs, and a GIF per contestant.

    Args:
        results: Of a race.
        folder: Where to; it is made if need be.
    Returns:
        Name of the picture → its file, as in `density.png` and `flow-realnvp.gif`. Densities,
        paths and animations are for two dimensions only, quality against evaluations of the field
        for races in which somebody has one.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    plane = results.density.dim == 2 and "context" not in results.density.sizes
    learning = "gap_over_time" if results.score == "gap" else "nll_over_time"
    plots: dict[str, Callable[[Results], Figure]] = {
        **({"density": plot_densities} if plane else {}),
        "samples": plot_samples,
        **({"trajectories": plot_trajectories} if plane else {}),
        learning: plot_gap_over_time,
        **({"quality_against_nfe": plot_quality_against_nfe} if largest_nfe(results) else {}),
    }
    files = {}
    for name, plot in plots.items():
        figure = plot(results)
        with styled():
            figure.savefig(folder / f"{name}.png", bbox_inches="tight", pad_inches=0.1)
        figure.clear()  # axes and figure hold each other; this frees the memory now
        files[name] = folder / f"{name}.png"
    return files | (_save_animations(results, folder) if plane else {})


def _save_animations(results: Results, folder: Path) -> dict[str, Path]:
    names, color, files = titles(results), colors(results), {}
    window = window_of(results.density)
    for number, name in enumerate(names):
        flow = results.of(name)[0].flow
        file = folder / f"flow-{re.sub(r'[^A-Za-z0-9._-]+', '-', name) or number}.gif"
        made = attempt(
            animate, flow, file, window=window, title=names[name],
            names=axis_names(results.density), color=color[name],
        )  # fmt: skip
        if isinstance(made, Path):
            files[f"flow-{name}"] = made
    return files


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
    return _density_at(flow_or_density, points).reshape(count_y, count_x)


def _density_at(flow_or_density: Any, points: Tensor) -> Tensor:
    """Exact density at points (N, D), float64, shape (N,)."""
    if isinstance(flow_or_density, Flow):
        flow = flow_or_density
        like = next(iter(flow.parameters()), points)
        flow = flow.with_solver(PICTURE_SOLVER) if isinstance(flow.transform, Continuous) else flow
        log_prob = log_prob_chunked(flow, points.to(like.device, flow.data_dtype))
    else:
        log_prob = log_prob_chunked(flow_or_density, points)
    return log_prob.exp().cpu()


def _exact(results: Results, grid: Tensor) -> dict[str, Tensor]:
    """Contestant → its density on a grid, shape (N,), of those that have one there; the true one,
    if known, at ""."""
    flows = {name: results.of(name)[0].flow for name in results.contestants}
    known = {"": results.density} if results.score == "gap" else {}
    found = {
        name: attempt(_density_at, flow, grid[:, None])
        for name, flow in {**known, **flows}.items()
    }
    return {name: values for name, values in found.items() if isinstance(values, Tensor)}


@torch.no_grad()
def _samples(flow: Flow, density: Any, points: int) -> Tensor:
    draw = torch.Generator().manual_seed(0)
    if "context" not in density.sizes:
        return flow.sample((points,), generator=draw).cpu()
    context = density.take(density.draw(points, draw)).context
    return flow.sample((), context.to(device_of(flow)), generator=draw).cpu()


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
