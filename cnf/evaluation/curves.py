"""Curves of a race: learning against time, quality against the evaluations it takes."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from cnf.evaluation.axes import HEIGHT, WIDTH, legend_below, powers_of_two, sparse_log
from cnf.evaluation.comparison import Entry, Results
from cnf.evaluation.style import (
    DASHES,
    FAINT,
    PALETTE,
    TRUTH,
    axis_names,
    colors,
    dashes,
    new_figure,
    styled,
    titles,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SAME = "two sets of true samples"


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


def plot_nfe_curves(
    curves: Mapping[str, list[tuple[int, float]]],
    floor: float = math.nan,
    ylabel: str = "sliced W2 to true samples",
) -> "Figure":
    """Distance against evaluations, both logarithmic; a star is a flow's own solver.

    Args:
        curves: By title, as `nfe_curve` gives them, such as {"before": …, "after reflow": …}.
        floor: What two sets of true samples score.
        ylabel: Name of the distance.
    """
    largest = max(nfe for curve in curves.values() for nfe, _ in curve)
    with styled():
        figure = new_figure(WIDTH, HEIGHT)
        ax = figure.subplots()
        ax.set(xscale="log", yscale="log")
        for k, (title, curve) in enumerate(curves.items()):
            color, dash = PALETTE[k % len(PALETTE)], DASHES[k // len(PALETTE) % len(DASHES)]
            nfe, value = zip(*curve, strict=True)
            ax.plot(
                nfe[:-1], value[:-1], ls=dash, marker="o", ms=5, lw=2, color=color, label=title
            )
            ax.plot(nfe[-1:], value[-1:], "*", color=color, ms=15, mec="white", mew=0.8, zorder=4)
        if floor > 0:
            ax.axhline(floor, color=TRUTH, lw=5, alpha=0.25, label=SAME, solid_capstyle="butt")
        ax.plot([], [], "*", color=FAINT, ms=11, ls="none", label="a flow's own solver")
        powers_of_two(ax, largest)
        sparse_log(ax.yaxis, ax.get_ylim())
        ax.set(xlabel="evaluations of the field per sample", ylabel=ylabel)
        ax.grid(True)
        legend_below(figure, ax)
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
