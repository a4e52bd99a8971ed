"""Curves of a race: learning against time, quality against the evaluations it takes."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from cnf.plotting.axes import HEIGHT, WIDTH, legend_below, powers_of_two, sparse_log
from cnf.plotting.style import (
    DASHES,
    FAINT,
    PALETTE,
    TRUTH,
    new_figure,
    styled,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SAME = "two sets of true samples"


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
