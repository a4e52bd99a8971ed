"""experiments/latent: attributes, directions and what is asked of codes, by closed forms."""

import importlib
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import RidgeCV
from sklearn.model_selection import KFold
from torch.nn.functional import one_hot

import cnf
from cnf.data import Images
from cnf.dequantization import UniformDequantization
from cnf.transforms import Identity

FOLDER = Path(__file__).parent.parent / "experiments" / "latent"
MODULES = ("attributes", "spaces", "questions", "pictures", "run")


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


class Linear:
    """Codes that are pixels times a matrix."""

    def __init__(self, shape, weight=None):
        self.shape, self.weight = shape, torch.eye(math.prod(shape)) if weight is None else weight

    def encode(self, x, generator):
        return x.flatten(1).float() @ self.weight

    def decode(self, z):
        return (z @ self.weight.inverse()).reshape(-1, *self.shape)


class JudgeOf:
    """The probabilities that a function gives."""

    def __init__(self, probabilities):
        self.probabilities = probabilities


def answers(found):
    """Values by what was asked."""
    return {(each.of, each.at, each.number): each.value for each in found}


def shaded(labels):
    """Pictures of 2 × 5 pixels, of which one, that of the digit, is white."""
    x = 255 * one_hot(labels, 10).reshape(-1, 1, 2, 5)
    return Images(x.to(torch.uint8), "shaded", labels)


def test_pairs_are_half_of_one_digit_and_of_pictures_that_differ(latent):
    labels = torch.arange(200) % 10
    x = torch.arange(200).reshape(-1, 1, 1, 1).to(torch.uint8)  # tells which picture it is
    pairs = latent["questions"].pairs_of(Images(x, "numbered", labels), 12, seed=0)
    first, last = pairs.first.flatten().long(), pairs.last.flatten().long()
    assert pairs.same.tolist() == [True] * 6 + [False] * 6
    assert torch.equal(pairs.digits, labels[first]) and torch.equal(pairs.ends, labels[last])
    assert len(set(torch.cat([first, last]).tolist())) == 24


def test_between_two_white_pixels_the_judge_answers_by_their_light(latent, monkeypatch):
    """Shares of light are the probabilities; a pure picture is called 10, which is no digit."""
    questions = latent["questions"]
    monkeypatch.setattr(questions, "auc", lambda x, test, seed: len(x) / len(test.x))

    def probabilities(x):
        p = x.flatten(1).double() / x.flatten(1).sum(1, keepdim=True)
        pure = (p.amax(1, keepdim=True) > 0.99).double()
        return torch.cat([p * (1 - pure), pure], 1)

    test = shaded(torch.arange(800) % 10)
    data, config = (test, test, test), {"pairs": 40, "shares": [0.25, 0.5]}
    found = answers(
        questions.interpolation(
            Linear((1, 2, 5)), latent["spaces"].Pictures(*data), JudgeOf(probabilities), 0, config
        )
    )
    assert found["ends", 0.0, "kept"] == found["ends", 0.0, "either"] == 0
    assert found["ends", 0.0, "norm"] == pytest.approx(1)
    assert found["linear", 0.25, "kept"] == 0 and found["linear", 0.25, "either"] == 1
    entropy = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75)) / 2  # 0 where both are one digit
    assert found["linear", 0.25, "entropy"] == pytest.approx(entropy)
    assert found["linear", 0.5, "entropy"] == pytest.approx(math.log(2) / 2)
    assert found["linear", 0.5, "norm"] == pytest.approx(math.sqrt((1 + 0.5) / 2))
    assert found["arc", 0.5, "norm"] == pytest.approx(1)
    asked = {key: value for key, value in found.items() if key[2] == "auc"}
    assert asked == {
        (way, at, "auc"): 0.05 for way, at in (("ends", 0.0), ("linear", 0.5), ("arc", 0.5))
    }


def test_digits_kept_are_those_of_pairs_of_one_digit(latent, monkeypatch):
    """A judge who calls all by the brightest pixel keeps them, also near the last."""
    questions, test = latent["questions"], shaded(torch.arange(800) % 10)
    monkeypatch.setattr(questions, "auc", lambda *_: 0.5)
    judge = JudgeOf(lambda x: x.flatten(1).double() / 255)
    data, config = latent["spaces"].Pictures(test, test, test), {"pairs": 40, "shares": [0.75]}
    found = answers(questions.interpolation(Linear((1, 2, 5)), data, judge, 0, config))
    assert found["linear", 0.75, "kept"] == found["linear", 0.75, "either"] == 1


