"""Mixture maps against torch's mixtures, in the tails, back by roots, and at the start."""

import math

import pytest
import torch
from torch import distributions as D

from cnf.transforms import (
    Autoregressive,
    MixtureOfGaussians,
    MixtureOfLogistics,
    Standardize,
)

F64 = torch.float64
KINDS = {"gaussians": MixtureOfGaussians, "logistics": MixtureOfLogistics}


def draws(seed=0):
    return torch.Generator().manual_seed(seed)


def parameters(mixture, *shape, dtype=F64, spread=1.5):
    raw = spread * torch.randn(mixture.size, *shape, generator=draws(), dtype=dtype)
    return mixture.parametrize(raw)


def standard_logistic(loc, scale):
    flat = D.Uniform(torch.zeros_like(loc), torch.ones_like(loc))
    squash = [D.SigmoidTransform().inv, D.AffineTransform(loc, scale)]
    return D.TransformedDistribution(flat, squash)


@pytest.mark.parametrize("kind", KINDS)
def test_density_with_its_own_base_is_torchs_mixture(kind):
    """log p(z(x)) + log dz/dx, with p normal or logistic, is the mixture's log-density."""
    mixture = KINDS[kind](3)
    log_weights, means, log_scales = parameters(mixture, 50)
    x = 3 * torch.randn(50, generator=draws(1), dtype=F64)
    z, log_slope = mixture.inverse(x, log_weights, means, log_scales)
    make = D.Normal if kind == "gaussians" else standard_logistic
    unit = make(torch.zeros(50, dtype=F64), torch.ones(50, dtype=F64))
    parts = make(means, log_scales.exp()).log_prob(x)
    expected = (log_weights + parts).logsumexp(0)
    torch.testing.assert_close(unit.log_prob(z) + log_slope, expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_roots_are_found_everywhere(kind, dtype):
    mixture = KINDS[kind](5)
    numbers = parameters(mixture, 400, dtype=dtype)
    z = torch.linspace(-12, 12, 400, dtype=dtype)
    x, forward = mixture.forward(z, *numbers)
    again, back = mixture.inverse(x, *numbers)
    off = 1e-11 if dtype == F64 else 2e-5
    torch.testing.assert_close(again, z, rtol=off, atol=off)
    torch.testing.assert_close(back, -forward, rtol=0, atol=20 * off)


def test_far_out_the_nearest_component_alone_counts():
    """Φ⁻¹ of a probability of 10⁻⁴⁰⁰ is not infinite, and its slope is that of one component."""
    mixture = MixtureOfGaussians(2)
    numbers = [torch.tensor(v, dtype=F64)[:, None] for v in ([-0.7, -0.7], [0.0, 3.0], [0.0, 0.0])]
    for x in (-50.0, 60.0):
        z, log_slope = mixture.inverse(torch.tensor([x], dtype=F64), *numbers)
        near = x if x < 0 else x - 3  # log Φ(z) = log w + log Φ(x - m), and log Φ(z) = -z²/2 - …
        assert abs(z.item()) == pytest.approx(math.sqrt(near**2 + 1.4), rel=1e-4)
        assert log_slope.item() == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_gradients_of_value_and_slope(kind, direction):
    mixture = KINDS[kind](2)
    value = torch.randn(3, generator=draws(1), dtype=F64, requires_grad=True)
    numbers = [p.clone().requires_grad_() for p in parameters(mixture, 3, spread=0.7)]
    assert torch.autograd.gradcheck(getattr(mixture, direction), (value, *numbers), atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("components", [1, 2, 8])
def test_zeros_are_near_the_identity_with_components_apart(kind, components):
    mixture = KINDS[kind](components)
    log_weights, means, log_scales = mixture.parametrize(torch.zeros(mixture.size, 9, dtype=F64))
    z = torch.linspace(-2, 2, 9, dtype=F64)
    x, _ = mixture.inverse(z, log_weights, means, log_scales)
    assert (x - z).abs().max() < (1e-9 if components == 1 else 0.3)
    assert len(means[:, 0].unique()) == components


def test_autoregressive_mixture_learns_three_modes_exactly():
    """One layer with a normal base holds any conditional mixture: the truth, to 0.02 nats."""
    import cnf

    means = torch.tensor([[-3.0, 2.0], [3.0, -2.0], [0.0, 4.0]])
    truth = D.MixtureSameFamily(
        D.Categorical(torch.ones(3)), D.Independent(D.Normal(means, torch.ones(3, 2) * 0.5), 1)
    )
    torch.manual_seed(0)
    layer = Autoregressive(2, MixtureOfGaussians(6), hidden=(32, 32))
    flow = cnf.Flow(None, layer, Standardize((2,)), event_shape=(2,))
    config = cnf.TrainConfig(steps=300, batch_size=512, lr=1e-2, validations=0, progress=False)
    cnf.fit(flow, "maximum-likelihood", truth, config)
    x = truth.sample((4_000,))
    with torch.no_grad():
        gap = (truth.log_prob(x) - flow.log_prob(x)).mean().item()
    assert -0.005 < gap < 0.02
    assert cnf.check(flow).ok


def test_no_components_are_refused():
    with pytest.raises(ValueError, match="components >= 1, got 0"):
        MixtureOfGaussians(0)
