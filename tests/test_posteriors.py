"""Flows as amortized posteriors: reverse KL is least at the true posterior."""

import pytest
import torch
from torch.distributions import MultivariateNormal, Normal

from cnf.models import build

MIXING, NOISE = torch.tensor([[1.0, 0.5], [-0.3, 1.5]]), 0.7  # y = A z + noise
EVIDENCE = MultivariateNormal(torch.zeros(2), MIXING @ MIXING.T + NOISE**2 * torch.eye(2))


def observed(count, generator):
    draws = torch.randn(2, count, 2, generator=generator)
    return draws[0] @ MIXING.T + NOISE * draws[1]


def excess(flow, y, generator, samples=1):
    """Mean KL(q(z|y) ‖ p(z|y)) by samples of q, in nats, differentiable in the flow."""
    z, log_q = flow.sample_and_log_prob(samples, y, generator=generator)
    log_p = Normal(0.0, 1.0).log_prob(z).sum(-1)
    log_p = log_p + Normal(z @ MIXING.T, NOISE).log_prob(y).sum(-1)
    return (log_q - log_p + EVIDENCE.log_prob(y)).mean()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["glow", "iaf", "nsf", "planar", "sylvester"])
def test_reverse_kl_training_converges_to_the_posterior(name, generator):
    flow = build(name, dim=2, context=2, preprocess=None)
    before = excess(flow, observed(2_000, generator), generator).item()
    optimizer = torch.optim.Adam(flow.parameters(), 1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 300)
    for _ in range(300):
        optimizer.zero_grad()
        excess(flow, observed(256, generator), generator).backward()
        optimizer.step()
        schedule.step()
    flow.eval()
    with torch.no_grad():
        after = excess(flow, observed(2_000, generator), generator, 20).item()
    assert before > 1 and -0.01 < after < 0.1
