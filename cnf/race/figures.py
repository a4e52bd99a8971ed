"""The pictures of a race.

Every function returns a `matplotlib.figure.Figure` that pyplot does not know: show it in a
notebook by naming it, write it with `figure.savefig(...)`. Contestants are shown by their first
seed; curves show all seeds.
"""

import math
import re
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from cnf.errors import optional
from cnf.flow import Flow
from cnf.plotting.animation import animate, finite, way_of, way_said
from cnf.plotting.axes import HEIGHT, WIDTH, legend_below, powers_of_two, sparse_log
from cnf.plotting.corner import COLUMNS, corner
from cnf.plotting.curves import SAME
from cnf.plotting.densities import RESOLUTION, brightest, color_bar, density_at, draw, on_grid
from cnf.plotting.style import (
    FAINT,
    TRUTH,
    attempt,
    axis_names,
    device_of,
    frame,
    new_figure,
    panels,
    say_failed,
    scatter,
    styled,
    window_of,
)
from cnf.race.results import Entry, Results, colors, dashes, score_text, titles

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


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
        name: attempt(on_grid, results.of(name)[0].flow, window, resolution) for name in names
    }
    truth = on_grid(results.density, window, resolution) if known else None
    vmax = brightest([grid for grid in grids.values() if isinstance(grid, Tensor)])
    vmax = vmax if truth is None else brightest([truth])
    columns = axis_names(results.density)
    with styled():
        figure, axes = panels(len(names) + 1, window, below=0.7)
        if truth is not None:
            drawn = draw(axes[0], truth, window, vmax)
            frame(axes[0], window, "True density", results.data, columns)
        else:
            drawn = draw(axes[0], torch.zeros(2, 2), window, vmax)
            scatter(axes[0], results.density.x[:4000], "white", size=2.0)
            frame(axes[0], window, "Your points", results.data, columns)
        for ax, (name, grid) in zip(axes[1:], grids.items(), strict=True):
            frame(ax, window, names[name], score_text(results, name), columns)
            draw(ax, grid, window, vmax) if isinstance(grid, Tensor) else say_failed(ax, grid)
        color_bar(figure, drawn, axes)
    return figure


def plot_samples(results: Results, points: int = 3000) -> "Figure":
    """True samples and each contestant's, on the same axes; of more than two dimensions every pair
    of the first four; of a single one histograms, under the exact densities.

    Args:
        results: Of a race.
        points: How many of each.
    """
    generator = torch.Generator().manual_seed(0)
    true = results.density.sample(points, generator=generator)
    shown = {"": true} | {
        name: attempt(_samples, results.of(name)[0].flow, results.density, points)
        for name in results.contestants
    }
    if results.density.dim == 1:
        low, high = results.density.support[:, 0].tolist()
        grid = torch.linspace(low, high, 400, dtype=torch.float64)
        exact = {} if "context" in results.density.sizes else _exact(results, grid)
        return plot_histograms(results, shown, grid, exact)
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


def plot_trajectories(results: Results, particles: int = 120, points: int = 60) -> "Figure":
    """The way of particles from noise to data: along the ODE of a continuous flow, from layer to
    layer of a discrete one, whose title says so. Every contestant gets the same noise.

    Args:
        results: Of a race on data of two dimensions or more, of which the first two are shown.
        particles: How many paths.
        points: Times along each.
    Raises:
        ValueError: The data have one dimension.
    """
    if results.density.dim < 2:
        raise ValueError("plot_trajectories: expected data of dim 2 or more, got 1")
    ways = {
        name: attempt(way_of, results.of(name)[0].flow, particles, points)
        for name in results.contestants
    }
    edges = torch.tensor([0.02, 0.98], dtype=torch.float64)
    seen = [way.quantile(edges, 1) for way in ways.values() if finite(way)]
    window, names, color = window_of(results.density, *seen), titles(results), colors(results)
    collection = optional("matplotlib.collections", "evaluation").LineCollection
    with styled():
        figure, axes = panels(len(ways), window, 2.05 if len(ways) > 2 else 2.9, below=0.3)
        for ax, (name, way) in zip(axes, ways.items(), strict=True):
            said = way_said(results.of(name)[0].flow, way)
            frame(ax, window, names[name], said, axis_names(results.density))
            if isinstance(way, str):
                say_failed(ax, way)
                continue
            lines = way.transpose(0, 1).numpy()
            ax.add_collection(
                collection(lines, colors=color[name], linewidths=0.8, alpha=0.35), autolim=False
            )
            scatter(ax, way[0], "#9aa1ad", size=9, alpha=0.9)
            scatter(ax, way[-1], color[name], size=9, alpha=0.95)
        figure.supxlabel("gray dots: noise    colored dots: data", color=FAINT, fontsize=11)
    return figure