def test_a_forest_tells_pictures_that_it_has_not_seen(latent, monkeypatch, generator):
    """0.5 of more of the same, though a forest knows what it has learned; 1 of darker ones."""
    questions = latent["questions"]
    monkeypatch.setattr(
        questions, "RandomForestClassifier", lambda _, **more: RandomForestClassifier(20, **more)
    )
    auc = questions.auc
    x = torch.randint(0, 256, (160, 1, 2, 2), generator=generator).to(torch.uint8)
    test = Images(x[:80], "noise")
    assert auc(x[80:].float(), test, 0) == pytest.approx(0.5, abs=0.12)
    assert auc(x[80:].float() - 256, test, 0) == 1


def test_errors_of_a_round_trip_are_of_pictures_and_pixels(latent):
    """A tenth is lost of one of four pixels of 10, 20 and 30 levels."""
    x = torch.tensor([10, 20, 30]).to(torch.uint8).reshape(-1, 1, 1, 1).expand(-1, 1, 2, 2)
    data = latent["spaces"].Pictures(*[Images(x.contiguous(), "gray")] * 3)
    space = Linear((1, 2, 2))
    space.decode = lambda z: (z * torch.tensor([0.9, 1, 1, 1])).reshape(-1, 1, 2, 2)
    found = answers(latent["questions"].round_trip(space, data, None, 0, {"round_trip": 3}))
    assert found["pictures", "", "max"] == pytest.approx(3)
    assert found["pictures", "", "median"] == pytest.approx(2)
    assert found["pictures", "", "rms"] == pytest.approx(math.sqrt(14 / 12))


def test_codes_of_noisy_pixels_have_the_noise_length_and_bits_of_a_normal_base(latent):
    """z = x + u: E|u - u'|² = 1/6, E z² = x² + x + 1/3; two pixels of 64 are 12, others 0."""
    x = 12 * one_hot(torch.arange(32)).repeat_interleave(2, 1).reshape(-1, 1, 8, 8)
    data = latent["spaces"].Pictures(*[Images(x.to(torch.uint8), "pairs of pixels")] * 3)
    flow = cnf.Flow(
        None, Identity((1, 8, 8)), dequantization=UniformDequantization(), event_shape=(1, 8, 8)
    )
    space = latent["spaces"].Latent(flow)
    found = answers(latent["questions"].round_trip(space, data, None, 0, {"round_trip": 32}))
    apart = 64 / 6 / (4 * 144 + 64 / 6)
    assert found["codes", "", "noise"] == pytest.approx(apart, rel=0.1)
    square = (2 * (144 + 12) + 64 / 3) / 64
    assert found["codes", "", "norm"] == pytest.approx(math.sqrt(square), rel=0.02)
    bits = (square + math.log(2 * math.pi)) / 2 / math.log(2)
    assert found["codes", "", "bits"] == pytest.approx(bits, rel=0.02)
    assert found["numbers", "", "max"] == found["pictures", "", "max"] == 0
    middle = latent["spaces"].Latent(flow, noise=False).encode(data.test.x, None)
    assert torch.equal(middle, x.flatten(1) + 0.5)


def test_real_numbers_come_back_nearer_by_the_tight_solver(latent, randomized, generator):
    x = torch.randint(0, 256, (6, 1, 4, 4), generator=generator).to(torch.uint8)
    images = Images(x, "noise")
    flow = randomized(
        cnf.models.build(
            "unet", **images.sizes, width=8, scales=[1, 2], blocks=1, attention=0,
            solver=cnf.Solver("euler", steps=2),
        )
    ).float()  # fmt: skip
    config = {
        "round_trip": 6, "tight_pictures": 6, "tight": {"method": "rk4", "steps": 16},
    }  # fmt: skip
    space, data = latent["spaces"].Latent(flow), latent["spaces"].Pictures(*[images] * 3)
    found = answers(latent["questions"].round_trip(space, data, None, 0, config))
    assert found["numbers, tight", "", "max"] < found["numbers", "", "max"] / 10


def test_gain_is_the_slope_from_both_sides_and_not_less_than_the_least(latent, monkeypatch):
    monkeypatch.setattr(latent["questions"], "measured", lambda x: x)
    start = torch.randn(6, 2)

    def apply(z, amount):
        return torch.stack([z[:, 0] + 0.3 * amount + amount**2, z[:, 1] - 2 * amount], 1)

    line = latent["questions"].Line(start, start, apply)
    assert line.gain(0, 0.5) == pytest.approx(0.3, abs=1e-6)
    assert line.gain(1, 0.5) == latent["questions"].LEAST == 0.05


