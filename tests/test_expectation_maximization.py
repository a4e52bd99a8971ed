"""Mixtures with full covariances: torch's density, scikit-learn's EM, the truth of toy data."""

import math

import numpy as np
import pytest
import torch
from sklearn.mixture import GaussianMixture as Sklearn
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

import cnf
from cnf.distributions import GaussianMixture
from cnf.expectation_maximization import Mixture, _maximized, _statistics, _without_lost

F64 = torch.float64


def draws(seed=0):
    return torch.Generator().manual_seed(seed)


def mixture(components=3, dim=2, seed=0):
    draw = draws(seed)
    means = 4 * torch.randn(components, dim, generator=draw, dtype=F64)
    factors = 0.5 * torch.randn(components, dim, dim, generator=draw, dtype=F64).tril()
    factors.diagonal(dim1=1, dim2=2).abs_().add_(0.3)
    weights = torch.rand(components, generator=draw, dtype=F64) + 0.2
    return GaussianMixture(means, factors, weights)


def torchs(mine):
    normals = MultivariateNormal(mine.means, scale_tril=mine.scales)
    return MixtureSameFamily(Categorical(mine.weights), normals)


@pytest.mark.parametrize("batch", [(), (4,), (2, 3)])
@pytest.mark.parametrize("dim", [1, 3])
def test_density_is_torchs(batch, dim):
    mine = mixture(5, dim)
    z = torch.randn(*batch, dim, generator=draws(), dtype=F64)
    torch.testing.assert_close(mine.log_prob(z), torchs(mine).log_prob(z))


def test_density_in_slices_of_rows_is_the_same(monkeypatch):
    mine, z = mixture(5, 3), torch.randn(7, 3, generator=draws(), dtype=F64)
    whole = mine.log_prob(z)
    monkeypatch.setattr("cnf.expectation_maximization.BYTES", 2 * 15 * 8)
    torch.testing.assert_close(mine.log_prob(z), whole)


def test_samples_have_the_mean_and_covariance_of_the_mixture():
    mine = mixture()
    x = mine.sample((200_000,), draws())
    mean, variance = torchs(mine).mean, torchs(mine).variance
    assert ((x.mean(0) - mean).abs() < 4 * (variance / len(x)).sqrt()).all()
    assert ((x.var(0) / variance - 1).abs() < 0.02).all()
    assert mine.sample((2, 3), draws()).shape == (2, 3, 2)