def plot_gap_over_time(results: Results) -> "Figure":
    """Held-out gap to the truth against seconds of training, or the NLL of one's own points.

    A line is the mean over seeds, its band the least and the most of them. The gap's axis is
    logarithmic, around zero linear where a gap came out negative within its error.

    Args:
        results: Of a race.
    """
    names, color, dash = titles(results), colors(results), dashes(results)
    known, values = results.score == "gap", []
    with styled():
        figure = new_figure(WIDTH, HEIGHT)
        ax = figure.subplots()
        for name, title in names.items():
            curve = _over_seeds([entry.curve for entry in results.of(name)])
            if curve is None:
                ax.plot([], [], color=color[name], label=f"{title} (no finite value)")
                continue
            time, mean, low, high = curve
            ax.plot(time, mean, ls=dash[name], color=color[name], lw=2, label=title)
            ax.plot(time[-1:], mean[-1:], "o", color=color[name], ms=5)
            if len(results.of(name)) > 1:
                ax.fill_between(time, low, high, color=color[name], alpha=0.18, lw=0)
            values += [*low, *high]
        if known and values:
            _log_axis(ax, min(values))
        ax.set(
            xlabel="seconds of training",
            ylabel="gap to the truth (nats)" if known else "held-out NLL (nats)",
        )
        ax.set_xlim(left=0)
        ax.grid(True)
        legend_below(figure, ax)
    return figure


def plot_quality_against_nfe(results: Results) -> "Figure":
    """Sliced W2 of samples against evaluations of the field, both logarithmic.

    Lines are Euler's method with few steps, stars each flow's own solver, dashed lines discrete
    flows, which evaluate no field; the gray line is what two sets of true samples score.

    Args:
        results: Of a race.
    """
    names, color, dash = titles(results), colors(results), dashes(results)
    with styled():
        figure = new_figure(WIDTH, HEIGHT)
        ax = figure.subplots()
        ax.set(xscale="log", yscale="log")
        for name, title in names.items():
            _quality_line(ax, results.of(name), title, color[name], dash[name])
        floor = results.floor.get("sliced_w2", math.nan)
        if math.isfinite(floor) and floor > 0:
            ax.axhline(floor, color=TRUTH, lw=5, alpha=0.25, label=SAME, solid_capstyle="butt")
        powers_of_two(ax, largest_nfe(results))
        sparse_log(ax.yaxis, ax.get_ylim())
        known = results.score == "gap"
        ax.set(
            xlabel="evaluations of the field per sample",
            ylabel="sliced W2 to true samples" if known else "sliced W2, standardized columns",
        )
        if largest_nfe(results) > 0:
            ax.plot([], [], "*", color=FAINT, ms=11, ls="none", label="a flow's own solver")
        ax.grid(True)
        legend_below(figure, ax)
    return figure


def plot_corners(results: Results, true: Tensor, samples: dict[str, Tensor | str]) -> "Figure":
    """A corner for each contestant: its samples over the true ones in every pair of the first four
    columns, and histograms of each column on the diagonal.

    Args:
        results: Of a race.
        true: True samples, shape (N, D).
        samples: Contestant → samples (N, D), or words where there are none.
    """
    count = min(true.shape[1], COLUMNS)
    names = axis_names(results.density) or [f"x{k + 1}" for k in range(count)]
    across = min(len(samples), 2)
    side, down = 6.4 / across + 0.3, math.ceil(len(samples) / across)
    with styled():
        figure = new_figure(side * across, side * down)
        parts = figure.subfigures(down, across, squeeze=False).flat
        for part, (name, drawn) in zip(parts, samples.items(), strict=False):
            part.suptitle(titles(results)[name], fontsize=11, fontweight="bold")
            if isinstance(drawn, str):
                ax = part.subplots()
                ax.axis("off")
                say_failed(ax, drawn)
                continue
            grid = part.subplots(count, count)
            corner(grid, true, drawn, colors(results)[name])
            for k, column in enumerate(names[:count]):
                short = textwrap.shorten(column, 14, placeholder="…")
                grid[-1, k].set_xlabel(short, fontsize=9)
                grid[k, 0].set_ylabel(short if k else "", fontsize=9)
        total = results.density.dim
        few = f"the first {count} of {total} dimensions    " if total > count else ""
        figure.supxlabel(f"{few}gray: data    colored: samples", color=FAINT, fontsize=11)
    return figure


