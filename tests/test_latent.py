"""experiments/latent: attributes against closed forms, operations by scipy, and directions."""

import importlib
import math
import sys
from pathlib import Path

import pytest
import torch

from cnf.data import Images

FOLDER = Path(__file__).parent.parent / "experiments" / "latent"
MODULES = ("attributes", "spaces", "questions")


@pytest.fixture(scope="module")
def latent():
    """Its modules by name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        yield {name: importlib.import_module(name) for name in MODULES}
    for name in MODULES:
        sys.modules.pop(name, None)


@pytest.fixture
def bars():
    """Upright strokes of widths 1, 2 and 4 and length 12, of different brightness."""
    x = torch.zeros(3, 1, 20, 20)
    for row, width in enumerate((1, 2, 4)):
        x[row, 0, 4:16, 8 : 8 + width] = 50 * (row + 1)
    return x


def test_thickness_of_a_stroke_is_twice_its_area_by_its_perimeter(latent, bars):
    """Of the squares at the corners of the stroke each has a gradient of √½."""
    widths = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    perimeter = 2 * (12 - 1 + widths - 1) + 4 * math.sqrt(0.5)
    found = latent["attributes"].thickness(bars)
    torch.testing.assert_close(found, 2 * 12 * widths / perimeter)
    assert ((found - widths).abs() / widths < 0.25).all()
    turned = latent["attributes"].thickness(bars.transpose(2, 3))
    torch.testing.assert_close(turned, found)


def test_thickness_of_a_gaussian_blob_is_its_integral(latent):
    """Its area is 2πσ², its total variation 2πσ √(π/2)."""
    at = torch.arange(61, dtype=torch.float64) - 30
    for sigma in (4.0, 6.0):
        blob = torch.exp(-(at[:, None] ** 2 + at**2) / (2 * sigma**2))[None, None]
        found = latent["attributes"].thickness(blob).item()
        assert found == pytest.approx(2 * sigma / math.sqrt(math.pi / 2), rel=0.02)  # of the grid


def test_slant_is_minus_the_ratio_of_moments_and_a_shift_of_rows_adds_to_it(latent):
    """Of a normal density with covariance c across and down, variance v down, it is -c/v."""
    at = torch.arange(61, dtype=torch.float64) - 30
    down, across = at[:, None], at
    precision = torch.linalg.inv(torch.tensor([[30.0, -12.0], [-12.0, 20.0]])).double()
    energy = precision[0, 0] * down**2 + 2 * precision[0, 1] * down * across
    x = torch.exp(-(energy + precision[1, 1] * across**2) / 2)[None, None]
    slant = latent["attributes"].slant
    assert slant(x).item() == pytest.approx(12 / 30, abs=1e-4)  # tails beyond the picture
    bar = torch.zeros(1, 1, 9, 9)
    bar[..., 2:7, 3:5] = 1.0
    rows = [bar[0, 0, i].roll(4 - i) for i in range(9)]  # one pixel to the right for each upward
    assert slant(bar).item() == pytest.approx(0.0)
    assert slant(torch.stack(rows)[None, None]).item() == pytest.approx(1.0)


def test_an_empty_picture_has_no_attributes(latent):
    assert latent["questions"].measured(torch.zeros(2, 1, 5, 5)).tolist() == [[0, 0], [0, 0]]


def test_operations_change_attributes_by_what_is_asked(latent, bars):
    attributes = latent["attributes"]
    for k in (-0.5, 0.0, 0.4):
        sheared = attributes.sheared(bars, torch.full((3,), k))
        assert attributes.slant(sheared).tolist() == pytest.approx([k] * 3, abs=0.02)
    amount = torch.tensor([1.0, 1.0, -2.0])
    wider = attributes.thickened(bars, amount)
    assert wider[:, 0, 10].sum(1) / bars.amax((1, 2, 3)) == pytest.approx([2, 3, 2], abs=0.05)
    assert torch.equal(attributes.thickened(bars, torch.zeros(3)), bars)


def test_directions_are_the_coefficients_of_codes_that_are_linear(latent, generator):
    """Codes = attributes · B + a center of each digit: B is found, whatever the centers."""
    attributes = torch.randn(200, 2, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 10, (200,), generator=generator)
    attributes[:, 0] += labels  # without the digits as columns the centers would leak in
    basis, centers = (torch.randn(n, 6, generator=generator).double() for n in (2, 10))
    codes = (attributes @ basis + 5 * centers[labels]).float()
    found = latent["questions"].directions(codes, attributes, labels)
    torch.testing.assert_close(found, basis.float(), atol=1e-4, rtol=1e-4)


def test_codes_of_baselines_come_back(latent, generator):
    """All components of PCA, and pixels; PCA's codes have unit variance."""
    spaces = latent["spaces"]
    x = torch.randint(0, 256, (60, 1, 3, 3), generator=generator).to(torch.uint8)
    rows = x.flatten(1).double().numpy() / 255
    for space in (spaces.Pixels((1, 3, 3), rows), spaces.Components((1, 3, 3), rows, {})):
        z = space.encode(x, generator)
        assert torch.equal(space.decode(z), x.float())
    assert z.var(0, correction=0).tolist() == pytest.approx([1.0] * 9, rel=1e-4)


def test_cut_autoencoder_is_scikit_learns_regression(latent, generator):
    spaces = latent["spaces"]
    x = torch.randint(0, 256, (60, 1, 3, 3), generator=generator).to(torch.uint8)
    rows = x.flatten(1).double().numpy() / 255
    options = {"hidden_layer_sizes": (8, 4, 8), "max_iter": 3, "random_state": 0}
    space = spaces.Autoencoder((1, 3, 3), rows, options)
    z = space.encode(x, generator)
    assert z.shape == (60, 4)
    whole = (255 * torch.from_numpy(space.model.predict(rows))).round().clamp(0, 255)
    assert (space.decode(z).flatten(1) - whole).abs().max() <= 1  # codes are float32


def test_directions_come_from_even_training_digits_and_move_odd_test_digits(latent):
    def marked(value):
        labels = torch.arange(40) % 10
        return Images(torch.full((40, 1, 2, 2), value, dtype=torch.uint8), "marked", labels)

    data = latent["spaces"].Pictures(marked(1), marked(2), marked(3))
    learned, moved = latent["questions"].chosen(data, 0, {"directions": 9, "moved": 7})
    assert (learned.x == 1).all() and (learned.labels % 2 == 0).all() and len(learned.x) == 9
    assert (moved.x == 3).all() and (moved.labels % 2 == 1).all() and len(moved.x) == 7
    assert len(set(moved.labels.tolist())) > 1
