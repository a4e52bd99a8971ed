"""Axes of curves: logarithmic ones with plain numbers, and legends below them."""

import math
from typing import TYPE_CHECKING, Any

from cnf.errors import optional

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, HEIGHT = 6.0, 4.0  # legible at a phone's width
# Up to so many decades, ticks at these multiples of each power of ten.
TICKS = {1: (1, 2, 3, 5, 7), 2: (1, 2, 5), 3: (1, 3)}


def sparse_log(axis: Any, limits: tuple[float, float]) -> None:
    """Plain numbers at 1, 2 and 5 of each power of ten, fewer of them on a long axis; no 10⁻²."""
    ticker = optional("matplotlib.ticker", "evaluation")
    low, high = limits
    if low > 0:
        decades = math.log10(high / low)
        if decades < 0.5:
            axis.set_major_locator(ticker.MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        else:
            subs = next((subs for limit, subs in TICKS.items() if decades < limit), (1,))
            axis.set_major_locator(ticker.LogLocator(subs=subs))
        axis.set_minor_locator(ticker.NullLocator())
    axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:.3g}"))


def powers_of_two(ax: "Axes", largest: float) -> None:
    """An x axis of evaluations: ticks at 1, 2, 4, … up to the largest, at least 32."""
    ticker = optional("matplotlib.ticker", "evaluation")
    top = max(largest, 32)
    ticks = [2**k for k in range(math.floor(math.log2(top)) + 1)]
    ax.set_xlim(0.85, top * 1.35)
    ax.xaxis.set_major_locator(ticker.FixedLocator(ticks))
    ax.xaxis.set_minor_locator(ticker.NullLocator())
    ax.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:.0f}"))


def legend_below(figure: "Figure", ax: "Axes") -> None:
    """Below the axes, so that nothing is hidden and the picture stays narrow."""
    handles, labels = ax.get_legend_handles_labels()
    columns = 1 if max(map(len, labels), default=0) > 26 else 2
    rows = math.ceil(len(labels) / columns)
    figure.set_size_inches(WIDTH, HEIGHT + 0.24 * rows)
    figure.legend(handles, labels, loc="outside lower left", ncols=columns, labelspacing=0.35)
