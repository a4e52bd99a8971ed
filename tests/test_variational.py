"""experiments/variational: what is known of its targets, by sums over grids, and its scores."""

import importlib
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import special, stats

import cnf
from cnf.transforms import Identity

FOLDER = Path(__file__).parent.parent / "experiments" / "variational"


@pytest.fixture(scope="module")
def modules():
    """Its modules by name."""
    names = ("targets", "run")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        yield {name: importlib.import_module(name) for name in names}
    for name in names:
        sys.modules.pop(name, None)


def grid(*sides):
    """All combinations of points on lines, (N, D)."""
    return torch.cartesian_prod(*(torch.linspace(*side, dtype=torch.float64) for side in sides))


def expect_moments(target, x, log_mass):
    """Evidence, means and deviations of a target are those of masses at points."""
    log_z = log_mass.logsumexp(0)
    share = (log_mass - log_z).exp()
    mean = share @ x
    std = (share @ (x - mean).square()).sqrt()
    assert target.log_evidence == pytest.approx(log_z.item(), abs=1e-4)
    torch.testing.assert_close(target.mean.double(), mean, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(target.std.double(), std, atol=1e-3, rtol=1e-3)


def test_banana_has_its_integral_and_moments(modules):
    """On a grid of x and of how far y is from x²/2."""
    x = grid((-16, 16, 801), (-4, 4, 161))
    x[:, 1] += 0.5 * x[:, 0].square()
    target = modules["targets"].banana()
    expect_moments(target, x, target.log_density(x) + math.log(32 / 800 * 8 / 160))


def test_funnel_has_its_integral_and_moments(modules):
    """On a grid of v and of x by its deviation e^(v/2), in two dimensions."""
    x = grid((-30, 40, 1_401), (-8, 8, 161))
    half = x[:, 0] / 2
    x[:, 1] *= half.exp()
    target = modules["targets"].funnel(2)
    expect_moments(target, x, target.log_density(x) + half + math.log(70 / 1_400 * 16 / 160))


@pytest.mark.parametrize("centered", [False, True])
def test_eight_schools_have_the_evidence_and_moments_of_a_grid(modules, centered):
    """Of μ and log τ, given which each effect is normal (Gelman et al., 2013, equation 5.17)."""
    target = modules["targets"].eight_schools(centered)
    y = np.array([28.0, 8, -3, 7, -1, 1, 18, 12])  # Rubin (1981), table 1
    s = np.array([15.0, 10, 16, 11, 9, 11, 10, 18])

    def joint(mu, log_tau):
        tau = np.exp(log_tau)
        prior = stats.norm.logpdf(mu, 0, 5) + stats.halfcauchy.logpdf(tau, scale=5) + log_tau
        spread = np.hypot(s, tau[..., None])
        return prior + stats.norm.logpdf(y, mu[..., None], spread).sum(-1)

    def given(mu, log_tau):
        """Mean and variance of the own variable of each school."""
        mu, tau = mu[..., None], np.exp(log_tau)[..., None]
        total = s**2 + tau**2
        if centered:
            return (y * tau**2 + mu * s**2) / total, s**2 * tau**2 / total
        return (y - mu) * tau / total, s**2 / total

    mu, log_tau = grid((-25, 30, 221), (-12, 6, 361)).numpy().T
    log_mass = joint(mu, log_tau) + math.log(55 / 220 * 18 / 360)
    log_z = special.logsumexp(log_mass)
    share = np.exp(log_mass - log_z)
    mean, variance = given(mu, log_tau)
    means = np.column_stack([mu, log_tau, mean])
    first = share @ means
    second = share @ ((means - first) ** 2 + np.column_stack([0 * mu, 0 * mu, variance]))
    assert target.log_evidence == pytest.approx(log_z, abs=1e-4)
    assert target.mean.numpy() == pytest.approx(first, abs=1e-3)
    assert target.std.numpy() == pytest.approx(np.sqrt(second), rel=1e-3)

    x = np.random.default_rng(0).normal(size=(5, 10))
    mean, variance = given(x[:, 0], x[:, 1])
    own = stats.norm.logpdf(x[:, 2:], mean, np.sqrt(variance)).sum(1)
    found = target.log_density(torch.from_numpy(x)).numpy()
    assert found == pytest.approx(joint(x[:, 0], x[:, 1]) + own, rel=1e-6)


def test_scores_of_a_normal_density_are_those_of_closed_forms(modules):
    """By N(0, I): KL(q ‖ p), and E w² = exp(m²/(2 - s²)) / (s √(2 - s²)) of each variable."""
    mean, std = torch.tensor([0.3, -0.1]), torch.tensor([0.8, 0.5])
    p = torch.distributions.Normal(mean, std)
    target = modules["targets"].Target(
        2, lambda x: p.log_prob(x).sum(-1) + math.log(3), math.log(3), mean, std
    )
    flow = cnf.Flow(None, Identity(2), event_shape=(2,))
    told = modules["run"].scores(flow, target, 40_000, seed=0)
    found = {name: float(value) for name, value in told.items()}
    kl = (std.log() + (1 + mean.square()) / (2 * std.square()) - 0.5).sum().item()
    second = (
        (mean.square() / (2 - std.square())).exp() / (std * (2 - std.square()).sqrt())
    ).prod()
    assert found["elbo_gap"] == pytest.approx(kl, abs=0.05)
    assert found["evidence_error"] == pytest.approx(0, abs=4 * found["evidence_sigma"])
    sigma = math.sqrt((second.item() - 1) / 40_000)
    assert found["evidence_sigma"] == pytest.approx(sigma, rel=0.05)
    assert found["ess"] == pytest.approx(1 / second.item(), rel=0.05)
    assert found["mean_error"] == pytest.approx(0.3 / 0.8, abs=0.02)
    assert found["std_error"] == pytest.approx(math.log(2), abs=0.02)


def test_table_has_means_over_seeds_and_the_least_effective_sample_size(modules):
    rows = [
        {
            "target": "banana", "flow": "nsf", "path_gradient": along, "seed": str(seed),
            "elbo_gap": f"{gap}", "evidence_error": "-0.5", "evidence_sigma": "0.25",
            "ess": f"{0.2 + 0.3 * seed}", "mean_error": "0.1", "std_error": "0.3",
            "optimizer_steps": f"{1_000 + seed}",
        }
        for seed in (2, 0, 1)
        for along, gap in (("True", seed), ("False", 8))
    ]  # fmt: skip
    _, _, whole, path = modules["run"].table(rows).splitlines()
    rest = "-0.500 (0.250) | 0.50 | 0.20 | 0.10 | 0.30 | 1,001 |"
    assert whole == f"| banana | nsf | whole | 8.000 | {rest}"
    assert path == f"| banana | nsf | path | 1.000 | {rest}"
