"""The simulators' posteriors are those of their likelihoods: weighted draws of the prior agree."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

PATH = Path(__file__).parent.parent / "experiments" / "simulators" / "tasks.py"
spec = importlib.util.spec_from_file_location("simulator_tasks", PATH)
tasks = importlib.util.module_from_spec(spec)
sys.modules["simulator_tasks"] = tasks
spec.loader.exec_module(tasks)


def moments(theta):
    return torch.cat([theta.abs(), theta.square(), theta[:, :1] * theta[:, 1:]], 1).double()


@pytest.mark.parametrize("name", ["gaussian-linear", "two-moons"])
def test_posterior_has_the_moments_of_the_weighted_prior(name):
    torch.manual_seed(0)
    task = tasks.TASKS[name]()
    x = task.simulate(task.prior.sample((1,)))[0]
    theta = task.prior.sample((500_000,))
    weights = task.log_likelihood(x, theta).double().softmax(0)
    exact = moments(task.posterior(x, 20_000))
    error = (exact.var(0) * (weights.square().sum() + 1 / 20_000)).sqrt()
    assert ((weights @ moments(theta) - exact.mean(0)).abs() < 4.5 * error + 1e-9).all()


def test_likelihood_of_slcp_is_that_of_four_gaussian_points():
    theta = torch.tensor([[0.5, -1.0, 1.2, -0.8, 0.7]])
    a, b, rho = 1.44, 0.64, torch.tensor(0.7).tanh()
    covariance = torch.tensor([[a**2, rho * a * b], [rho * a * b, b**2]])
    points = torch.randn(4, 2, generator=torch.Generator().manual_seed(0))
    exact = torch.distributions.MultivariateNormal(theta[0, :2], covariance)
    found = tasks.SLCP().log_likelihood(points.flatten(), theta)
    assert found.item() == pytest.approx(exact.log_prob(points).sum().item(), abs=1e-3)


def test_chains_of_slcp_keep_a_posterior_that_they_start_from(monkeypatch):
    """Of x that says little, prior draws by weight are the posterior before the first step."""
    torch.manual_seed(0)
    task, x = tasks.SLCP(), torch.tensor([3.0, 3.0, -3.0, -3.0, 3.0, -3.0, -3.0, 3.0])
    monkeypatch.setattr(tasks, "STEPS", 300)
    theta = task.prior.sample((500_000,))
    weights = task.log_likelihood(x, theta).double().softmax(0)
    found, rows = moments(task.posterior(x, 2_000)), moments(theta)
    wanted = weights @ rows
    spread = (weights @ rows.square() - wanted.square()).sqrt()
    error = spread * (weights.square().sum() + 1 / 2_000).sqrt()
    assert ((found.mean(0) - wanted).abs() < 5 * error).all()
