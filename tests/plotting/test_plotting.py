"""Pictures of data and flows: on one scale, and true to the flows."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from matplotlib import rcParams
from PIL import Image

import cnf
from cnf.data import Points, load
from cnf.errors import SolverError
from cnf.plotting import (
    animate,
    densities,
    layer_path,
    plot_densities,
    plot_density,
    plot_learning,
    plot_nfe_curves,
    plot_samples,
    plot_trajectories,
)
from cnf.plotting.axes import new_figure, window_of
from cnf.plotting.style import PALETTE

EULER = [(2**k, 0.9 / 2**k) for k in range(6)]


@pytest.fixture
def flows(small_flow):
    return {"CNF": small_flow("cnf"), "REALNVP": small_flow("realnvp")}


def test_densities_share_one_color_scale(flows):
    figure = plot_densities(load("moons"), flows, {"CNF": "gap 0.1 nats"}, resolution=24)
    images = [image for ax in figure.axes for image in ax.get_images()]
    assert len(images) == 3
    assert len({image.get_clim() for image in images}) == 1
    assert images[0].get_clim()[0] == 0
    assert len(figure.axes) == 4  # three panels and one color bar
    assert [ax.get_title() for ax in figure.axes[:3]] == ["True density", "CNF", "REALNVP"]
    assert [[text.get_text() for text in ax.texts] for ax in figure.axes[:3]] == [
        ["moons"], ["gap 0.1 nats"], [],
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["cnf", "realnvp"])
def test_density_picture_holds_the_exact_density(name, small_flow):
    flow, window = small_flow(name), torch.tensor([[-3.0, -2.0], [3.0, 2.0]])
    image = plot_density(flow, window, resolution=30).axes[0].get_images()[0]
    shown = torch.as_tensor(np.asarray(image.get_array()))
    assert shown.shape == (20, 30)
    corner = torch.tensor([[-2.9, -1.9], [2.9, -1.9]]).double()  # midpoints, the lowest row first
    expected = flow.log_prob(corner).exp().detach()
    assert torch.allclose(shown[0, [0, -1]], expected, rtol=1e-2)  # solver rtol 1e-5 in log


def test_density_draws_on_given_axes_and_refuses_other_dimensions(small_flow):
    figure = new_figure(3, 3)
    ax = figure.subplots()
    assert plot_density(load("moons"), ax=ax, vmax=0.5, resolution=12) is figure
    assert ax.get_images()[0].get_clim() == (0, 0.5)
    with pytest.raises(ValueError, match="expected two dimensions, got 3"):
        plot_density(cnf.models.build("realnvp", dim=3))


def test_density_far_from_zero_is_drawn_like_one_near_it():
    noise = torch.randn(200, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    window = torch.tensor([[-2.0, -2.0], [2.0, 2.0]], dtype=torch.float64)
    grids = []
    for shift in (0.0, 1e8):
        flow = cnf.models.build("realnvp", dim=2)
        flow.preprocess.fit(shift + noise)
        grids.append(densities._on_grid(flow, shift + window, 10).double())
    torch.testing.assert_close(grids[1], grids[0], rtol=1e-4, atol=0)
    assert grids[0].max() > 2 * grids[0].min()


def test_layer_path_ends_at_decode_and_starts_at_the_preprocessed_base():
    flow = cnf.models.build("realnvp", dim=2, hidden=(8, 8))
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    flow.preprocess.fit(torch.randn(50, 2) * 3 + 1)
    z = torch.randn(7, 2)
    path = layer_path(flow, z)
    assert path.shape == (9, 7, 2)
    assert torch.allclose(path[-1], flow.decode(z))
    assert torch.allclose(path[0], flow.preprocess(z)[0])
    assert not torch.allclose(path[0], path[1])


def test_layer_path_of_a_single_transform_is_its_two_ends(small_flow):
    flow, z = small_flow("cnf"), torch.randn(5, 2, dtype=torch.float64)
    assert torch.allclose(layer_path(flow, z)[-1], flow.decode(z))
    assert len(layer_path(flow, z)) == 2


def test_trajectories_are_named_for_what_they_are(flows):
    figure = plot_trajectories(load("moons"), flows, particles=9, points=5)
    notes = [ax.texts[0].get_text() for ax in figure.axes]
    layers = len(layer_path(flows["REALNVP"], torch.zeros(1, 2, dtype=torch.float64))) - 1
    assert notes == ["along its ODE", f"layer by layer, {layers} in all"]


@pytest.mark.parametrize("seeds", [1, 2])
def test_learning_has_a_band_over_seeds_and_a_log_axis(seeds):
    curve = [(1.0, 0.5), (2.0, 0.25)]
    (ax,) = plot_learning({"one": [curve] * seeds, "other": [curve] * seeds}).axes
    assert ax.get_yscale() == "log" and "gap" in ax.get_ylabel()
    assert len(ax.collections) == (2 if seeds > 1 else 0)


def test_mean_over_seeds_ends_where_seeds_end_on_average():
    curves = [[(0.5 * k * (1 + seed), 1 / k) for k in range(1, 5)] for seed in (0, 1)]
    line = plot_learning({"one": curves}).axes[0].lines[0]
    assert line.get_xdata()[-1] == pytest.approx((2.0 + 4.0) / 2)
    assert line.get_ydata()[-1] == pytest.approx(1 / 4)


def test_negative_gap_keeps_its_point():
    (ax,) = plot_learning({"one": [[(1.0, 0.5), (2.0, -0.001)]]}).axes
    assert ax.get_yscale() == "symlog" and ax.lines[0].get_ydata()[-1] == -0.001


def test_quality_marks_solver_floor_and_discrete_flow():
    curves = {"CNF": [[*EULER, (44, 0.03)]] * 2, "REALNVP": [[(0, 0.2)]] * 2}
    (ax,) = plot_nfe_curves(curves, floor=0.02).axes
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")
    labels = ax.get_legend_handles_labels()[1]
    assert labels == ["CNF", "REALNVP (one pass)", "two sets of true samples",
                      "a flow's own solver"]  # fmt: skip
    euler, star, discrete, floor = ax.lines[:4]
    assert list(euler.get_xdata()) == [1, 2, 4, 8, 16, 32]
    assert list(star.get_xdata()) == [44] and star.get_marker() == "*"
    assert discrete.get_ydata()[0] == 0.2 and floor.get_ydata()[0] == 0.02
    assert len(ax.collections) == 1  # the band over two seeds


def test_a_single_curve_needs_no_list_of_seeds():
    curves = {
        "before": [(1, 2.0), (4, 0.5), (80, 0.125)],
        "after": [(1, 0.2), (4, 0.1), (60, 0.1)],
    }
    figure = plot_nfe_curves(curves, floor=0.05)
    before, star = figure.axes[0].lines[:2]
    assert before.get_xydata().tolist() == [[1, 2.0], [4, 0.5]]
    assert star.get_xydata().tolist() == [[80, 0.125]]
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["before", "after", "two sets of true samples", "a flow's own solver"]


def test_more_curves_than_colors_are_told_apart_by_dashes():
    many = {f"number {k}": [[*EULER, (44, 0.03)]] for k in range(len(PALETTE) + 1)}
    for figure in (plot_learning(many), plot_nfe_curves(many)):
        assert {line.get_linestyle() for line in figure.axes[0].lines} > {"-"}


@pytest.mark.parametrize(("dim", "shown"), [(3, 3), (6, 4)])
def test_own_points_of_more_dimensions_are_shown_in_every_pair(dim, shown, monkeypatch):
    names = [f"c{k}" for k in range(dim)]
    one, other = (cnf.models.build("maf", dim=dim, hidden=(8,)).eval() for _ in range(2))
    monkeypatch.setattr(other, "sample", lambda *_, **__: 1 / 0)  # its own loss
    figure = plot_samples(
        Points(torch.randn(80, dim), columns=names), {"one": one, "other": other}, 50
    )
    panels = [ax for ax in figure.axes if ax.axison]
    assert len(panels) == shown * (shown + 1) // 2
    assert [ax.get_xlabel() for ax in panels if ax.get_xlabel()] == names[:shown]
    assert [ax.get_ylabel() for ax in panels if ax.get_ylabel()] == names[1:shown]
    ax = next(
        ax for ax in panels if (ax.get_xlabel(), ax.get_ylabel()) == ("c0", names[shown - 1])
    )
    drawn = one.sample((50,), generator=torch.Generator().manual_seed(0))
    dots = torch.as_tensor(np.asarray(ax.collections[1].get_offsets())).float()
    assert torch.allclose(dots, drawn[:, [0, shown - 1]].detach(), atol=1e-6)


def test_own_points_in_two_dimensions_stand_in_for_the_truth(flows):
    figure = plot_densities(Points(torch.randn(80, 2)), flows, resolution=12)
    assert figure.axes[0].get_title() == "Your points"


def test_one_dimension_is_shown_as_histograms_under_the_exact_densities():
    flows = {name: cnf.models.build(name, dim=1, hidden=(8, 8)) for name in ("cnf", "nsf-ar")}
    (ax,) = plot_samples(Points(torch.randn(80, 1), columns=["size"]), flows).axes
    assert ax.get_xlabel() == "size"
    for line, flow in zip(ax.lines, flows.values(), strict=True):
        x = torch.as_tensor(np.asarray(line.get_xdata()))[:, None]
        expected = flow.log_prob(x.float()).exp().detach()
        shown = torch.as_tensor(np.asarray(line.get_ydata())).float()
        assert torch.allclose(shown, expected, rtol=1e-2)  # solver rtol 1e-5 in log


@pytest.mark.parametrize("scale", [1.0, 1e5])
def test_axes_of_own_columns_have_their_names_and_ticks_without_a_power_apart(scale, flows):
    rows = torch.randn(200, 2, generator=torch.Generator().manual_seed(0))
    mine = Points(rows * torch.tensor([scale, 1.0]), columns=["income", "$ rate"])
    for figure in (
        plot_densities(mine, flows, resolution=12),
        plot_samples(mine, flows, 20),
        plot_trajectories(mine, flows, 5, 3),
    ):
        figure.draw_without_rendering()
        panels = [ax for ax in figure.axes if ax.get_title()]
        assert len(panels) >= 2
        for ax in panels:
            assert (ax.get_xlabel(), ax.get_ylabel()) == ("income", "$ rate")
            assert len(ax.get_xticks()) > 1 and len(ax.get_yticks()) > 1
            assert ax.xaxis.get_offset_text().get_text() == ""
            assert ax.get_aspect() == ("auto" if scale > 1 else 1)


def test_toys_are_drawn_on_one_scale_without_ticks(flows):
    moons = load("moons")
    for figure in (plot_densities(moons, flows, resolution=12), plot_samples(moons, flows, 20)):
        panels = [ax for ax in figure.axes if ax.get_title()]
        assert [ax.get_aspect() for ax in panels] == [1] * len(panels)
        assert not any(len(ax.get_xticks()) for ax in panels)


def test_flow_that_cannot_be_solved_costs_only_its_own_panels(flows, monkeypatch):
    def fail(*_, **__):
        raise SolverError("field returned NaN", "Lower the rate", t=0.1, nfe=3, settings="dopri5")

    for name in ("log_prob", "sample", "trajectory"):
        monkeypatch.setattr(flows["CNF"], name, fail)
    monkeypatch.setattr(flows["CNF"], "with_solver", lambda _: flows["CNF"])
    moons = load("moons")
    for figure in (
        plot_densities(moons, flows, resolution=12),
        plot_samples(moons, flows, 20),
        plot_trajectories(moons, flows, 5, 3),
    ):
        said = {ax.get_title(): [text.get_text() for text in ax.texts] for ax in figure.axes}
        assert any("NaN" in " ".join(words.split()) for words in said["CNF"])
        assert not any("NaN" in words for words in said["REALNVP"])


def test_animation_of_more_than_two_dimensions_shows_the_first_two(tmp_path):
    flow = cnf.models.build("realnvp", dim=3)
    file = animate(flow, tmp_path / "film.gif", points=20, frames=3)
    with Image.open(file) as film:
        assert film.n_frames == 3
    with pytest.raises(ValueError, match="frames > 0"):
        animate(flow, tmp_path / "film.gif", frames=0)


def test_window_follows_particles_but_not_runaways():
    near = window_of(load("moons"))
    far = window_of(load("moons"), torch.tensor([[1e9, 0.0], [math.nan, 0.0]]))
    assert far[1, 0] > near[1, 0] and far[1, 0] < 4 * near[1, 0]


def test_pictures_change_no_global_style_and_load_no_pyplot():
    before = dict(rcParams)
    plot_learning({"one": [[(1.0, 0.5), (2.0, 0.25)]]})
    assert dict(rcParams) == before
    code = "import sys, cnf.race.figures; print('matplotlib' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"
