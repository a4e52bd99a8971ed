import math

import ot
import pytest
import scipy.optimize
import scipy.stats
import sklearn.model_selection
import sklearn.neural_network
import torch
from torch import Generator

from cnf.metrics import distances
from cnf.metrics.distances import (
    c2st,
    energy_distance,
    mmd,
    sliced_wasserstein2,
    wasserstein1,
    wasserstein2,
    wasserstein2_floor,
)
from cnf.metrics.estimate import Estimate

DISTANCES = [wasserstein1, wasserstein2, sliced_wasserstein2, mmd, energy_distance, c2st]


def normal(n, dim=2, seed=0):
    return torch.randn(n, dim, generator=Generator().manual_seed(seed), dtype=torch.float64)


# --- W1 ---


def test_w1_is_the_area_between_cumulative_distributions_on_a_line():
    x, y = normal(70, 1), normal(90, 1, seed=1) ** 3
    expected = scipy.stats.wasserstein_distance(x[:, 0], y[:, 0])
    assert wasserstein1(x, y) == pytest.approx(expected, rel=1e-10)


def test_w1_is_the_optimal_assignment():
    x, y = normal(200, 3), normal(200, 3, seed=1) ** 3
    cost = torch.cdist(x, y).numpy()
    rows, columns = scipy.optimize.linear_sum_assignment(cost)
    assert wasserstein1(x, y) == pytest.approx(cost[rows, columns].mean(), rel=1e-10)
    assert wasserstein1(x, y) < wasserstein2(x, y)


# --- W2 ---


def test_w2_of_a_set_and_its_translate_is_the_length_of_the_shift():
    x, shift = normal(300), torch.tensor([3.0, -4.0], dtype=torch.float64)
    assert wasserstein2(x, (x + shift).flip(0)) == pytest.approx(5.0, abs=1e-12)


def test_w2_of_two_gaussians_has_closed_form():
    levels = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    quantiles = torch.special.ndtri(levels)[:, None]
    expected = math.hypot(3.0, 2.0 - 0.5)  # |m1 − m2|² + (s1 − s2)²
    computed = wasserstein2(2.0 * quantiles, 3.0 + 0.5 * quantiles)
    assert computed == pytest.approx(expected, rel=1e-3)  # the tails beyond 1/1000


def test_w2_is_the_optimal_assignment():
    x, y = normal(200, 3), normal(200, 3, seed=1) ** 3
    cost = torch.cdist(x, y).square().numpy()
    rows, columns = scipy.optimize.linear_sum_assignment(cost)
    expected = math.sqrt(cost[rows, columns].mean())
    assert wasserstein2(x, y) == pytest.approx(expected, rel=1e-10)


def test_w2_of_sets_of_unequal_size_weighs_every_point_by_one_over_its_set():
    x, y = normal(40), normal(60, seed=1)
    assert wasserstein2(x, y) == pytest.approx(
        wasserstein2(x.repeat(3, 1), y.repeat(2, 1)), rel=1e-10
    )


def test_w2_refuses_an_answer_that_pot_warned_about(monkeypatch):
    emd2 = ot.emd2
    monkeypatch.setattr(
        ot, "emd2", lambda *args, **known: emd2(*args, **{**known, "numItermax": 1})
    )
    with pytest.raises(
        ValueError, match="^wasserstein2: POT did not find the optimal plan: numIter"
    ):
        wasserstein2(normal(50), normal(50, seed=1))


def test_w2_floor_is_above_zero_and_falls_with_n():
    def draw(n, generator):
        return torch.randn(n, 2, generator=generator)

    generator = Generator().manual_seed(0)
    small = wasserstein2_floor(draw, 50, generator, repeats=10)
    large = wasserstein2_floor(draw, 500, generator, repeats=4)
    assert 0 < large.value < large.value + 4 * large.error < small.value - 4 * small.error
    assert math.isnan(wasserstein2_floor(draw, 50, generator).error)


# --- sliced W2 ---


def test_sliced_w2_of_a_translate_is_shift_over_root_dim():
    x, shift = normal(5, 3), torch.tensor([2.0, -1.0, 2.0], dtype=torch.float64)
    computed = sliced_wasserstein2(x, x + shift, 100_000, Generator().manual_seed(0))
    # var (θ·s)² = |s|⁴ (3/15 − 1/9), so the standard error of SW2² = 3 is .0085
    assert computed**2 == pytest.approx(9 / 3, abs=4 * 0.0085)


@pytest.mark.parametrize(("n", "m"), [(7, 5), (5, 7), (6, 4), (4, 12), (1, 3), (8, 8)])
def test_sliced_w2_in_one_dimension_is_exact_for_any_sizes(n, m):
    x, y = normal(n, 1), 2 + normal(m, 1, seed=1)
    expected = math.sqrt(ot.emd2_1d(x.flatten().numpy(), y.flatten().numpy()))
    assert sliced_wasserstein2(x, y, projections=3) == pytest.approx(expected, rel=1e-12)


