"""Scores as tables in a terminal."""

import io
import math
from typing import Any

from cnf.data import Images
from cnf.errors import optional
from cnf.metrics.estimate import number
from cnf.race.results import DECIDING, Results


def as_text(results: Results) -> str:
    """The race's table as plain text of 80 columns."""
    console = optional("rich.console", "cli").Console(width=80, file=io.StringIO())
    console.print(results_table(results))
    return console.file.getvalue().strip()


def results_table(results: Results) -> Any:
    """The race as a rich table, best first, with ± under the means, so that it fits 80 columns."""
    escape = optional("rich.markup", "cli").escape
    failed = results.settings.get("failed", {})
    caption = "\n".join(f"Left out: {title}: {reason}" for title, reason in failed.items())
    best = f"A perfect model scores W2 {number(results.floor['w2'])}."
    title = f"{escape(results.data)}, best first. {best}"
    if results.score == "nll":
        pictures = isinstance(results.density, Images)
        title += (
            f" W2 is measured on {'pixels from 0 to 1' if pictures else 'standardized columns'}."
        )
    columns = [  # results.csv and the page have all
        score
        for score in results.columns
        if score.terminal and (score.key == results.score or score.key not in DECIDING)
    ]
    table = optional("rich.table", "cli").Table(
        title=title,
        caption=escape(caption) or None,
        box=optional("rich.box", "cli").SIMPLE,
    )
    table.add_column("contestant", min_width=16)  # the numbers must leave room for the names
    for score in columns:
        table.add_column(score.terminal, justify="right", no_wrap=True)
    for contestant in results.ranking():
        cells = (
            str(results.mean(contestant, score.key)).replace(" ± ", "\n± ") for score in columns
        )
        table.add_row(escape(results.titles[contestant]), *cells)
    return table


def scores_table(scores: dict[str, float], floor: dict[str, float]) -> Any:
    """One flow's scores as a rich table, beside what two sets of true samples score."""
    table = optional("rich.table", "cli").Table("score", "value", "floor")
    for name, value in scores.items():
        table.add_row(name.replace("_", " "), number(value), number(floor.get(name, math.nan)))
    return table
