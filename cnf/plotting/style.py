"""How the pictures and the page look: one palette, one set of fonts, one order of colors."""

from contextlib import AbstractContextManager
from typing import Any

from cnf.errors import optional

# Okabe and Ito's palette, told apart by color-blind readers; its yellow is too pale on white.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#5B4BA0")
# Colors repeat after seven contestants; dashes then tell the lines apart.
DASHES = ("-", (0, (5, 1.5)), (0, (1, 1.2)))
TRUTH = "#4d5562"
INK, FAINT, RULE = "#1f2430", "#6b7280", "#9aa1ad"

_RC: dict[str, Any] = {
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same picture on every machine
    "font.size": 12,
    "axes.titlesize": 11,
    "axes.titlepad": 8,
    "axes.labelsize": 12,
    "axes.edgecolor": RULE,
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


def styled() -> AbstractContextManager[None]:
    """The style, for as long as the context lasts; nothing global is changed."""
    return optional("matplotlib", "evaluation").rc_context(_RC)


def color_of(place: int) -> str:
    """The color of what comes at this place, counted from 0; they repeat after seven."""
    return PALETTE[place % len(PALETTE)]


def dash_of(place: int) -> Any:
    """The line style of what comes at this place: solid until the colors repeat."""
    return DASHES[place // len(PALETTE) % len(DASHES)]
