"""The pictures of a race; contestants are shown by their first seed, curves show all seeds."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cnf.data import Images
from cnf.plotting import (
    animate,
    plot_densities,
    plot_images,
    plot_interpolations,
    plot_learning,
    plot_nearest,
    plot_nfe_curves,
    plot_samples,
    plot_trajectories,
)
from cnf.plotting.axes import attempt, axis_names, window_of
from cnf.plotting.style import styled
from cnf.race.results import Results

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def densities(results: Results) -> "Figure":
    """What each contestant of a race on two-dimensional data learned, with its score."""
    notes = {title: results.score_text(name) for name, title in results.titles.items()}
    return plot_densities(results.density, results.flows, notes)


def samples(results: Results) -> "Figure":
    """True samples and each contestant's."""
    if isinstance(results.density, Images):
        return plot_images(results.density, results.flows)
    return plot_samples(results.density, results.flows)


def nearest(results: Results) -> "Figure":
    """Each contestant's samples of pictures beside the training pictures nearest to them."""
    return plot_nearest(results.density, results.flows)


def interpolations(results: Results) -> "Figure":
    """What each contestant puts between two pictures."""
    return plot_interpolations(results.density, results.flows)


def trajectories(results: Results) -> "Figure":
    """Each contestant's paths from noise to data."""
    return plot_trajectories(results.density, results.flows)


def learning(results: Results) -> "Figure":
    """Held-out gap to the truth, or the NLL of one's own points, against seconds of training."""
    curves = {
        title: [entry.curve for entry in results.of(name)]
        for name, title in results.titles.items()
    }
    if results.score == "gap":
        return plot_learning(curves)
    return plot_learning(curves, "held-out NLL (nats)", log=False)


def quality_against_nfe(results: Results) -> "Figure":
    """Sliced W2 of samples against evaluations of the field."""
    curves = {
        title: [entry.few_steps for entry in results.of(name) if entry.few_steps]
        for name, title in results.titles.items()
    }
    known = results.score == "gap"
    pictures = isinstance(results.density, Images)
    own = "sliced W2, pixels from 0 to 1" if pictures else "sliced W2, standardized columns"
    distance = "sliced W2 to true samples" if known else own
    return plot_nfe_curves(curves, results.floor["sliced_w2"], distance)


def save_figures(results: Results, folder: str | Path) -> dict[str, Path]:
    """Write every picture that makes sense for these data: PNGs, and a GIF per contestant.

    Args:
        results: Of a race.
        folder: Where to; it is made if need be.

    Returns:
        Name of the picture → its file, as in `density.png` and `flow-realnvp.gif`. Densities,
        paths and animations are for two dimensions only, quality against evaluations of the field
        for races in which somebody has one.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    plane = not what_is_left_out(results.density)
    pictures = isinstance(results.density, Images)
    continuous = any(nfe for entry in results.entries for nfe, _ in entry.few_steps)
    plots: dict[str, Callable[[Results], Figure]] = {
        **({"density": densities} if plane else {}),
        "samples": samples,
        **({"nearest": nearest, "interpolations": interpolations} if pictures else {}),
        **({"trajectories": trajectories} if plane else {}),
        f"{results.score}_over_time": learning,
        **({"quality_against_nfe": quality_against_nfe} if continuous else {}),
    }
    files = {}
    for name, plot in plots.items():
        figure = plot(results)
        with styled():
            figure.savefig(folder / f"{name}.png", bbox_inches="tight", pad_inches=0.1)
        figure.clear()  # axes and figure hold each other; this frees the memory now
        files[name] = folder / f"{name}.png"
    return files | (_save_animations(results, folder) if plane else {})


def what_is_left_out(density: Any) -> str:
    """The pictures that `save_figures` cannot make of such data, in a sentence; empty if none.

    Args:
        density: The data.
    """
    if density.dim != 2:
        kind = f"these have {density.dim}"
    elif "context" in density.sizes:
        kind = "these have a context"
    else:
        return ""
    return f"Densities, paths and animations are drawn of two dimensions only; {kind}."


def _save_animations(results: Results, folder: Path) -> dict[str, Path]:
    files, window = {}, window_of(results.density)
    for number, (name, title) in enumerate(results.titles.items()):
        file = folder / f"flow-{re.sub(r'[^A-Za-z0-9._-]+', '-', name) or number}.gif"
        made = attempt(
            animate, results.of(name)[0].flow, file, window=window, title=title,
            names=axis_names(results.density), color=results.colors[name],
        )  # fmt: skip
        if isinstance(made, Path):
            files[f"flow-{name}"] = made
    return files
