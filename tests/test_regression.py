"""experiments/regression: predictive distributions, their scores and the exact problem."""

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import integrate, stats
from sklearn.ensemble import RandomForestRegressor

import cnf

FOLDER = Path(__file__).parent.parent / "experiments" / "regression"
MODULES = ("predictive", "problems", "baselines")


@pytest.fixture(scope="module")
def regression():
    """Its modules by name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        found = {name: importlib.import_module(name) for name in MODULES}
        yield found
    for name in MODULES:
        sys.modules.pop(name, None)


@pytest.fixture
def mixture(regression):
    """Two rows of two components."""
    return regression["predictive"].Mixture(
        np.array([[0.3, 0.7], [0.5, 0.5]]),
        np.array([[-1.0, 2.0], [0.0, 0.1]]),
        np.array([[0.5, 1.5], [1.0, 0.2]]),
    )


def test_density_of_a_mixture_is_the_derivative_of_its_distribution_function(mixture):
    for y in (-1.7, 0.3, 2.2):
        density = np.exp(mixture.log_prob(np.full(2, y)))
        area = [
            integrate.quad(lambda t, k=k: np.exp(mixture.log_prob(np.full(2, t)))[k], -12, y)[0]
            for k in range(2)
        ]
        assert mixture.cdf(np.full(2, y)) == pytest.approx(area, abs=1e-8)
        one = stats.norm.pdf(y, [[-1.0, 2.0], [0.0, 0.1]], [[0.5, 1.5], [1.0, 0.2]])
        assert density == pytest.approx((mixture.weight * one).sum(1), rel=1e-12)


def test_quantiles_of_a_mixture_invert_its_distribution_function(mixture):
    levels = np.array([0.001, 0.2, 0.5, 0.97])
    found = mixture.quantiles(levels)
    for k, level in enumerate(levels):
        assert mixture.cdf(found[:, k]) == pytest.approx([level, level], abs=1e-9)


def test_crps_of_a_normal_distribution_has_its_closed_form(regression):
    """σ (z (2Φ(z) − 1) + 2φ(z) − 1/√π), Gneiting and Raftery (2007), equation 21."""
    levels = (np.arange(4_000) + 0.5) / 4_000
    y, mean, std = np.array([-1.3, 0.0, 2.4]), 0.4, 1.7
    z = (y - mean) / std
    exact = std * (z * (2 * stats.norm.cdf(z) - 1) + 2 * stats.norm.pdf(z) - np.pi**-0.5)
    quantiles = np.broadcast_to(stats.norm.ppf(levels, mean, std), (3, len(levels)))
    found = regression["predictive"].crps(quantiles, levels, y)
    assert found == pytest.approx(exact, abs=1e-3)  # the midpoint rule's, for 4,000 levels


def test_recalibrated_intervals_cover_what_overconfident_ones_do_not(regression):
    """PITs of N(0, 1) for rows of N(0, 2²): 90 % cover 59 %; the mean over draws is to be 90 %."""
    rng = np.random.default_rng(0)
    held_out, pit = (stats.norm.cdf(2 * rng.normal(size=n)) for n in (999, 100_000))
    raw = np.mean(np.abs(pit - 0.5) <= 0.45)
    assert raw == pytest.approx(2 * stats.norm.cdf(stats.norm.ppf(0.95) / 2) - 1, abs=0.005)
    found = regression["predictive"].recalibrated(held_out, pit, 0.9)
    assert found == pytest.approx(0.9, abs=3 * (0.9 * 0.1 / 1000) ** 0.5)  # Beta(900, 100)
    few = regression["predictive"].recalibrated(held_out[:5], pit, 0.9)
    assert few == 1.0  # five rows cannot tell: all is covered


def test_weights_of_a_forest_are_those_of_its_own_predictions(regression):
    """One tree: the rows in the leaf. Several, without bootstrap: their mean is `predict`."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(200, 3)), rng.normal(size=200)
    one = RandomForestRegressor(1, min_samples_leaf=7, bootstrap=False, random_state=0).fit(x, y)
    new = rng.normal(size=(5, 3))
    fine = regression["baselines"].forest_quantiles(one, x, y, new, 7 * 13 * 11)
    leaf, leaves = one.apply(new)[:, 0], one.apply(x)[:, 0]
    for row, at in zip(fine, leaf, strict=True):
        assert set(row) == set(y[leaves == at])
    many = RandomForestRegressor(
        20, min_samples_leaf=5, max_features=1, bootstrap=False, random_state=1
    ).fit(x, y)
    fine = regression["baselines"].forest_quantiles(many, x, y, new, 20_000)
    assert fine.mean(1) == pytest.approx(many.predict(new), abs=1e-3)  # quantiles in 20,000 parts


def test_exact_noise_is_what_the_rows_have(regression):
    """PIT values of 40,000 rows are uniform; NLL is the entropy by quadrature, to its error."""
    problems = regression["problems"]
    rows = problems.bimodal(3, 40_000)
    truth, y = problems.exact(rows[:, :1]), rows[:, 1].numpy()
    assert stats.kstest(truth.cdf(y), "uniform").pvalue > 0.01
    nll = -truth.log_prob(y)
    t = np.linspace(-4, 5, 2_001)
    feature = np.linspace(-1, 1, 202)[:-1] + 1 / 201
    told = problems.exact(torch.from_numpy(np.repeat(feature, len(t)))[:, None])
    log_p = told.log_prob(np.tile(t, len(feature))).reshape(len(feature), -1)
    entropy = -np.trapezoid(np.exp(log_p) * log_p, t, axis=1).mean()
    assert abs(nll.mean() - entropy) < 4 * nll.std() / 200


@pytest.mark.parametrize("model", ["nsf", "cnf"])
def test_distribution_function_of_a_flow_is_the_integral_of_its_density(regression, model):
    """By quadrature; and its quantiles are where that integral is their level."""
    torch.manual_seed(0)
    options = {} if model == "nsf" else {"hidden": [8], "fourier": 0}
    flow = cnf.models.build(model, dim=1, context=2, **options).double().eval()
    rows = torch.randn(50, 1, dtype=torch.float64), torch.randn(50, 2, dtype=torch.float64)
    flow.initialize(*rows)
    with torch.no_grad():
        for weights in flow.parameters():
            weights.add_(0.1 * torch.randn_like(weights))
    told = regression["predictive"].OfFlow(flow, rows[1][:1])
    many = regression["predictive"].OfFlow(flow, rows[1][:1].expand(4_001, 2))
    for level, quantile in zip((0.1, 0.6), told.quantiles(np.array([0.1, 0.6]))[0], strict=True):
        t = np.linspace(-15, quantile, 4_001)
        area = integrate.simpson(np.exp(many.log_prob(t)), t)
        assert area == pytest.approx(level, abs=1e-4)  # of Simpson's rule at a spline's knots
        assert told.cdf(np.array([quantile])) == pytest.approx(level, abs=1e-5)