@pytest.fixture
def marked(latent, monkeypatch, generator):
    """Pictures of four pixels: both attributes, ten times the digit, and a constant; a judge."""
    questions = latent["questions"]
    for column, name in enumerate(questions.ATTRIBUTES):
        monkeypatch.setitem(
            questions.ATTRIBUTES, name, lambda x, column=column: x.flatten(1)[:, column].double()
        )

    def images(spread):
        labels = torch.arange(80) % 10
        noise = torch.randn(80, 2, generator=generator) * torch.tensor([spread, 10.0])
        x = torch.cat([100 + noise, 10.0 * labels[:, None], torch.full((80, 1), 50.0)], 1)
        return Images(x.round().to(torch.uint8).reshape(-1, 1, 2, 2), "marked", labels)

    data = latent["spaces"].Pictures(images(20.0), images(1.0), images(5.0))
    config = {"directions": 30, "calibrated": 10, "moved": 20, "strengths": [-1.5, 0.5]}
    judge = JudgeOf(lambda x: one_hot((x.flatten(1)[:, 2] / 10).round().long(), 12).double())
    x = questions.chosen(data, 0, config)[0].x.flatten(1).double().numpy()
    return data, config, judge, x


def test_operations_are_scaled_and_their_changes_are_in_deviations(latent, marked, monkeypatch):
    """Thickness answers by half, give or take a fifth; slant by two, and thickness by three."""
    data, config, judge, x = marked
    deviations = x[:, :2].std(0, ddof=1)
    asked = []

    def thicker(pictures, amount):
        asked.append(amount[0].item())
        sign = 1 - 2.0 * (torch.arange(len(amount)) % 2)
        lost = 10.0 * (amount > 0)  # the judge's next digit
        moved = [0.5 * amount * (1 + 0.2 * sign), 0 * amount, lost, 0 * amount]
        return pictures + torch.stack(moved, 1).reshape(-1, 1, 2, 2)

    def slanted(pictures, amount):
        moved = [3 * amount, 2 * amount, 0 * amount, 0 * amount]
        return pictures + torch.stack(moved, 1).reshape(-1, 1, 2, 2)

    questions = latent["questions"]
    monkeypatch.setitem(questions.OPERATIONS, "thickness", thicker)
    monkeypatch.setitem(questions.OPERATIONS, "slant", slanted)
    found = answers(questions.arithmetic(None, data, judge, 0, config))
    assert found["thickness", "", "gain"] == pytest.approx(0.5)
    assert found["slant", "", "gain"] == pytest.approx(2)
    units = [1, -1, -1.5 / 0.5, 0.5 / 0.5]  # two to calibrate, and both strengths
    assert asked == pytest.approx([unit * deviations[0] for unit in units])
    for strength in config["strengths"]:
        kept = 1 - (strength > 0)
        expected = {"change": strength, "error": 0.2 * abs(strength), "right": 1, "other": 0}
        for number, value in {**expected, "kept": kept}.items():
            assert found["thickness", strength, number] == pytest.approx(value, abs=1e-5)
        other = abs(strength) * 1.5 * deviations[1] / deviations[0]
        assert found["slant", strength, "other"] == pytest.approx(other, rel=1e-5)
        assert found["slant", strength, "change"] == pytest.approx(strength)


def test_a_linear_code_is_moved_along_its_rows_by_what_was_asked(latent, marked, monkeypatch):
    """Of codes x W the direction is a row of W; with a gain of 2 half of the change is left."""
    data, config, judge, x = marked
    weight = torch.eye(4) + 0.5 * torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    questions = latent["questions"]
    monkeypatch.setattr(questions, "LEAST", 2.0)
    monkeypatch.setattr(questions, "readout", lambda codes, attribute, seed: attribute.mean())
    found = answers(questions.arithmetic(Linear((1, 2, 2), weight), data, judge, 0, config))
    codes = x @ weight.double().numpy()
    rms = np.sqrt((codes**2).sum(1).mean())
    for column, name in enumerate(questions.ATTRIBUTES):
        length = np.linalg.norm(weight[column].numpy()) * x[:, column].std(ddof=1)
        assert found[name, "", "step"] == pytest.approx(length / 2 / rms, rel=1e-3)
        assert found[name, "", "r2"] == pytest.approx(x[:, column].mean())
        for strength in config["strengths"]:
            assert found[name, strength, "change"] == pytest.approx(strength / 2, abs=1e-3)
            assert found[name, strength, "error"] == pytest.approx(abs(strength) / 2, abs=1e-3)


