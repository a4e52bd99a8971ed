"""Pictures of a tiny race: there, not blank, on one scale, and true to the flows."""

import dataclasses
import math
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from matplotlib import rcParams
from PIL import Image

import cnf
from cnf.data import Points, load
from cnf.errors import SolverError
from cnf.plotting import densities, style
from cnf.plotting.animation import animate, layer_path
from cnf.plotting.densities import plot_density
from cnf.plotting.style import number, window_of
from cnf.race import figures
from cnf.race.figures import (
    plot_densities,
    plot_gap_over_time,
    plot_quality_against_nfe,
    plot_samples,
    plot_trajectories,
    save_figures,
)
from cnf.race.results import Entry, Results, colors, mean_and_error

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")


def small(name, seed=0, dim=2):
    """A flow with random weights, not the identity, of the named model."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        flow = cnf.models.build(name, dim=dim, hidden=(8, 8))
        with torch.no_grad():
            for parameter in flow.parameters():
                parameter.add_(0.15 * torch.randn_like(parameter))
    return flow.eval()


def race(data="moons", names=("cnf", "realnvp"), seeds=(0, 1), **changes):
    """Results as compare gives them, with numbers that need no training."""
    density = load(data)
    known = density.entropy is not None
    entries = []
    for place, name in enumerate(names, 1):
        for seed in seeds:
            few = [(0, 0.2)] if name == "realnvp" else [(2**k, 0.9 / 2**k) for k in range(6)]
            few = few if name == "realnvp" else [*few, (44, 0.03)]
            scores = {
                "gap": 0.1 * place + 0.01 * seed, "gap_error": 0.004, "nll": 2.0 + place,
                "nll_error": 0.01, "w2": 0.3 * place, "sliced_w2": few[-1][1],
                "ms_per_step": 3.0 * place, "ms_sample": 20.0 / place, "ms_log_prob": 90.0,
                "peak_memory_mb": 400.0, "straightness": math.nan,
            }  # fmt: skip
            if not known:
                del scores["gap"], scores["gap_error"]
            curve = [(0.5 * k * (1 + seed), place / k) for k in range(1, 5)]
            flow = small(name, seed, density.dim)
            entries.append(Entry(name, name.upper(), seed, scores, curve, few, flow))
    results = Results(
        density.name, density, entries, {"w2": 0.1, "sliced_w2": 0.02}, density.entropy,
        {"steps": 5, "seconds": None, "seeds": list(seeds), "test_points": 100, "w2_points": 50},
        {"gpu": None, "threads": 1},
    )  # fmt: skip
    return dataclasses.replace(results, **changes)


@pytest.fixture(scope="module")
def results():
    return race()


def pixels(file):
    with Image.open(file) as image:
        return np.asarray(image.convert("RGB")).astype(float)


def rests(file):
    """Milliseconds that each frame of a film is shown."""
    with Image.open(file) as film:
        return [film.seek(k) or film.info["duration"] for k in range(film.n_frames)]


def test_densities_share_one_color_scale(results):
    figure = plot_densities(results, resolution=24)
    images = [image for ax in figure.axes for image in ax.get_images()]
    assert len(images) == 3
    assert len({image.get_clim() for image in images}) == 1
    assert images[0].get_clim()[0] == 0
    assert len(figure.axes) == 4  # three panels and one color bar


@pytest.mark.parametrize("name", ["cnf", "realnvp"])
def test_density_picture_holds_the_exact_density(name):
    flow, window = small(name), torch.tensor([[-3.0, -2.0], [3.0, 2.0]])
    image = plot_density(flow, window, resolution=30).axes[0].get_images()[0]
    shown = torch.as_tensor(np.asarray(image.get_array()))
    assert shown.shape == (20, 30)
    corner = torch.tensor([[-2.9, -1.9], [2.9, -1.9]])  # midpoints, the lowest row first
    expected = flow.log_prob(corner).exp().detach()
    assert torch.allclose(shown[0, [0, -1]], expected, rtol=1e-2)  # solver rtol 1e-5 in log


def test_density_draws_on_given_axes_and_refuses_other_dimensions():
    figure = style.new_figure(3, 3)
    ax = figure.subplots()
    assert plot_density(load("moons"), ax=ax, vmax=0.5, resolution=12) is figure
    assert ax.get_images()[0].get_clim() == (0, 0.5)
    with pytest.raises(ValueError, match="expected two dimensions, got 3"):
        plot_density(small("cnf", dim=3))


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


def test_layer_path_ends_at_decode_and_starts_at_the_preprocessed_base():
    flow = small("realnvp")
    flow.preprocess.fit(torch.randn(50, 2) * 3 + 1)
    z = torch.randn(7, 2)
    path = layer_path(flow, z)
    assert path.shape == (9, 7, 2)
    assert torch.allclose(path[-1], flow.decode(z))
    assert torch.allclose(path[0], flow.preprocess(z)[0])
    assert not torch.allclose(path[0], path[1])


def test_layer_path_of_a_single_transform_is_its_two_ends():
    flow = small("cnf")
    z = torch.randn(5, 2)
    assert torch.allclose(layer_path(flow, z)[-1], flow.decode(z))
    assert len(layer_path(flow, z)) == 2


def test_trajectories_are_named_for_what_they_are(results):
    figure = plot_trajectories(results, particles=9, points=5)
    notes = [ax.texts[0].get_text() for ax in figure.axes]
    assert notes == ["along its ODE", "layer by layer, 8 in all"]


@pytest.mark.parametrize("seeds", [(0,), (0, 1)])
def test_learning_has_a_band_over_seeds_and_a_log_axis(seeds):
    figure = plot_gap_over_time(race(seeds=seeds))
    (ax,) = figure.axes
    assert ax.get_yscale() == "log" and "gap" in ax.get_ylabel()
    assert len(ax.collections) == (2 if len(seeds) > 1 else 0)


def test_mean_over_seeds_ends_where_seeds_end_on_average(results):
    (ax,) = plot_gap_over_time(results).axes
    line = ax.lines[0]
    assert line.get_xdata()[-1] == pytest.approx((2.0 + 4.0) / 2)
    assert line.get_ydata()[-1] == pytest.approx(1 / 4)


def test_negative_gap_keeps_its_point():
    results = race(seeds=(0,))
    results.entries[0].curve = [(1.0, 0.5), (2.0, -0.001)]
    (ax,) = plot_gap_over_time(results).axes
    assert ax.get_yscale() == "symlog" and ax.lines[0].get_ydata()[-1] == -0.001


def test_quality_marks_solver_floor_and_discrete_flow(results):
    (ax,) = plot_quality_against_nfe(results).axes
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")
    labels = ax.get_legend_handles_labels()[1]
    assert labels == ["CNF", "REALNVP (one pass)", "two sets of true samples",
                      "a flow's own solver"]  # fmt: skip
    euler, star, discrete, floor = ax.lines[:4]
    assert list(euler.get_xdata()) == [1, 2, 4, 8, 16, 32]
    assert list(star.get_xdata()) == [44] and star.get_marker() == "*"
    assert discrete.get_ydata()[0] == 0.2 and floor.get_ydata()[0] == 0.02


def test_own_points_in_three_dimensions_show_samples_and_curves(tmp_path):
    points = Points(torch.randn(80, 3), "mine")
    files = save_figures(race(points, seeds=(0,)), tmp_path)
    assert list(files) == ["samples", "nll_over_time", "quality_against_nfe"]
    (ax,) = plot_gap_over_time(race(points)).axes
    assert ax.get_yscale() == "linear" and "NLL" in ax.get_ylabel()


@pytest.mark.parametrize(("dim", "shown"), [(3, 3), (6, 4)])
def test_own_points_of_more_dimensions_are_shown_in_every_pair(dim, shown, monkeypatch):
    names = [f"c{k}" for k in range(dim)]
    results = race(Points(torch.randn(80, dim), columns=names), seeds=(0,))
    monkeypatch.setattr(results.entries[1].flow, "sample", lambda *_, **__: 1 / 0)  # its own loss
    figure = plot_samples(results, 50)
    panels = [ax for ax in figure.axes if ax.axison]
    assert len(panels) == shown * (shown + 1) // 2
    assert [ax.get_xlabel() for ax in panels if ax.get_xlabel()] == names[:shown]
    assert [ax.get_ylabel() for ax in panels if ax.get_ylabel()] == names[1:shown]
    ax = next(
        ax for ax in panels if (ax.get_xlabel(), ax.get_ylabel()) == ("c0", names[shown - 1])
    )
    drawn = results.entries[0].flow.sample((50,), generator=torch.Generator().manual_seed(0))
    dots = torch.as_tensor(np.asarray(ax.collections[1].get_offsets())).float()
    assert torch.allclose(dots, drawn[:, [0, shown - 1]].detach(), atol=1e-6)


def test_own_points_in_two_dimensions_stand_in_for_the_truth():
    figure = plot_densities(race(Points(torch.randn(80, 2)), seeds=(0,)), resolution=12)
    assert figure.axes[0].get_title() == "Your points"


def test_one_dimension_is_shown_as_histograms_under_the_exact_densities():
    results = race(Points(torch.randn(80, 1), columns=["size"]), names=("cnf", "nsf-ar"))
    (ax,) = plot_samples(results).axes
    assert ax.get_xlabel() == "size"
    for line, name in zip(ax.lines, results.contestants, strict=True):
        x = torch.as_tensor(np.asarray(line.get_xdata()))[:, None]
        expected = results.of(name)[0].flow.log_prob(x.float()).exp().detach()
        shown = torch.as_tensor(np.asarray(line.get_ydata())).float()
        assert torch.allclose(shown, expected, rtol=1e-2)  # solver rtol 1e-5 in log


@pytest.mark.parametrize("scale", [1.0, 1e5])
def test_axes_of_own_columns_have_their_names_and_ticks_without_a_power_apart(scale):
    rows = torch.randn(200, 2, generator=torch.Generator().manual_seed(0))
    mine = Points(rows * torch.tensor([scale, 1.0]), columns=["income", "$ rate"])
    results = race(mine, seeds=(0,))
    for figure in (
        plot_densities(results, resolution=12),
        plot_samples(results, 20),
        plot_trajectories(results, 5, 3),
    ):
        figure.draw_without_rendering()
        panels = [ax for ax in figure.axes if ax.get_title()]
        assert len(panels) >= 2
        for ax in panels:
            assert (ax.get_xlabel(), ax.get_ylabel()) == ("income", "$ rate")
            assert len(ax.get_xticks()) > 1 and len(ax.get_yticks()) > 1
            assert ax.xaxis.get_offset_text().get_text() == ""
            assert ax.get_aspect() == ("auto" if scale > 1 else 1)


def test_toys_are_drawn_on_one_scale_without_ticks(results):
    for figure in (plot_densities(results, 12), plot_samples(results, 20)):
        panels = [ax for ax in figure.axes if ax.get_title()]
        assert [ax.get_aspect() for ax in panels] == [1] * len(panels)
        assert not any(len(ax.get_xticks()) for ax in panels)


def test_flow_that_cannot_be_solved_costs_only_its_own_pictures(tmp_path, monkeypatch):
    results = race(seeds=(0,))

    def fail(*_, **__):
        raise SolverError("field returned NaN", "Lower the rate", t=0.1, nfe=3, settings="dopri5")

    for name in ("log_prob", "sample", "trajectory"):
        monkeypatch.setattr(results.entries[0].flow, name, fail)
    monkeypatch.setattr(results.entries[0].flow, "with_solver", lambda _: results.entries[0].flow)
    files = save_figures(results, tmp_path)
    assert "flow-realnvp" in files and "flow-cnf" not in files and "density" in files


def test_nan_everywhere_still_gives_pictures(tmp_path):
    results = race(seeds=(0,))
    entry = results.entries[0]
    entry.scores = dict.fromkeys(entry.scores, math.nan)
    entry.curve = [(1.0, math.nan), (2.0, math.nan)]
    entry.few_steps = [(nfe, math.nan) for nfe, _ in entry.few_steps]
    with torch.no_grad():
        next(entry.flow.parameters()).fill_(math.nan)
    assert {"density", "samples", "gap_over_time"} <= set(save_figures(results, tmp_path))


def test_animation_of_more_than_two_dimensions_shows_the_first_two(tmp_path):
    file = animate(small("realnvp", dim=3), tmp_path / "film.gif", points=20, frames=3)
    with Image.open(file) as film:
        assert film.n_frames == 3
    with pytest.raises(ValueError, match="frames > 0"):
        animate(small("realnvp"), tmp_path / "film.gif", frames=0)


@pytest.mark.parametrize("names", [("income", "rate"), ()])
def test_animation_of_own_columns_has_their_names_at_its_axes(names, tmp_path, monkeypatch):
    labels, corners = [], []

    def watched(ax, *given, **named):
        style.frame(ax, *given, **named)
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


def test_race_without_a_field_has_no_picture_of_evaluations(tmp_path):
    results = race(Points(torch.randn(80, 3), "mine"), ("realnvp",), (0,))
    assert list(save_figures(results, tmp_path)) == ["samples", "nll_over_time"]


def test_colors_differ_and_do_not_depend_on_the_ranking(results):
    assert len(set(colors(results).values())) == 2
    assert list(colors(results)) == results.contestants


def test_window_follows_particles_but_not_runaways():
    near = window_of(load("moons"))
    far = window_of(load("moons"), torch.tensor([[1e9, 0.0], [math.nan, 0.0]]))
    assert far[1, 0] > near[1, 0] and far[1, 0] < 4 * near[1, 0]


def test_pictures_change_no_global_style_and_load_no_pyplot(tmp_path):
    before = dict(rcParams)
    plot_gap_over_time(race(seeds=(0,)))
    assert dict(rcParams) == before
    code = "import sys, cnf.race.figures; print('matplotlib' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (0.1 + 0.2, math.nan, "0.3"),
        (13378.0, math.nan, "13,378"),
        (-0.0002271, math.nan, "−0.000227"),
        (1.5e-6, math.nan, "1.5·10⁻⁶"),
        (0.0123, 0.0031, "0.012 ± 0.003"),
        (2.5, 0.14, "2.50 ± 0.14"),
        (1.29635, 0.00019, "1.296 ± <0.001"),
        (-0.0004, 0.003, "0.000 ± 0.003"),
        (math.nan, 0.1, "–"),
        (math.inf, math.nan, "∞"),
    ],
)
def test_numbers_are_written_with_the_digits_they_support(value, error, text):
    assert number(value, error) == text


def test_error_is_the_larger_of_seeds_and_points(results):
    assert mean_and_error(results, "cnf", "gap")[1] == pytest.approx(0.01 / math.sqrt(2))
    assert mean_and_error(race(seeds=(0,)), "cnf", "gap") == (0.1, 0.004)
    results = race()
    results.entries[0].scores["gap"] = math.nan
    assert all(map(math.isnan, mean_and_error(results, "cnf", "gap")))


def test_more_contestants_than_colors_are_told_apart_by_dashes(results):
    entries = [
        dataclasses.replace(entry, contestant=f"{entry.contestant}-{k}")
        for k in range(len(style.PALETTE))
        for entry in results.entries
    ]
    many = dataclasses.replace(results, entries=entries)
    assert len(many.contestants) > len(style.PALETTE)
    for plot in (plot_gap_over_time, plot_quality_against_nfe):
        assert {line.get_linestyle() for line in plot(many).axes[0].lines} > {"-"}


def test_density_far_from_zero_is_drawn_like_one_near_it():
    noise = torch.randn(200, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    window = torch.tensor([[-2.0, -2.0], [2.0, 2.0]], dtype=torch.float64)
    grids = []
    for shift in (0.0, 1e8):
        flow = cnf.models.build("realnvp", dim=2)
        flow.preprocess.fit(shift + noise)
        grids.append(densities.on_grid(flow, shift + window, 10).double())
    torch.testing.assert_close(grids[1], grids[0], rtol=1e-4, atol=0)
    assert grids[0].max() > 2 * grids[0].min()