def test_one_step_of_em_is_scikit_learns():
    x = mixture().sample((500,), draws())
    start = mixture(seed=1)
    theirs = Sklearn(
        3, max_iter=1, reg_covar=0, weights_init=start.weights.numpy(),
        means_init=start.means.numpy(),
        precisions_init=torch.linalg.inv(start.scales @ start.scales.mT).numpy(),
    )  # fmt: skip
    with pytest.warns(match="converge"):
        theirs.fit(x.numpy())
    begun = Mixture(start.weights, start.means, start.scales)
    ours = _maximized(_statistics(x, begun), ridge=0.0)
    for found, expected in (
        (ours.weights, theirs.weights_),
        (ours.means, theirs.means_),
        (ours.factors @ ours.factors.mT, theirs.covariances_),
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("batch_size", [2_000, 20_000])
def test_fit_finds_a_mixture_whose_density_is_the_truths(batch_size):
    truth = mixture(3, 4, seed=3)
    x, held_out = truth.sample((30_000,), draws()).split([20_000, 10_000])
    found = GaussianMixture.fit(x, 6, steps=150, batch_size=batch_size, generator=draws(1))
    gap = (truth.log_prob(held_out) - found.log_prob(held_out)).mean().item()
    normal = GaussianMixture.fit(x, 1, steps=1)
    alone = (truth.log_prob(held_out) - normal.log_prob(held_out)).mean().item()
    assert -0.01 < gap < 0.03 and alone > 0.5


def test_one_component_is_the_normal_of_mean_and_covariance_far_from_zero():
    x = mixture(1, 3).sample((1_000,), draws()) + 1e6
    found = GaussianMixture.fit(x, 1, steps=2, ridge=0.0)
    np.testing.assert_allclose(found.means[0], x.mean(0), rtol=1e-12)
    covariance = (found.scales @ found.scales.mT)[0]
    np.testing.assert_allclose(covariance, torch.cov(x.T, correction=0), rtol=1e-8)


def test_statistics_average_over_batches_and_are_not_the_last_ones():
    x = torch.randn(5_000, 1, generator=draws(), dtype=F64)
    fitted = [
        GaussianMixture.fit(x, 1, steps=200, batch_size=50, generator=draws(seed)).means.item()
        for seed in range(20)
    ]
    spread = torch.tensor(fitted).std().item()
    assert spread < 0.5 * 50**-0.5  # of the mean of one batch


def test_full_batches_never_lower_the_likelihood():
    x = mixture(4, 3, seed=5).sample((2_000,), draws())
    scores = [
        GaussianMixture.fit(x, 4, steps=n, ridge=0.0, generator=draws()).log_prob(x).mean().item()
        for n in (1, 2, 4, 8, 16)
    ]
    assert scores == sorted(scores) and scores[-1] > scores[0] + 0.01


def test_statistics_in_slices_of_rows_are_the_same(monkeypatch):
    mine, z = mixture(5, 3), torch.randn(7, 3, generator=draws(), dtype=F64)
    begun = Mixture(mine.weights, mine.means, mine.scales)
    whole = _statistics(z, begun)
    monkeypatch.setattr("cnf.expectation_maximization.BYTES", 2 * 10 * 8)
    torch.testing.assert_close(_statistics(z, begun), whole)


def test_fit_follows_the_units_of_the_data():
    x = mixture(3, 2, seed=3).sample((2_000,), draws())
    units = torch.tensor([1e4, 1e-3], dtype=F64)
    one = GaussianMixture.fit(x, 3, steps=9, batch_size=500, generator=draws(1))
    two = GaussianMixture.fit(x * units, 3, steps=9, batch_size=500, generator=draws(1))
    torch.testing.assert_close(two.log_prob(x * units), one.log_prob(x) - math.log(10))


def test_component_without_rows_begins_again():
    x = torch.cat([torch.zeros(99, 1), torch.full((1,), 1e3)[:, None]]).double()
    x += 0.01 * torch.randn(x.shape, generator=draws(), dtype=F64)
    found = GaussianMixture.fit(x, 8, steps=30, generator=draws())
    assert torch.isfinite(found.log_prob(x)).all() and (found.weights > 0).all()


def test_mixture_is_a_base_that_is_saved_with_its_flow(tmp_path):
    flow = cnf.Flow(mixture().float(), cnf.models.cnf(2, hidden=(8,)).transform)
    cnf.save(flow, tmp_path / "flow.safetensors")
    again = cnf.Flow(mixture(seed=9).float(), cnf.models.cnf(2, hidden=(8,)).transform)
    cnf.load(tmp_path / "flow.safetensors", into=again)
    z = torch.randn(5, 2, generator=draws())
    assert torch.equal(again.log_prob(z), flow.log_prob(z))
    assert "3 components, full covariances" in repr(flow)


def test_rows_of_one_number_need_a_column():
    with pytest.raises(ValueError, match=r"GaussianMixture.fit: expected x of shape \(N, D\)"):
        GaussianMixture.fit(torch.randn(100), 3)


def test_gradients_and_wrong_shapes():
    mine = mixture()
    z = torch.randn(3, 2, generator=draws(), dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(mine.log_prob, z)
    with pytest.raises(ValueError, match=r"scales of shape .*got \(3, 2\) and \(3, 3\)"):
        GaussianMixture(torch.zeros(3, 2), torch.ones(3, 3))
    with pytest.raises(ValueError, match="more rows than the 2 columns.*5 components, got 4"):
        GaussianMixture.fit(torch.zeros(4, 2), 5)
    with pytest.raises(ValueError, match="finite"):
        GaussianMixture.fit(torch.full((9, 2), math.nan), 2)


def test_lost_component_is_a_row_of_the_batch_with_the_covariance_of_all():
    x = torch.randn(50, 2, generator=draws(), dtype=F64)
    begun = Mixture(
        torch.tensor([0.5, 0.5], dtype=F64),
        torch.tensor([[0.0, 0.0], [1e3, 0.0]], dtype=F64),
        torch.eye(2, dtype=F64).repeat(2, 1, 1),
    )
    found = _maximized(_without_lost(_statistics(x, begun), x), 0.0)
    torch.testing.assert_close(found.means[1], x[0])
    torch.testing.assert_close(found.factors[1], torch.eye(2, dtype=F64))
    assert found.weights[1] > 0.3
