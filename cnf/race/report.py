"""The race as one self-contained page: verdict, scores, pictures, and how it was measured."""

import base64
import math
import re
import struct
from datetime import datetime
from pathlib import Path
from typing import Any

from cnf.data import Images, Points
from cnf.errors import abbreviated, optional
from cnf.metrics import Score
from cnf.metrics.estimate import number
from cnf.race import verdict
from cnf.race.figures import save_figures
from cnf.race.results import Results, shortened


def write_report(results: Results, folder: str | Path) -> Path:
    """Write figures/ and report.html, a page that needs no other file and no network.

    Args:
        results: Of a race.
        folder: Where to; results.csv and results.json are written too where they are missing.

    Returns:
        The page.
    """
    folder = Path(folder)
    figures = save_figures(results, folder / "figures")
    if not all((folder / name).exists() for name in ("results.csv", "results.json")):
        results.save(folder)
    page = folder / "report.html"
    page.write_text(page_of(results, figures), encoding="utf-8")
    return page


def page_of(results: Results, figures: dict[str, Path]) -> str:
    """The page as HTML, with these pictures (name → file) inside."""
    jinja = optional("jinja2", "evaluation")
    environment = jinja.Environment(
        loader=jinja.PackageLoader("cnf.race"), autoescape=True, trim_blocks=True,
        lstrip_blocks=True, undefined=jinja.StrictUndefined,
    )  # fmt: skip
    environment.filters["emphasized"] = _emphasized
    names, color = results.titles, results.colors
    swatches = {name: {"title": names[name], "color": color[name]} for name in names}
    shown = results.columns
    return environment.get_template("report.html.j2").render(
        results=results,
        known=results.score == "gap",
        subtitle=_subtitle(results),
        lead=verdict.lead(results),
        contests=[verdict.contest(results, score) for score in verdict.contested(results)],
        swatches=swatches,
        columns=shown,
        rows=_rows(results, shown),
        floor=[number(results.floor.get(score.key, math.nan)) for score in shown],
        pictures=[_picture(results, name, file) for name, file in figures.items()],
        facts=_facts(results),
    )


def _rows(results: Results, shown: list[Score]) -> list[dict[str, Any]]:
    """A row per contestant, best first.

    A cell has its text, its number to sort by, and whether it is the best of its column.
    """
    best = {score.key: _best(results, score) for score in shown}
    rows = []
    for name in results.ranking():
        cells = []
        for score in shown:
            mean = results.mean(name, score.key)
            value, is_best = repr(float(mean.value)), mean.value == best[score.key]
            cells.append({"text": str(mean), "value": value, "best": is_best})
        rows.append({"name": name, "cells": cells})
    return rows


def _best(results: Results, score: Score) -> float:
    """The best number of a score; NaN, which nothing equals, where none is better than others."""
    values = [results.mean(name, score.key).value for name in results.contestants]
    values = [value for value in values if math.isfinite(value)]
    if score.lower is None or len(values) < 2 or len(set(values)) == 1:
        return math.nan
    return min(values) if score.lower else max(values)


def _picture(results: Results, name: str, file: Path) -> dict[str, Any]:
    """A picture as the page holds it, and the words beside it."""
    data = file.read_bytes()
    kind = file.suffix[1:]
    layout, start = (">II", 16) if kind == "png" else ("<HH", 6)  # where either format says so
    width, height = struct.unpack_from(layout, data, start)
    moving = kind == "gif"
    if moving:
        title, caption = results.titles[name.removeprefix("flow-")], ""
    else:
        title, caption = _captions(results)[name]
    return {
        "name": name,
        "moving": moving,
        "title": title,
        "caption": caption,
        "alt": f"Animation: noise becomes data, {title}" if moving else title,
        "source": f"data:image/{kind};base64,{base64.b64encode(data).decode()}",
        "width": width if moving else round(0.85 * width),
        "height": height if moving else round(0.85 * height),
    }


def _captions(results: Results) -> dict[str, tuple[str, str]]:
    """Title and caption of each picture: what to look for."""
    known = results.score == "gap"
    truth = "the true density" if known else "your points"
    scale = (
        "Brightness means the same in every panel: the scale ends near the truth's peak."
        if known
        else "Brightness means the same in every panel."
    )
    learning = (
        "Held-out gap to the true density against seconds of training; lower is better. Where two "
        "lines cross, the winner depends on the budget. A line that is still falling was stopped "
        "early."
        if known
        else "Negative log-likelihood of held-out points against seconds of training; lower is "
        "better. A line that turns upwards is overfitting."
    )
    return {
        "density": (
            "What each one learned",
            f"Exact densities beside {truth}. {scale} Look for bridges between parts that should "
            "be apart, blurred edges, and mass where there should be none.",
        ),
        "samples": ("Samples", _about_samples(results)),
        "nearest": (
            "Nearest pictures",
            "In each row a sample, then the training pictures nearest to it, by the Euclidean "
            "distance of pixels. A sample that is the same as one of them was memorized.",
        ),
        "interpolations": (
            "Between two pictures",
            "In each row two of your pictures at the ends, and what lies between their codes. In "
            "a good code the shapes change; a poor one fades one picture into the other.",
        ),
        "trajectories": (
            "From noise to data",
            "The same noise, carried to data by each. Straight and even paths need few solver "
            "steps; bends cost evaluations. A discrete flow has no time: its corners are its "
            "layers.",
        ),
        "gap_over_time": ("Learning", learning),
        "nll_over_time": ("Learning", learning),
        "quality_against_nfe": (
            "Quality against cost of sampling",
            "Sliced W2 between samples and held-out points; lower is better, and nothing beats "
            "the gray line by more than luck. A line that is flat early makes good samples in few "
            "steps. Dashed flows need no solver.",
        ),
    }


