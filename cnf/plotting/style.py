"""How the pictures and the page look: one palette, one set of fonts, one way to write numbers."""

import math
import textwrap
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cnf.errors import SolverError, optional
from cnf.flow import Flow

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, told apart by color-blind readers; its yellow is too pale on white.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#5B4BA0")
# Colors repeat after seven contestants; dashes then tell the lines apart.
DASHES = ("-", (0, (5, 1.5)), (0, (1, 1.2)))
TRUTH = "#4d5562"
INK, FAINT = "#1f2430", "#6b7280"

_RC: dict[str, Any] = {
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same picture on every machine
    "font.size": 12,
    "axes.titlesize": 11,
    "axes.titlepad": 8,
    "axes.labelsize": 12,
    "axes.edgecolor": "#9aa1ad",
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.titleweight": "bold",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "text.color": INK,
    "text.parse_math": False,  # a file's name may hold dollars
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelsize": 11,
    "ytick.labelsize": 11,
    "grid.color": "#e4e7ec",
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "legend.fontsize": 11,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
}
DPI = 150


def styled() -> AbstractContextManager[None]:
    """The style, for as long as the context lasts; nothing global is changed."""
    return optional("matplotlib", "evaluation").rc_context(_RC)


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
    grid = figure.subplots(rows, columns, squeeze=False).flat
    axes = list(grid)
    for spare in axes[count:]:
        spare.remove()
    return figure, axes[:count]


def unlike(window: Tensor) -> bool:
    """Whether its sides are of so different lengths that one scale for both shows nothing."""
    width, height = (window[1] - window[0]).tolist()
    return not 0.2 < height / width < 5


def frame(
    ax: "Axes", window: Tensor, title: str, note: str = "", names: Sequence[str] = ()
) -> None:
    """Fix what an axis shows, and write a title and a smaller note above. Both coordinates have
    one scale, or each its own where the window's sides are unlike; ticks stand at coordinates
    with names or scales of their own."""
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
    """Small ticks with whole numbers: no power of ten apart from them, which would hit a title."""
    ticker = optional("matplotlib.ticker", "evaluation")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(ticker.MaxNLocator(most, steps=[1, 2, 5, 10]))
        plain = ticker.FuncFormatter(lambda value, _: f"{value:.10g}".replace("-", "−"))
        axis.set_major_formatter(plain)
    ax.tick_params(labelsize=7)


def say_failed(ax: "Axes", why: str) -> None:
    """Words in place of a picture that could not be made."""
    ax.text(
        0.5, 0.5, textwrap.fill(why, 26), ha="center", va="center", color=FAINT, fontsize=10,
        transform=ax.transAxes, wrap=True,
    )  # fmt: skip


def scatter(
    ax: "Axes", points: Tensor, color: str, size: float = 3.0, alpha: float = 0.35
) -> None:
    """Small translucent dots at the first two coordinates of points (N, D)."""
    x, y = points[:, :2].cpu().double().unbind(-1)
    ax.scatter(x.numpy(), y.numpy(), s=size, c=color, alpha=alpha, linewidths=0, zorder=2)


def axis_names(density: Any) -> tuple[str, ...]:
    """The columns of one's own points, where they have names."""
    return getattr(density, "columns", None) or ()


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


def device_of(flow: Flow) -> torch.device:
    """Where the flow lives."""
    return next((tensor.device for tensor in flow.parameters()), torch.device("cpu"))


def number(value: float, error: float = math.nan) -> str:
    """A number as a person reads it: three digits, or as many as its error supports.

    >>> number(0.30000000004), number(12345.6), number(0.01234, 0.0031), number(float("nan"))
    ('0.3', '12,346', '0.012 ± 0.003', '–')
    """
    if math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if math.isfinite(error) and error > 0 and abs(value) < 1e4 and error >= 1e-5:
        # One digit of the error, two where it starts with 1: 0.012 ± 0.003, 2.50 ± 0.14.
        exponent = math.floor(math.log10(error))
        leading = error / 10**exponent
        digits = 3 - math.floor(math.log10(max(abs(value), error)))  # of four digits in all
        places = max(0, min(5, -exponent + (leading < 1.95), digits))
        small = round(error, places) == 0
        return f"{_signed(value, places)} ± {'<' * small}{max(error, 10**-places):,.{places}f}"
    if value == 0:
        return "0"
    size = abs(value)
    if size < 1e-4:
        digits, exponent = f"{value:.1e}".split("e")
        return f"{digits.replace('-', '−')}·10{_superscript(int(exponent))}"
    places = max(0, 2 - math.floor(math.log10(size)))
    text = _signed(value, places)
    return text.rstrip("0").rstrip(".") if "." in text and size < 100 else text


def _signed(value: float, places: int) -> str:
    text = f"{value:,.{places}f}".replace("-", "−")
    return text.lstrip("−") if not any(digit in text for digit in "123456789") else text


def _superscript(exponent: int) -> str:
    return str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def joined(names: Sequence[str]) -> str:
    """Names as a list in a sentence: "a, b and c"."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def attempt(make: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """What `make` returns, or words: one contestant whose ODE cannot be solved must not cost the
    others their pictures."""
    try:
        return make(*arguments, **options)
    except SolverError as error:
        return f"The ODE could not be solved: {error.cause}"
    except Exception as error:
        return f"It could not be drawn: {error}"