def test_readout_is_the_mean_over_fifths_that_the_regression_has_not_seen(latent, generator):
    codes = torch.randn(100, 40, generator=generator).double()
    attribute = codes[:, 0] + torch.randn(100, generator=generator)  # R² is 0.5 at best
    z, a = codes.numpy(), attribute.numpy()
    scores = []
    for seen, unseen in KFold(5, shuffle=True, random_state=0).split(z):
        fit = RidgeCV(np.logspace(-2, 4, 7)).fit(z[seen], a[seen])
        scores.append(1 - ((a[unseen] - fit.predict(z[unseen])) ** 2).mean() / a[unseen].var())
    assert latent["questions"].readout(codes, attribute, 0) == pytest.approx(np.mean(scores))


def test_pictures_are_means_of_four_pixels_and_the_judge_learns_others(latent, monkeypatch):
    x = torch.tensor([[0, 1], [2, 4]]).repeat(1, 2) + 4 * torch.arange(9)[:, None, None]
    whole = Images(x.to(torch.uint8), "whole", torch.arange(9))
    whole.test = whole.take(torch.arange(7, 9))
    monkeypatch.setattr(latent["spaces"], "load", lambda name: whole)
    parts = latent["spaces"].pictures({"pictures": 4, "judge": {"pictures": 3}})
    means = [list(range(4)), list(range(4, 7)), [7, 8]]
    for part, rows in zip(parts, means, strict=True):
        assert part.labels.tolist() == rows
        assert part.x.tolist() == [[[[4 * row + 2] * 2]] for row in rows]  # 7/4 is rounded


def test_spaces_are_those_that_are_told(latent, generator, tmp_path):
    spaces, standardize = latent["spaces"], [{"name": "logit", "alpha": 1e-6}, "standardize"]
    x = torch.randint(0, 256, (50, 1, 4, 4), generator=generator)
    x[..., :2] //= 4
    images = Images(x.to(torch.uint8), "noise", torch.arange(50) % 10)
    config = {"preprocess": standardize, "train": {"steps": 10, "batch_size": 20}}

    def made(**told):
        return spaces.space_of(told, images, 3, config, tmp_path / "kept")[0]

    rows = x.flatten(1).numpy() / 255
    centered = rows - rows.mean(0)
    z = made(baseline="pixels").encode(images.x, generator)
    assert z.numpy() == pytest.approx(centered / centered.std(), abs=1e-5)
    pca = made(baseline="pca", options={"n_components": 3})
    assert pca.encode(images.x, generator).shape == (50, 3)
    net = made(baseline="autoencoder", options={"hidden_layer_sizes": (4, 2, 4)}).model
    assert net.max_iter == 4 and net.random_state == 3  # epochs: 10 steps of 20 of 50 pictures
    z = made(baseline="preprocessing").encode(images.x, generator)
    assert [z.mean().item(), z.std().item()] == pytest.approx([0, 1], abs=0.05)
    flow = cnf.models.build("glow", **{**images.sizes, "preprocess": None}, levels=1, layers=1)
    cnf.save(flow, tmp_path / "kept")
    z = made(model="glow", noise=False).encode(images.x, generator)
    real = cnf.Flow(flow.base, flow.transform).eval()
    assert torch.allclose(z, real.encode(images.x + 0.5).flatten(1), atol=1e-3)
    again = made(model="glow").encode(images.x, generator)
    assert (again - z).abs().max() > 0.1


def test_tables_have_means_over_both_sides_and_seeds_and_the_worst_of_a_worst(latent):
    def rows(question, of, at, number, *values):
        told = {"space": "A", "question": question, "of": of, "at": at, "number": number}
        return [{**told, "seed": str(seed), "value": str(v)} for seed, v in enumerate(values)]

    found = rows("round trip", "pictures", "", "max", 1.0, 3.0)
    found += rows("round trip", "pictures", "", "median", 1.0, 3.0)
    found += rows(
        "arithmetic", "slant", "-1.5", "error", 0.2, 0.4, 7.0
    )  # the other side lacks one
    found += rows("arithmetic", "slant", "1.5", "error", 0.4, 0.8)
    text = latent["run"].tables(found, {"spaces": ["A"]})
    lines = [line.split(" | ") for line in text.splitlines() if line.startswith("| A")]
    assert lines[0][1:4] == ["2.0 ± 1.0", "3", "–"]
    assert lines[1][8] == "0.45 ± 0.15" and len(lines) == 2