def plot_histograms(
    results: Results, samples: dict[str, Tensor | str], grid: Tensor, exact: dict[str, Tensor]
) -> "Figure":
    """Samples of one dimension: the true ones filled, each contestant's as an outline, under the
    lines of their exact densities.

    Args:
        results: Of a race.
        samples: Contestant → samples (N, 1), or words where there are none; the true ones at "".
        grid: Where densities are given, ascending, shape (M,).
        exact: Contestant → density on the grid, shape (M,); the true one, if known, at "".
    """
    names, color, dash = titles(results), colors(results), dashes(results)
    names, color, dash = {"": "true density"} | names, {"": TRUTH} | color, {"": "-"} | dash
    low, high = float(grid[0]), float(grid[-1])
    bins = np.linspace(low, high, 61)
    with styled():
        figure = new_figure(WIDTH, HEIGHT)
        ax = figure.subplots()
        for name, values in samples.items():
            if isinstance(values, str):
                ax.plot([], [], color=color[name], label=f"{names[name]} (failed)")
                continue
            finite = values[:, 0].cpu().numpy()
            finite = finite[np.isfinite(finite)]
            heights = np.histogram(finite, bins)[0] / max(len(finite), 1) / (bins[1] - bins[0])
            if name == "":
                real = "true samples" if results.score == "gap" else "your points"
                ax.stairs(heights, bins, fill=True, color=TRUTH, alpha=0.25, label=real)
            else:
                faint = name in exact  # its density tells more
                ax.stairs(
                    heights, bins, color=color[name], ls=dash[name], lw=0.8 if faint else 1.8,
                    alpha=0.5 if faint else 1.0, label=None if faint else names[name],
                )  # fmt: skip
        for name, density in exact.items():
            ax.plot(grid, density, color=color[name], ls=dash[name], lw=2, label=names[name])
        ax.set(xlabel=next(iter(axis_names(results.density)), "value"), ylabel="density")
        ax.set_xlim(low, high)
        legend_below(figure, ax)
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


def _exact(results: Results, grid: Tensor) -> dict[str, Tensor]:
    """Contestant → its density on a grid, shape (N,), of those that have one there; the true one,
    if known, at ""."""
    flows = {name: results.of(name)[0].flow for name in results.contestants}
    known = {"": results.density} if results.score == "gap" else {}
    found = {
        name: attempt(density_at, flow, grid[:, None]) for name, flow in {**known, **flows}.items()
    }
    return {name: values for name, values in found.items() if isinstance(values, Tensor)}


@torch.no_grad()
def _samples(flow: Flow, density: Any, points: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    if "context" not in density.sizes:
        return flow.sample((points,), generator=generator).cpu()
    context = density.take(density.draw(points, generator)).context
    return flow.sample((), context.to(device_of(flow)), generator=generator).cpu()


def _over_seeds(
    curves: list[list[tuple[float, float]]],
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray] | None:
    """Time, mean, least and most over seeds; None without a finite value.

    Seeds are compared at the same share of their training, so that the line ends at the mean of
    where they end, although the same steps take one seed longer than another.
    """
    finite = [np.array([point for point in curve if math.isfinite(point[1])]) for curve in curves]
    finite = [curve[np.argsort(curve[:, 0], kind="stable")] for curve in finite if len(curve)]
    if not finite:
        return None
    shares = [curve[:, 0] / max(curve[-1, 0], 1e-12) for curve in finite]
    grid = np.unique(np.concatenate(shares).round(3))
    grid = grid[grid >= max(share[0] for share in shares).round(3)]
    pairs = list(zip(shares, finite, strict=True))
    times = np.mean([np.interp(grid, share, curve[:, 0]) for share, curve in pairs], 0)
    values = np.stack([np.interp(grid, share, curve[:, 1]) for share, curve in pairs])
    return times, values.mean(0), values.min(0), values.max(0)


def _quality_line(ax: "Axes", entries: list[Entry], title: str, color: str, dash: Any) -> None:
    runs = [entry.few_steps for entry in entries if entry.few_steps]
    if not runs or len({len(run) for run in runs}) > 1:
        return
    # A mean that a NaN of one seed spoils is left out; the page's table names the seed's score.
    points = np.array(runs, dtype=float)
    nfe, mean = points[..., 0].mean(0), points[..., 1].mean(0)
    if points.shape[1] == 1 and nfe[0] == 0:
        if math.isfinite(mean[0]):
            ax.axhline(mean[0], color=color, ls=(0, (6, 3)), lw=2, label=f"{title} (one pass)")
        return
    if points.shape[1] > 1:
        euler = slice(0, -1)
        ax.plot(nfe[euler], mean[euler], ls=dash, marker="o", ms=5, lw=2, color=color, label=title)
        if len(runs) > 1:
            low, high = points[:, euler, 1].min(0), points[:, euler, 1].max(0)
            ax.fill_between(nfe[euler], low, high, color=color, alpha=0.18, lw=0)
    ax.plot(nfe[-1:], mean[-1:], "*", color=color, ms=15, mec="white", mew=0.8, zorder=4)


def largest_nfe(results: Results) -> float:
    """The most evaluations that a sample takes of a field; 0 where every flow is discrete."""
    return max((nfe for entry in results.entries for nfe, _ in entry.few_steps), default=0)


def _log_axis(ax: "Axes", least: float) -> None:
    if least > 0:
        ax.set_yscale("log")
    else:
        ax.set_yscale("symlog", linthresh=0.01, linscale=0.5)
        ax.axhline(0, color="#9aa1ad", lw=0.8)
    sparse_log(ax.yaxis, ax.get_ylim())