def test_sliced_w2_is_the_mean_over_directions_of_each_exact_w2(monkeypatch):
    x, y = normal(9), normal(6, seed=1) + 1
    angles = torch.tensor([0.3, 1.1, 2.9], dtype=torch.float64)
    directions = torch.stack([angles.cos(), angles.sin()], -1)
    squares = [wasserstein2(x @ d[:, None], y @ d[:, None]) ** 2 for d in directions]
    monkeypatch.setattr(torch, "randn", lambda *a, **k: 7 * directions)  # lengths must not count
    assert sliced_wasserstein2(x, y, 3) == pytest.approx(math.sqrt(sum(squares) / 3), rel=1e-12)


def test_sliced_w2_repeats_with_the_generator():
    x, y = normal(20), normal(30, seed=1)
    first, again, other = (
        sliced_wasserstein2(x, y, 10, Generator().manual_seed(s)) for s in (3, 3, 4)
    )
    assert first == again != other


# --- MMD and energy distance ---


def gaussian_mmd2(sigma, dim, shift2, s, r):
    """MMD² of N(0, s²I) and N(shift, r²I) under exp(−|a−b|²/2σ²)."""

    def mean_kernel(variance, distance2):
        width = sigma**2 + variance
        return (sigma**2 / width) ** (dim / 2) * math.exp(-distance2 / (2 * width))

    cross = mean_kernel(s**2 + r**2, shift2)
    return mean_kernel(2 * s**2, 0) + mean_kernel(2 * r**2, 0) - 2 * cross


def test_mmd_of_two_gaussians_has_closed_form():
    expected = gaussian_mmd2(0.7, 2, 2.0, 1.0, 0.5) + gaussian_mmd2(2.0, 2, 2.0, 1.0, 0.5)
    pairs = [(normal(300, seed=s), 1 + 0.5 * normal(200, seed=100 + s)) for s in range(50)]
    computed = Estimate.of(torch.tensor([mmd(x, y, (0.7, 2.0)) for x, y in pairs]))
    assert computed.value == pytest.approx(expected, abs=4 * computed.error)
    assert computed.error < 0.02 * expected


@pytest.mark.parametrize("biased", [True, False])
def test_mmd_is_the_double_loop(biased):
    x, y, sigmas = normal(6), normal(4, seed=1), (0.5, 3.0)

    def kernel(a, b):
        return sum(math.exp(-((a - b) ** 2).sum().item() / (2 * s**2)) for s in sigmas)

    def within(a):
        pairs = [(i, j) for i in range(len(a)) for j in range(len(a)) if biased or i != j]
        return sum(kernel(a[i], a[j]) for i, j in pairs) / len(pairs)

    cross = sum(kernel(a, b) for a in x for b in y) / (len(x) * len(y))
    expected = within(x) + within(y) - 2 * cross
    assert mmd(x, y, sigmas, biased) == pytest.approx(expected, rel=1e-12)


def test_energy_distance_of_two_gaussians_has_closed_form():
    def mean_abs(mean, sd):  # folded normal
        return sd * math.sqrt(2 / math.pi) * math.exp(-(mean**2) / (2 * sd**2)) + mean * math.erf(
            mean / (sd * math.sqrt(2))
        )

    pairs = [(normal(300, 1, s), 1.5 + 2 * normal(200, 1, 100 + s)) for s in range(50)]
    computed = Estimate.of(torch.tensor([energy_distance(x, y) for x, y in pairs]))
    expected = 2 * mean_abs(1.5, math.sqrt(5)) - mean_abs(0, math.sqrt(2)) - mean_abs(0, 8**0.5)
    assert computed.value == pytest.approx(expected, abs=4 * computed.error)
    assert computed.error < 0.05 * expected


def test_biased_energy_distance_is_the_square_of_scipys():
    x, y = normal(50, 1), 1 + normal(70, 1, seed=1)
    expected = scipy.stats.energy_distance(x.flatten(), y.flatten()) ** 2
    assert energy_distance(x, y, biased=True) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("distance", [mmd, energy_distance])
def test_unbiased_statistic_scatters_around_zero_for_equal_laws(distance):
    pairs = [(normal(5, seed=s), normal(4, seed=1000 + s)) for s in range(500)]
    unbiased = Estimate.of(torch.tensor([distance(x, y) for x, y in pairs]))
    biased = Estimate.of(torch.tensor([distance(x, y, biased=True) for x, y in pairs]))
    assert abs(unbiased.value) < 4 * unbiased.error < biased.value


