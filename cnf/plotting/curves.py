"""Curves: learning against time, quality against the evaluations that it takes."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from cnf.plotting.axes import HEIGHT, WIDTH, legend_below, new_figure, powers_of_two, sparse_log
from cnf.plotting.style import FAINT, RULE, TRUTH, color_of, dash_of, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Curve = Sequence[tuple[float, float]]
SAME = "two sets of true samples"


def plot_learning(
    curves: Mapping[str, Sequence[Curve]],
    ylabel: str = "gap to the truth (nats)",
    log: bool = True,
) -> "Figure":
    """A held-out score against seconds of training.

    A line is the mean over seeds, its band the least and the most of them.

    Args:
        curves: Title → a list of curves of (seconds, score), one for each seed; of one `cnf.fit`
            {"nsf": [history.curve()]}.
        ylabel: Name of the score.
        log: Whether its axis is logarithmic, and around zero linear where a score is negative.

    Returns:
        The figure.
    """
    values = []
    with styled():
        figure = new_figure(WIDTH, HEIGHT)
        ax = figure.subplots()
        for place, (title, seeds) in enumerate(curves.items()):
            color, curve = color_of(place), _over_seeds(seeds)
            if curve is None:
                ax.plot([], [], color=color, label=f"{title} (no finite value)")
                continue
            time, mean, low, high = curve
            ax.plot(time, mean, ls=dash_of(place), color=color, lw=2, label=title)
            ax.plot(time[-1:], mean[-1:], "o", color=color, ms=5)
            if len(seeds) > 1:
                ax.fill_between(time, low, high, color=color, alpha=0.18, lw=0)
            values += [*low, *high]
        if log and values:
            _log_axis(ax, min(values))
        ax.set(xlabel="seconds of training", ylabel=ylabel)
        ax.set_xlim(left=0)
        ax.grid(True)
        legend_below(figure, ax)
    return figure


def plot_nfe_curves(
    curves: Mapping[str, Curve | Sequence[Curve]],
    floor: float = math.nan,
    ylabel: str = "sliced W2 to true samples",
) -> "Figure":
    """Distance of samples against evaluations of the field, both logarithmic.

    Lines are a fixed-step method with few steps, stars each flow's own solver, dashed lines
    discrete flows, which evaluate no field. Of several seeds a line is the mean, its band the
    least and the most.

    Args:
        curves: Title → a curve as `nfe_curve` gives it, or one for each seed.
        floor: What two sets of true samples score: a gray line.
        ylabel: Name of the distance.

    Returns:
        The figure.
    """
    seeds: dict[str, Any] = {
        title: [curve] if isinstance(curve[0], tuple) else curve
        for title, curve in curves.items()
        if curve
    }
    largest = max((nfe for runs in seeds.values() for run in runs for nfe, _ in run), default=0)
    with styled():
        figure = new_figure(WIDTH, HEIGHT)
        ax = figure.subplots()
        ax.set(xscale="log", yscale="log")
        for place, title in enumerate(curves):
            _quality_line(ax, seeds.get(title, []), title, color_of(place), dash_of(place))
        if math.isfinite(floor) and floor > 0:
            ax.axhline(floor, color=TRUTH, lw=5, alpha=0.25, label=SAME, solid_capstyle="butt")
        if largest > 0:
            ax.plot([], [], "*", color=FAINT, ms=11, ls="none", label="a flow's own solver")
        powers_of_two(ax, largest)
        sparse_log(ax.yaxis, ax.get_ylim())
        ax.set(xlabel="evaluations of the field per sample", ylabel=ylabel)
        ax.grid(True)
        legend_below(figure, ax)
    return figure


def _over_seeds(
    curves: Sequence[Curve],
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


def _quality_line(ax: "Axes", seeds: Sequence[Curve], title: str, color: str, dash: Any) -> None:
    if not seeds or len({len(curve) for curve in seeds}) > 1:
        return
    # A mean that a NaN of one seed spoils is left out; the page's table names the seed's score.
    points = np.array(seeds, dtype=float)
    nfe, mean = points[..., 0].mean(0), points[..., 1].mean(0)
    if points.shape[1] == 1 and nfe[0] == 0:
        if math.isfinite(mean[0]):
            ax.axhline(mean[0], color=color, ls=(0, (6, 3)), lw=2, label=f"{title} (one pass)")
        return
    if points.shape[1] > 1:
        few = slice(0, -1)
        ax.plot(nfe[few], mean[few], ls=dash, marker="o", ms=5, lw=2, color=color, label=title)
        if len(seeds) > 1:
            low, high = points[:, few, 1].min(0), points[:, few, 1].max(0)
            ax.fill_between(nfe[few], low, high, color=color, alpha=0.18, lw=0)
    ax.plot(nfe[-1:], mean[-1:], "*", color=color, ms=15, mec="white", mew=0.8, zorder=4)


def _log_axis(ax: "Axes", least: float) -> None:
    if least > 0:
        ax.set_yscale("log")
    else:
        ax.set_yscale("symlog", linthresh=0.01, linscale=0.5)
        ax.axhline(0, color=RULE, lw=0.8)
    sparse_log(ax.yaxis, ax.get_ylim())
