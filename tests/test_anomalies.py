"""experiments/anomalies: p-values of normal rows, and rows that are made anomalous."""

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

FOLDER = Path(__file__).parent.parent / "experiments" / "anomalies"
MODULES = ("typicality", "problems")


@pytest.fixture(scope="module")
def anomalies():
    """Its modules by name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        yield {name: importlib.import_module(name) for name in MODULES}
    for name in MODULES:
        sys.modules.pop(name, None)


def test_p_values_of_a_normal_density_are_tails_of_chi_squared(anomalies):
    """Log-densities of N(0, I) fall with r², whose law is χ² of 4 degrees of freedom."""
    rng = np.random.default_rng(0)
    held_out = -0.5 * (rng.normal(size=(40_000, 4)) ** 2).sum(1)
    squared = np.array([0.05, 0.7, 3.4, 9.0, 18.0])  # from too near the mode to far out
    low, both = anomalies["typicality"].p_values(held_out, -0.5 * squared)
    upper = stats.chi2.sf(squared, 4)
    assert low == pytest.approx(upper, abs=0.01)  # of 40,000 draws
    assert both == pytest.approx(2 * np.minimum(upper, 1 - upper), abs=0.02)
    assert both[0] < 0.001 < 0.99 < low[0]  # the mode is atypical, and nothing is denser


def test_p_values_are_ranks_among_held_out_rows_and_never_zero(anomalies):
    low, both = anomalies["typicality"].p_values(np.array([1.0, 2.0, 4.0]), np.array([0.0, 2, 9]))
    assert low.tolist() == [1 / 4, 3 / 4, 1.0]
    assert both.tolist() == [2 / 4, 1.0, 2 / 4]


def test_anomalies_are_what_they_say(anomalies):
    """Marginals of permuted rows, one column of shifted ones, distances of scaled ones."""
    kinds = anomalies["problems"].KINDS
    x = torch.randn(500, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x[:, 1] += 3 * x[:, 0]
    mean, std = x.mean(0), x.std(0)
    made = {
        name: kind(x, mean, std, torch.Generator().manual_seed(1)) for name, kind in kinds.items()
    }
    assert torch.equal(made["permuted"].sort(0).values, x.sort(0).values)
    assert np.corrcoef(x.T.numpy())[0, 1] > 0.9 > 0.2 > np.corrcoef(made["permuted"].T)[0, 1]
    moved = (made["shifted"] - x) / std
    assert torch.allclose(moved.abs().sum(1), torch.ones(500, dtype=torch.float64))
    assert ((moved.abs() > 1e-9).sum(1) == 1).all() and abs(moved.sum()) < 100
    for name, factor in (("scaled", 1.5), ("shrunk", 0.2)):
        assert torch.allclose(made[name] - mean, factor * (x - mean))


def test_parts_of_normal_rows_are_disjoint_and_all(anomalies):
    rows = torch.arange(200, dtype=torch.float64)[:, None]
    points, held_out = anomalies["problems"].parts(rows, 0, "numbers")
    each = [points.x, points.validation.x, held_out, points.test.x]
    assert [len(part) for part in each] == [110, 30, 30, 30]
    assert torch.equal(torch.cat(each).sort(0).values, rows)
