"""Preprocessing that is fitted to data: its maps, what it makes of data, and what it refuses."""

import copy
import math

import pytest
import torch

import cnf
from cnf import Flow
from cnf.transforms.preprocessing import (
    PREPROCESSING,
    Preprocessing,
    RadialGaussianization,
    Whiten,
    logit,
)

F64 = torch.float64
FITTED = {"whiten": Whiten, "radial": RadialGaussianization}
SHAPES = [(1,), (4,), (2, 3, 2)]


def heavy_tails(n=4_000, shape=(4,), seed=0):
    """A multivariate t of 3 degrees of freedom, with correlations and a mean."""
    draw = torch.Generator().manual_seed(seed)
    dim = math.prod(shape)
    normal = torch.randn(n, dim, generator=draw, dtype=F64)
    chi2 = torch.randn(n, 3, generator=draw, dtype=F64).square().sum(1, keepdim=True)
    mixer = torch.eye(dim, dtype=F64) + 0.3 * torch.randn(dim, dim, generator=draw, dtype=F64)
    x = normal * (3 / chi2).sqrt() @ mixer.T + 5
    return x.reshape(n, *shape)


@pytest.mark.parametrize("name", FITTED)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_log_determinants_are_autograds_and_round_trips_close(name, shape):
    part, data = FITTED[name](shape), heavy_tails(shape=shape) - 5 * (name == "radial")
    part.fit(data)
    far = torch.tensor([0.001, 0.1, 1.0, 5.0, 40.0, 1e4], dtype=F64)
    x = data[:6] * far.reshape(-1, *[1] * len(shape))
    z, ladj = part.inverse(x)
    again, back = part(z)
    torch.testing.assert_close(again, x, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(back, -ladj, rtol=0, atol=1e-9)
    for row, expected in zip(x, ladj, strict=True):
        jacobian = torch.func.jacrev(lambda y: part.inverse(y[None])[0][0])(row)
        size = math.prod(shape)
        found = torch.linalg.slogdet(jacobian.reshape(size, size)).logabsdet
        assert found.item() == pytest.approx(expected.item(), abs=1e-8)


def test_whitened_data_have_the_unit_covariance_and_keep_the_order():
    x = heavy_tails()
    part = Whiten(4)
    part.fit(x)
    z, _ = part.inverse(x)
    torch.testing.assert_close(torch.cov(z.T), torch.eye(4, dtype=F64), rtol=0, atol=1e-10)
    assert z.mean(0).abs().max() < 1e-10
    jacobian = torch.func.jacrev(lambda y: part.inverse(y)[0])(x[0])
    assert torch.equal(jacobian, jacobian.tril()) and (jacobian.diagonal() > 0).all()


def test_radial_makes_the_lengths_of_held_out_rows_those_of_a_normal():
    """The probability integral transform of their squares is uniform (Kolmogorov and Smirnov)."""
    from scipy.stats import chi2, kstest

    whiten, radial = Whiten(4), RadialGaussianization(4)
    x, held_out = heavy_tails(23_000).split([20_000, 3_000])
    whiten.fit(x)
    radial.fit(whiten.inverse(x)[0])
    y, _ = whiten.inverse(held_out)
    squares = {"before": y, "after": radial.inverse(y)[0]}
    found = {k: kstest(z.square().sum(1).numpy(), chi2(4).cdf).pvalue for k, z in squares.items()}
    assert found["before"] < 1e-9 and found["after"] > 0.01


def test_radial_flow_has_the_density_of_a_multivariate_t():
    """Nothing trained: its NLL is within 0.02 nats of the truth, a normal's is 0.3 off."""
    t = torch.distributions.StudentT(torch.tensor(3.0, dtype=F64))
    draw = torch.Generator().manual_seed(2)

    def drawn(n):
        normal = torch.randn(n, 3, generator=draw, dtype=F64)
        chi2 = torch.randn(n, 3, generator=draw, dtype=F64).square().sum(1, keepdim=True)
        return normal * (3 / chi2).sqrt()

    def log_t(x):  # multivariate t, 3 degrees of freedom, unit scale
        const = math.lgamma(3.0) - math.lgamma(1.5) - 1.5 * math.log(3 * math.pi)
        return const - 3.0 * (x.square().sum(1) / 3).log1p()

    one = torch.linspace(-3, 3, 5, dtype=F64)[:, None]
    marginal = math.lgamma(2.0) - math.lgamma(1.5) - 0.5 * math.log(3 * math.pi)
    torch.testing.assert_close(  # the formula's kind, in one dimension, against torch's
        marginal - 2.0 * (one.square().sum(1) / 3).log1p(), t.log_prob(one[:, 0])
    )
    radial, held_out = RadialGaussianization(3), drawn(10_000)
    radial.fit(drawn(50_000))
    flow = Flow(None, radial, event_shape=(3,)).double()
    gap = (log_t(held_out) - flow.log_prob(held_out)).mean().item()
    assert -0.005 < gap < 0.02


@pytest.mark.parametrize("name", FITTED)
def test_identity_until_fitted_then_fixed_saved_and_float64(name, tmp_path):
    part, x = FITTED[name](4), heavy_tails()
    z, ladj = part.inverse(x[:5])
    torch.testing.assert_close(z, x[:5], rtol=1e-12, atol=1e-12)
    assert ladj.abs().max() < 1e-6
    part.fit(x)
    first = part.inverse(x[:5])[0]
    part.fit(3 * x)
    assert torch.equal(part.inverse(x[:5])[0], first)
    half = copy.deepcopy(part).half().float()
    assert torch.equal(half.inverse(x[:5])[0], first)
    single = half.inverse(x[:5].float())
    assert single[0].dtype == single[1].dtype == torch.float32
    again = FITTED[name](4)
    again.load_state_dict(part.state_dict())
    assert torch.equal(again.inverse(x[:5])[0], first) and again.dtype == F64


@pytest.mark.parametrize("name", FITTED)
def test_zero_infinity_and_gradients(name):
    part = FITTED[name](4)
    part.fit(heavy_tails() - 5)
    x = torch.stack([torch.zeros(4), torch.full((4,), 1e12)]).double().requires_grad_()
    z, ladj = part.inverse(x)
    (z.sum() + ladj.sum()).backward()
    assert z.isfinite().all() and ladj.isfinite().all() and x.grad.isfinite().all()


def test_logit_takes_pixels_to_the_line_and_counts_the_levels():
    part = logit((1, 2, 2), alpha=0.05, levels=256)
    x = torch.tensor([0.0, 1.0, 128.0, 256.0], dtype=F64).reshape(1, 1, 2, 2)
    z, ladj = part.inverse(x)
    unit = 0.05 + 0.9 * x / 256
    torch.testing.assert_close(z, unit.logit())
    slopes = 0.9 / 256 / (unit * (1 - unit))
    torch.testing.assert_close(ladj, slopes.log().sum((1, 2, 3)))


BAD = {
    "a constant column": ("whiten", lambda x: torch.cat([x[:, :3], 0 * x[:, :1]], 1), "columns 3"),
    "a copied column": ("whiten", lambda x: x[:, [0, 1, 1, 2]], "columns 2"),
    "few rows": ("whiten", lambda x: x[:4], "more rows than the 4 numbers"),
    "few lengths": ("radial", lambda x: x[:100], "320 rows or more"),
    "one length": ("radial", lambda x: x / x.norm(dim=1, keepdim=True), "different lengths"),
}


@pytest.mark.parametrize("kind", BAD)
def test_data_without_such_a_map_are_refused(kind):
    name, spoil, words = BAD[kind]
    with pytest.raises(ValueError, match=words):
        FITTED[name](4).fit(spoil(heavy_tails()))


def test_alpha_out_of_range_is_refused():
    with pytest.raises(ValueError, match=r"0 <= alpha < 1/2, got 0\.5"):
        logit(2, alpha=0.5)


def test_every_fitted_preprocessing_is_registered():
    assert set(FITTED) < set(PREPROCESSING)
    assert {part for part in PREPROCESSING.values() if isinstance(part, type)} >= set(
        FITTED.values()
    )
    assert issubclass(Whiten, Preprocessing)
    assert isinstance(cnf.transforms.TRANSFORMS.examples["whiten"](3), Whiten)


def test_near_zero_the_radial_map_is_linear():
    """Else the density there would be zero or infinite."""
    part, data = RadialGaussianization(4), heavy_tails() - 5
    part.fit(data)
    x = 1e-6 * data[:3]
    (z, ladj), (twice, also) = part.inverse(x), part.inverse(2 * x)
    torch.testing.assert_close(twice, 2 * z, rtol=1e-9, atol=0)
    torch.testing.assert_close(also, ladj, rtol=1e-9, atol=0)
