"""Grids of pictures: nearest training pictures, and interpolations."""

import math

import pytest
import torch

import cnf
from cnf.data import Images
from cnf.plotting import arc, plot_interpolations, plot_nearest
from cnf.plotting.images import nearest

F64 = torch.float64


@pytest.fixture
def pictures(generator):
    x = torch.randint(0, 256, (30, 1, 4, 4), generator=generator).to(torch.uint8)
    return Images(x, "noise", torch.arange(30) % 3)


def test_nearest_pictures_are_those_of_least_distance(pictures, generator):
    x = torch.randint(0, 256, (5, 1, 4, 4), generator=generator).double()
    squares = (x[:, None] - pictures.x.double()).square().sum((2, 3, 4))
    expected = squares.argsort(1)[:, :4]
    for chunk in (3, 7, 100):
        assert torch.equal(nearest(x, pictures.x, 4, chunk), expected)
    assert nearest(pictures.x[7:9], pictures.x).tolist() == [[7], [8]]


def test_arc_turns_evenly_and_changes_its_length_evenly():
    z0, z1 = torch.tensor([[2.0, 0.0]], dtype=F64), torch.tensor([[0.0, 5.0]], dtype=F64)
    for share in (0.0, 0.25, 0.5, 1.0):
        angle, length = share * math.pi / 2, 2 + 3 * share
        expected = [[length * math.cos(angle), length * math.sin(angle)]]
        torch.testing.assert_close(arc(z0, z1, share), torch.tensor(expected, dtype=F64))
    same = torch.tensor([[[3.0]], [[1.0]]], dtype=F64)
    assert torch.equal(arc(same, 2 * same, 0.5), 1.5 * same)


@pytest.mark.parametrize("conditional", [False, True])
def test_figures_show_each_flow_and_say_what_failed(conditional, pictures, randomized):
    data = pictures.conditional() if conditional else pictures
    flow = cnf.models.glow(**data.sizes, layers=1, levels=1, hidden=(4, 4))
    broken = cnf.models.glow(**data.sizes, layers=1, levels=1, hidden=(4, 4))
    broken.transform = None
    flows = {"Glow": randomized(flow, 0.2).eval(), "broken": broken.eval()}
    near = plot_nearest(data, flows, count=4, neighbors=2)
    between = plot_interpolations(data, flows, pairs=4, steps=5)
    sizes = [figure.axes[0].get_images()[0].get_array().shape for figure in (near, between)]
    assert sizes == [(4 * 5 - 1, 3 * 5 - 1), (4 * 5 - 1, 5 * 5 - 1)]
    assert not near.axes[1].get_images() and near.axes[1].texts


def test_one_picture_is_no_interpolation(pictures):
    with pytest.raises(ValueError, match="plot_interpolations: expected steps >= 2, got 1"):
        plot_interpolations(pictures, {}, steps=1)


def test_interpolations_begin_and_end_with_the_pictures(pictures):
    flow = cnf.models.glow(**pictures.sizes, layers=2, levels=1, hidden=(4, 4)).eval()
    shown = plot_interpolations(pictures, {"Glow": flow}, pairs=2, steps=3)
    grid = torch.as_tensor(shown.axes[0].get_images()[0].get_array())
    true = pictures.take(pictures.draw(4, torch.Generator().manual_seed(0))).x[:, 0]
    corners = [grid[:4, :4], grid[5:9, :4], grid[:4, 10:14], grid[5:9, 10:14]]
    for corner, picture in zip(corners, true, strict=True):
        assert (corner.int() - picture.int()).abs().max() <= 1  # rounding in float32


def test_pairs_of_ones_own_are_shown_in_their_order(pictures):
    flow = cnf.models.glow(**pictures.sizes, layers=2, levels=1, hidden=(4, 4)).eval()
    shown = plot_interpolations(pictures, {"Glow": flow}, pairs=[(3, 17), (4, 2)], steps=3)
    grid = torch.as_tensor(shown.axes[0].get_images()[0].get_array())
    corners = [grid[:4, :4], grid[:4, 10:14], grid[5:9, :4], grid[5:9, 10:14]]
    for corner, row in zip(corners, (3, 17, 4, 2), strict=True):
        assert (corner.int() - pictures.x[row, 0].int()).abs().max() <= 1


@pytest.mark.parametrize("pairs", [[(3, 30)], [3, 17], [(0.5, 1.0)], [(1, 2, 3)], [(-1, 2)], []])
def test_other_things_than_pairs_of_rows_are_refused(pictures, pairs):
    with pytest.raises(ValueError, match=r"pairs of numbers of rows below 30, such as .*, got \["):
        plot_interpolations(pictures, {}, pairs=pairs)


def test_interpolations_are_the_same_each_time(pictures):
    """Also the noise of pixels, which leaves torch's own generator alone."""
    flow = cnf.models.glow(**pictures.sizes, layers=2, levels=1, hidden=(4, 4)).eval()
    grids = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        ax = plot_interpolations(pictures, {"Glow": flow}, pairs=2, steps=4).axes[0]
        grids.append(torch.as_tensor(ax.get_images()[0].get_array()))
        assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(*grids)
