import math

import numpy as np
import pytest
import torch

from cnf.data import Picture

image = pytest.importorskip("PIL.Image")


@pytest.fixture
def picture(tmp_path):
    """Writes gray levels, rows from the top, and reads them back as a density."""

    def write(levels, invert=False, mode="L", name="p.png"):
        dtype = np.uint16 if mode.startswith("I") else np.uint8
        image.fromarray(np.asarray(levels, dtype=dtype)).save(tmp_path / name)
        return Picture(tmp_path / name, invert=invert)

    return write


def noise(rows=6, columns=9):
    return np.random.default_rng(0).integers(0, 256, (rows, columns))


def test_dark_pixels_have_the_mass_and_y_points_up(picture):
    density = picture([[0, 255], [255, 255]])  # black at the top left
    points = torch.tensor([[-2.0, 2.0], [2.0, 2.0], [-2.0, -2.0], [2.0, -2.0]])
    inf = math.inf
    torch.testing.assert_close(
        density.log_prob(points), torch.tensor([-math.log(16), -inf, -inf, -inf])
    )
    sample = density.sample(1000, torch.Generator().manual_seed(0))
    assert (sample[:, 0] < 0).all() and (sample[:, 1] >= 0).all()


def test_light_pixels_have_the_mass_when_inverted(picture):
    density = picture([[255, 0], [0, 0]], invert=True)
    assert density.log_prob(torch.tensor([-2.0, 2.0])).item() == pytest.approx(-math.log(16))
    assert density.log_prob(torch.tensor([2.0, 2.0])).item() == -math.inf


def test_longer_side_spans_eight_and_the_aspect_is_kept(picture):
    assert picture(noise(6, 9)).support.tolist() == [
        [-4, pytest.approx(-8 / 3)],
        [4, pytest.approx(8 / 3)],
    ]
    assert picture(noise(4, 2), name="tall.png").support.tolist() == [[-2, -4], [2, 4]]


def test_density_is_darkness_over_its_integral(picture):
    levels = noise()
    density = picture(levels)
    points, area = density.grid()
    mass = density.log_prob(points).exp() * area
    darkness = np.flipud(255.0 - levels).T  # (x, y)
    np.testing.assert_allclose(mass.numpy(), darkness / darkness.sum(), atol=1e-12)


def test_entropy_has_the_closed_form(picture):
    density = picture([[0, 155], [255, 155]])  # darkness 255, 100, 0, 100; cells of area 16
    p = np.array([255, 100, 100]) / 455
    assert density.entropy == pytest.approx(-(p * np.log(p / 16)).sum(), abs=1e-9)


def test_counts_of_samples_are_the_masses(picture):
    density, n = picture(noise()), 200_000
    sample = density.sample(n, torch.Generator().manual_seed(1)).double().numpy()
    counts, *_ = np.histogram2d(*sample.T, bins=(9, 6), range=[(-4, 4), (-8 / 3, 8 / 3)])
    points, area = density.grid()
    expected = n * (density.log_prob(points).exp() * area).numpy()
    assert np.abs((counts - expected) / np.sqrt(expected.clip(5))).max() < 5
    inside = (sample + [4, 8 / 3]) / (8 / 9) % 1
    assert np.abs(inside.mean(0) - 0.5).max() < 5 / math.sqrt(12 * n)  # uniform within a cell


def test_no_sample_falls_on_a_pixel_without_mass(picture):
    levels = np.where(np.indices((400, 700)).sum(0) % 2 == 0, 0, 255)
    density = picture(levels)  # edges that float32 cannot hold, at every step
    sample = density.sample(400_000, torch.Generator().manual_seed(2))
    assert density.log_prob(sample).isfinite().all()


def test_transparent_pixels_count_as_white(tmp_path):
    rgba = np.zeros((2, 2, 4), dtype=np.uint8)
    rgba[0, 0, 3] = 255
    image.fromarray(rgba).save(tmp_path / "p.png")
    density = Picture(tmp_path / "p.png")
    assert density.log_prob(torch.tensor([-2.0, 2.0])).item() == pytest.approx(-math.log(16))
    assert density.log_prob(torch.tensor([2.0, 2.0])).item() == -math.inf


def test_gray_levels_of_16_bits_are_not_clipped(picture):
    density = picture([[0, 40_000], [60_000, 60_000]], mode="I;16")
    value = density.log_prob(torch.tensor([[-2.0, 2.0], [2.0, 2.0]]))
    assert float((value[0] - value[1]).exp()) == pytest.approx(3, abs=1e-3)


def test_jpeg_is_read(picture):
    assert picture(noise(), name="p.jpg").sample(7).shape == (7, 2)


@pytest.mark.parametrize("level", [0, 128, 255])
def test_blank_picture_is_refused(picture, level):
    with pytest.raises(ValueError, match="light and dark pixels.*pixels alike"):
        picture(np.full((3, 3), level))


def test_broken_file_is_refused(tmp_path):
    (tmp_path / "p.png").write_bytes(b"not a picture")
    with pytest.raises(ValueError, match="expected a picture that Pillow reads"):
        Picture(tmp_path / "p.png")


def test_truncated_file_is_refused(picture, tmp_path):
    picture(noise(50, 50))
    whole = (tmp_path / "p.png").read_bytes()
    (tmp_path / "q.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="expected a picture that Pillow reads"):
        Picture(tmp_path / "q.png")


def test_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.png, which is no file"):
        Picture(tmp_path / "none.png")