def _about_samples(results: Results) -> str:
    """What to look for in the samples."""
    dim = results.density.dim
    which = "true samples" if results.score == "gap" else "your points"
    if isinstance(results.density, Images):
        return (
            "Some of your pictures, and as many samples of each. Look for strokes that break off, "
            "for noise, and for one picture again and again."
        )
    if dim == 1:
        return (
            f"The histogram of {which} under each one's exact density and the outline of its "
            "samples. Look for peaks that are smoothed away, and for mass where there should be "
            "none."
        )
    first = f" Shown are all pairs of the first four of {dim} dimensions." if dim > 4 else ""
    return (
        f"As many points from each, on the axes of {which}. Look for strays between the parts and "
        f"for thin or missing regions.{first}"
    )


def _subtitle(results: Results) -> str:
    settings = results.settings
    seconds, steps = settings.get("seconds"), settings.get("steps")
    budget = f"{number(seconds)} s" if seconds else f"{steps:,} steps" if steps else "own budget"
    most = "at most " if settings.get("patience") else ""  # which may have ended it before
    seeds = len(settings.get("seeds", [0]))
    count = len(results.contestants)
    return (
        f"{count} contestant{'s' * (count > 1)} · {most}{budget} of training each · "
        f"{seeds} seed{'s' * (seeds > 1)}"
    )


def _about_data(results: Results) -> str:
    """The density, or the file with the columns that are modeled and what they are given."""
    data = results.density
    if not isinstance(data, Points) or isinstance(data, Images):
        return f"{results.data}, {data.dim} dimensions"
    columns = f"{data.dim} dimensions"
    if data.columns is not None:
        columns = abbreviated(data.columns)
    context = data.reading.context if data.reading is not None else None
    given = f" given {abbreviated(context)}" if context else ""
    return f"{data.source or results.data}: {columns}{given}; {len(data.x):,} rows"


def _facts(results: Results) -> list[tuple[str, str]]:
    """How it was measured, as label and words."""
    settings, machine = dict(results.settings), dict(results.machine)
    shares, threads = results.shares(), machine.pop("threads", None)
    if shares:
        settings = {
            k: v for k, v in settings.items() if k not in ("workers", "threads_per_worker")
        }
    seconds, steps = settings.pop("seconds", None), settings.pop("steps", None)
    spent = f"{number(seconds)} seconds of training steps" if seconds else f"{steps} steps"
    if patience := settings.pop("patience", None):
        spent = f"at most {spent}, or until {patience} of 8 validations bring nothing better"
    known = results.score == "gap"
    test = f"{settings.pop('test_points', 0):,}" + (
        " draws from the true density, the same for all" if known else " held-out points"
    )
    shown = {
        "Data": _about_data(results),
        "Entropy of the data": f"{number(results.entropy)} nats"
        if results.entropy is not None
        else None,
        "Budget of each": spent if seconds or steps else None,
        "Seeds": ", ".join(map(str, settings.pop("seeds", []))),
        "Test points": test,
        "Points for the exact W2": f"{settings.pop('w2_points', 0):,}",
        "Solver of the evaluation": settings.pop("evaluation_solver", None),
        "Processor": machine.pop("processor", None),
        "GPU": machine.pop("gpu", None) or "none",
        "Processor cores": machine.pop("cores", None),
        "Training": _trained_by(shares),
        "Threads of the evaluation" if shares else "Threads used": threads,
        "Revision of the code": machine.pop("revision", None),
    }
    failed = settings.pop("failed", {})
    shown["Left out"] = "; ".join(f"{who}: {why}" for who, why in failed.items()) or None
    rest = {key.replace("_", " "): value for key, value in {**settings, **machine}.items()}
    facts = [(key, str(value)) for key, value in {**shown, **rest}.items() if value is not None]
    return [*facts, ("Written", datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"))]


def _trained_by(shares: dict[str, list[str]]) -> str | None:
    """What training had of the machine, with the names of the runs where it differs."""
    if len(shares) < 2:
        return next(iter(shares), None)
    return "; ".join(f"{words}: {shortened(titles)}" for words, titles in shares.items())


def _emphasized(text: str) -> Any:
    """Text made safe, and what stands between ** in it made bold."""
    markup = optional("markupsafe", "evaluation")
    return markup.Markup(
        re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", str(markup.escape(text)))
    )
