"""What pictures share: panels of the plane, logarithmic axes with plain numbers, legends below."""

import math
import textwrap
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cnf.errors import SolverError, optional
from cnf.plotting.style import FAINT

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 150
WIDTH, HEIGHT = 6.0, 4.0  # legible at a phone's width
# Up to so many decades, ticks at these multiples of each power of ten.
TICKS = {1: (1, 2, 3, 5, 7), 2: (1, 2, 5), 3: (1, 3)}


def new_figure(width: float, height: float, layout: str = "constrained") -> "Figure":
    """A figure that no global state knows of, so that it is freed with its last reference."""
    figure = optional("matplotlib.figure", "evaluation").Figure
    return figure(figsize=(width, height), dpi=DPI, layout=layout)


def panels(
    count: int, window: Tensor, side: float = 2.05, below: float = 0.0
) -> tuple["Figure", list["Axes"]]:
    """A grid of `count` equal panels, at most three in a row.

    Args:
        count: How many.
        window: Low and high corner of what they show.
        side: Width of a panel in inches.
        below: Room under them in inches.
    """
    width, height = (window[1] - window[0]).tolist()
    columns = {1: 1, 2: 2, 4: 2}.get(count, 3)
    rows = math.ceil(count / columns)
    tall = side * (1.0 if unlike(window) else min(height / width, 2.0)) + 0.75
    figure = new_figure(side * columns, rows * tall + below, layout="compressed")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for spare in axes[count:]:
        spare.remove()
    return figure, axes[:count]


def unlike(window: Tensor) -> bool:
    """Whether a window's sides are so unlike that one scale for both would show nothing."""
    width, height = (window[1] - window[0]).tolist()
    return not 0.2 < height / width < 5


def frame(
    ax: "Axes", window: Tensor, title: str, note: str = "", names: Sequence[str] = ()
) -> None:
    """Fix what an axis shows, and write a title and a smaller note above.

    Both coordinates have one scale, or each its own where the window's sides are unlike; ticks
    stand at coordinates with names or scales of their own.
    """
    (left, bottom), (right, top) = window.tolist()
    ax.set(xlim=(left, right), ylim=(bottom, top))
    ax.set(aspect="auto" if unlike(window) else "equal")
    if names or unlike(window):
        few_ticks(ax)
    else:
        ax.set(xticks=[], yticks=[])
    for name, write in zip(names, (ax.set_xlabel, ax.set_ylabel), strict=False):
        write(textwrap.shorten(name, 24, placeholder="…"), fontsize=9)
    ax.set_title(textwrap.fill(title, 19), pad=22 if note else 7)
    if note:
        ax.annotate(
            note, (0.5, 1.0), (0, 6), "axes fraction", "offset points", ha="center", va="bottom",
            fontsize=10.5, color=FAINT,
        )  # fmt: skip
    for spine in ax.spines.values():
        spine.set(visible=True, color="#d5d9e0")


def few_ticks(ax: "Axes", most: int = 3) -> None:
    """Set small ticks, without a power of ten apart from them, which would hit a title."""
    ticker = optional("matplotlib.ticker", "evaluation")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(ticker.MaxNLocator(most, steps=[1, 2, 5, 10]))
        plain = ticker.FuncFormatter(lambda value, _: f"{value:.10g}".replace("-", "−"))
        axis.set_major_formatter(plain)
    ax.tick_params(labelsize=7)


def say_failed(ax: "Axes", why: str) -> None:
    """Write words in place of a picture that could not be made."""
    ax.text(
        0.5, 0.5, textwrap.fill(why, 26), ha="center", va="center", color=FAINT, fontsize=10,
        transform=ax.transAxes, wrap=True,
    )  # fmt: skip


def axis_names(density: Any) -> tuple[str, ...]:
    """The names of the columns of one's own points, where they have some."""
    return getattr(density, "columns", None) or ()


def is_known(data: Any) -> bool:
    """Whether data are a known density, and not one's own points."""
    return data.entropy is not None


def attempt(make: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """What `make` returns, or in words why there is nothing.

    One flow whose ODE cannot be solved must not cost the others their pictures.
    """
    try:
        return make(*arguments, **options)
    except SolverError as error:
        return f"The ODE could not be solved: {error.cause}"
    except Exception as error:
        return f"It could not be drawn: {error}"


def scatter(
    ax: "Axes", points: Tensor, color: str, size: float = 3.0, alpha: float = 0.35
) -> None:
    """Draw small translucent dots at the first two coordinates of points (N, D)."""
    x, y = points[:, :2].cpu().double().unbind(-1)
    ax.scatter(x.numpy(), y.numpy(), s=size, c=color, alpha=alpha, linewidths=0, zorder=2)


def window_of(density: Any, *others: Tensor) -> Tensor:
    """What pictures show: where nearly all samples are, low and high corner, shape (2, 2).

    Args:
        density: Anything with `sample`.
        others: Points of shape (N, D) that should be seen too, short of far outliers.
    """
    drawn = density.sample(4000, generator=torch.Generator().manual_seed(0)).detach()
    edges = torch.tensor([0.002, 0.998], dtype=torch.float64)
    low, high = drawn[:, :2].cpu().double().quantile(edges, 0)
    beyond = 0.08 * (high - low)  # the support itself reaches far into tails that no eye can see
    low, high = low - beyond, high + beyond
    reach = 1.5 * (high - low)  # a model gone astray must not shrink the rest to a dot
    for points in others:
        seen = points.reshape(-1, points.shape[-1])[:, :2].cpu().double()
        seen = seen[torch.isfinite(seen).all(-1)]
        if len(seen):
            edge = seen[:100_000].quantile(edges, 0)
            low = torch.maximum(torch.minimum(low, edge[0]), low - reach)
            high = torch.minimum(torch.maximum(high, edge[1]), high + reach)
    margin = torch.where(high > low, 0.02 * (high - low), 0.5)  # of each side: units may differ
    return torch.stack([low - margin, high + margin])


def sparse_log(axis: Any, limits: tuple[float, float]) -> None:
    """Set ticks at 1, 2 and 5 of each power of ten, fewer on a long axis, as plain numbers."""
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
    """Set the ticks of evaluations at 1, 2, 4, … up to the largest, at least 32."""
    ticker = optional("matplotlib.ticker", "evaluation")
    top = max(largest, 32)
    ticks = [2**k for k in range(math.floor(math.log2(top)) + 1)]
    ax.set_xlim(0.85, top * 1.35)
    ax.xaxis.set_major_locator(ticker.FixedLocator(ticks))
    ax.xaxis.set_minor_locator(ticker.NullLocator())
    ax.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:.0f}"))


def legend_below(figure: "Figure", ax: "Axes") -> None:
    """Put the legend below the axes, where it hides nothing and the picture stays narrow."""
    handles, labels = ax.get_legend_handles_labels()
    columns = 1 if max(map(len, labels), default=0) > 26 else 2
    rows = math.ceil(len(labels) / columns)
    figure.set_size_inches(WIDTH, HEIGHT + 0.24 * rows)
    figure.legend(handles, labels, loc="outside lower left", ncols=columns, labelspacing=0.35)
