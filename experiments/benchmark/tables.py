"""Markdown tables."""

import math
from collections.abc import Iterable, Sequence


def markdown(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table with its first column to the left and the others to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def number(value: float | None, digits: int = 3) -> str:
    """To three digits, without an exponent; a dash for None and NaN."""
    if value is None or math.isnan(value):
        return "–"
    if value == 0:
        return "0"
    places = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{places}f}"


def spread(summary: dict[str, float]) -> str:
    """Median (quartiles) of a `measure.summary`."""
    median, low, high = (number(summary[name]) for name in ("median", "low", "high"))
    return f"{median} ({low}–{high})" if summary["runs"] > 1 else f"{median} (once)"


def times(value: float, reference: float) -> str:
    """How many times `reference` it is."""
    return f"{number(value / reference)} ×"