@pytest.mark.parametrize("distance", [mmd, energy_distance, sliced_wasserstein2])
def test_blocks_do_not_change_the_answer(distance, monkeypatch):
    x, y = normal(23), normal(31, seed=1)
    torch.manual_seed(0)  # the directions come from the global generator here
    whole = distance(x, y)
    monkeypatch.setattr(distances, "_BLOCK", 64)
    torch.manual_seed(0)
    assert distance(x, y) == pytest.approx(whole, rel=1e-12)


@pytest.mark.parametrize("distance", [wasserstein2, mmd, energy_distance])
def test_distance_does_not_depend_on_how_far_the_sets_lie_from_the_origin(distance):
    x, y = normal(40), normal(30, seed=1)
    far = 2.0**26  # |x|² + |y|² − 2xy would have no digit left
    expected = distance((x + far) - far, (y + far) - far)
    assert distance(x + far, y + far) == pytest.approx(expected, rel=1e-9)


# --- C2ST ---


def test_c2st_cannot_tell_equal_laws_apart_nor_fail_on_separated_ones():
    x, y = normal(400), normal(600, seed=1)
    assert c2st(x, y) == pytest.approx(0.5, abs=4 * 0.5 / math.sqrt(2 * 400))
    assert c2st(x, 5 + y) > 0.95


def test_c2st_of_two_shifted_gaussians_is_the_bayes_accuracy():
    x, y = normal(2000, 1), 2 + normal(2000, 1, seed=1)
    bayes = 0.5 * (1 + math.erf(1 / math.sqrt(2)))  # Φ(shift/2) = .841
    assert c2st(x, y) == pytest.approx(bayes, abs=4 * 0.366 / math.sqrt(4000))  # its own sampling


def test_c2st_takes_a_constant_column_and_an_ordered_set():
    def ordered(n, seed):
        return torch.cat([normal(n, 1, seed).sort(0).values, torch.ones(n, 1)], -1)

    x, y = ordered(300, 0), ordered(900, 1)
    assert c2st(x, y, max_points=200) < 0.6  # the first 200 rows alone would be told apart


def test_c2st_measures_both_sets_in_standard_deviations_of_the_reference(monkeypatch):
    def spied(classifier, inputs, labels, cv):
        given.append((inputs[labels == 0], inputs[labels == 1]))
        return score(classifier, inputs, labels, cv=cv)

    given, score = [], sklearn.model_selection.cross_val_score
    monkeypatch.setattr(sklearn.model_selection, "cross_val_score", spied)
    c2st(3 + 2 * normal(200), 7 + 10 * normal(200, seed=1), folds=2)
    (reference, judged) = given[0]
    assert abs(reference.mean(0)).max() < 1e-12 and abs(reference.std(0) - 1).max() < 1e-12
    assert judged.mean(0) == pytest.approx(2, abs=0.8) and judged.std(0) == pytest.approx(
        5, rel=0.2
    )


def test_c2st_is_silent_when_the_classifier_has_not_converged(monkeypatch):
    def short(*args, **kwargs):
        return classifier(*args, **{**kwargs, "max_iter": 1})

    classifier = sklearn.neural_network.MLPClassifier
    monkeypatch.setattr(sklearn.neural_network, "MLPClassifier", short)
    assert 0 <= c2st(normal(50), normal(50, seed=1)) <= 1


# --- what bad input gets, and the table ---

BAD = {
    "different D": (torch.zeros(5, 2), torch.zeros(5, 3), r"one D, got shapes \(5, 2\) and"),
    "empty": (torch.zeros(0, 2), torch.zeros(5, 2), r"x of shape \(N, D\) and not empty"),
    "one axis": (torch.zeros(5, 2), torch.zeros(5), r"y of shape \(N, D\)"),
    "NaN": (torch.zeros(5, 2), torch.full((5, 2), math.nan), "expected y to be finite"),
}


@pytest.mark.parametrize("fault", BAD)
@pytest.mark.parametrize("distance", DISTANCES)
def test_bad_sets_are_refused_in_one_line(distance, fault):
    x, y, message = BAD[fault]
    with pytest.raises(ValueError, match=message) as error:
        distance(x, y)
    assert distance.__name__ in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mmd(normal(1), normal(5)), "2 points or more"),
        (lambda: mmd(normal(5), normal(5), bandwidths=(1.0, 0.0)), "bandwidth > 0"),
        (lambda: c2st(normal(4), normal(9)), "folds"),
        (lambda: sliced_wasserstein2(normal(4), normal(4), projections=0), "projections > 0"),
        (lambda: wasserstein2_floor(normal, 0), "n > 0"),
    ],
)
def test_bad_settings_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("distance", DISTANCES)
def test_distance_takes_float32_with_gradients_and_gives_a_float(distance):
    x = normal(30).float().requires_grad_()
    assert isinstance(distance(x, normal(30, seed=1)), float)
