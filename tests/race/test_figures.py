"""Pictures of a tiny race: there, not blank, and true to the contestants."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from cnf.data import Points
from cnf.errors import SolverError
from cnf.plotting import animate
from cnf.plotting.axes import frame
from cnf.race import figures
from cnf.race.figures import save_figures

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")


def pixels(file):
    with Image.open(file) as image:
        return np.asarray(image.convert("RGB")).astype(float)


def rests(file):
    """Milliseconds that each frame of a film is shown."""
    with Image.open(file) as film:
        return [film.seek(k) or film.info["duration"] for k in range(film.n_frames)]


def test_every_picture_is_written_and_shows_something(results, tmp_path):
    files = save_figures(results, tmp_path / "deep" / "folder")
    assert list(files) == [
        "density", "samples", "trajectories", "gap_over_time", "quality_against_nfe",
        "flow-cnf", "flow-realnvp",
    ]  # fmt: skip
    for file in files.values():
        assert pixels(file).std() > 5, file
    for name in ("flow-cnf", "flow-realnvp"):
        with Image.open(files[name]) as film:
            assert film.n_frames == 40 and files[name].stat().st_size < 600_000
            first = np.asarray(film.convert("RGB")).astype(float)
            film.seek(39)
            assert np.abs(np.asarray(film.convert("RGB")) - first).mean() > 1
            assert film.info["duration"] >= 1500  # rests on the end
    assert rests(files["flow-cnf"]) == rests(files["flow-realnvp"])
    assert rests(files["flow-cnf"])[0] >= 500  # and on the start


def test_learning_and_quality_show_each_contestant_by_its_title(results):
    for plot in (figures.learning, figures.quality_against_nfe):
        labels = plot(results).axes[0].get_legend_handles_labels()[1]
        assert [label.removesuffix(" (one pass)") for label in labels[:2]] == ["CNF", "REALNVP"]


def test_own_points_in_three_dimensions_show_samples_and_curves(race, tmp_path):
    points = Points(torch.randn(80, 3), "mine")
    files = save_figures(race(points, seeds=(0,)), tmp_path)
    assert list(files) == ["samples", "nll_over_time", "quality_against_nfe"]
    (ax,) = figures.learning(race(points)).axes
    assert ax.get_yscale() == "linear" and "NLL" in ax.get_ylabel()


def test_flow_that_cannot_be_solved_costs_only_its_own_pictures(race, tmp_path, monkeypatch):
    results = race(seeds=(0,))

    def fail(*_, **__):
        raise SolverError("field returned NaN", "Lower the rate", t=0.1, nfe=3, settings="dopri5")

    for name in ("log_prob", "sample", "trajectory"):
        monkeypatch.setattr(results.entries[0].flow, name, fail)
    monkeypatch.setattr(results.entries[0].flow, "with_solver", lambda _: results.entries[0].flow)
    files = save_figures(results, tmp_path)
    assert "flow-realnvp" in files and "flow-cnf" not in files and "density" in files


def test_nan_everywhere_still_gives_pictures(race, tmp_path):
    results = race(seeds=(0,))
    entry = results.entries[0]
    entry.scores = dict.fromkeys(entry.scores, math.nan)
    entry.curve = [(1.0, math.nan), (2.0, math.nan)]
    entry.few_steps = [(nfe, math.nan) for nfe, _ in entry.few_steps]
    with torch.no_grad():
        next(entry.flow.parameters()).fill_(math.nan)
    assert {"density", "samples", "gap_over_time"} <= set(save_figures(results, tmp_path))


@pytest.mark.parametrize("names", [("income", "rate"), ()])
def test_animation_of_own_columns_has_their_names_at_its_axes(names, race, tmp_path, monkeypatch):
    labels, corners = [], []

    def watched(ax, *given, **named):
        frame(ax, *given, **named)
        labels.extend((ax.get_xlabel(), ax.get_ylabel()))
        seen, whole = ax.get_tightbbox(), ax.get_figure().bbox
        corners.extend((seen.x0, seen.y0, whole.x1 - seen.x1, whole.y1 - seen.y1))

    monkeypatch.setattr("cnf.plotting.animation.frame", watched)
    points = Points(torch.randn(80, 2) * torch.tensor([3e4, 1.0]), columns=names or None)
    results = race(points, ("realnvp",), (0,))
    monkeypatch.setattr(figures, "animate", partial(animate, points=9, frames=2))
    monkeypatch.setattr(figures, "attempt", lambda make, *given, **named: make(*given, **named))
    figures._save_animations(results, tmp_path)
    assert tuple(labels) == (names or ("", ""))
    assert min(corners) >= 0  # ticks and names are inside of the picture


def test_race_without_a_field_has_no_picture_of_evaluations(race, tmp_path):
    results = race(Points(torch.randn(80, 3), "mine"), ("realnvp",), (0,))
    assert list(save_figures(results, tmp_path)) == ["samples", "nll_over_time"]
