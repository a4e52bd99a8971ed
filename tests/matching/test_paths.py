"""Probability paths: velocities, ends, schedules and noise."""

import math
from dataclasses import replace

import pytest
import torch

from cnf.matching import PATHS, Linear
from cnf.matching.paths import (
    Bridge,
    Cosine,
    Interpolant,
    Path,
    Polynomial,
    VariancePreserving,
)

F64 = torch.float64
AFFINE = [name for name in PATHS if PATHS[name].affine]  # others: test_geodesics.py
CASES = {name: PATHS[name]() for name in AFFINE} | {
    "linear, σ = 0.1": Linear(0.1),
    "linear, noise": Linear(noise=0.3),
    "polynomial, 1.5": Polynomial(1.5),
    "bridge, σ = 2": Bridge(2.0),
}
NOISY = ("linear, noise", "interpolant", "bridge", "bridge, σ = 2")
DIFFUSIONS = ("trigonometric", "vp", "cosine")


@pytest.fixture(params=[(5, 2), (4, 1, 3, 3)], ids=str)
def ends(request, generator):
    """x0, x1 and noise."""
    shape = request.param
    return [torch.randn(shape, generator=generator, dtype=F64) for _ in range(3)]


def times(count, generator):
    return 0.05 + 0.9 * torch.rand(count, generator=generator, dtype=F64)


@pytest.mark.parametrize("name", CASES)
def test_velocity_is_time_derivative_of_path(name, ends, generator):
    path, (x0, x1, z) = CASES[name], ends
    t = times(len(x0), generator)
    sample = path.sample(x0, x1, t, z)
    _, derivative = torch.func.jvp(
        lambda s: path.sample(x0, x1, s, z).xt, (t,), (torch.ones_like(t),)
    )
    torch.testing.assert_close(sample.ut, derivative, rtol=1e-10, atol=1e-10)
    assert torch.equal(sample.t, t) and sample.xt.shape == sample.ut.shape == x0.shape
    assert derivative.abs().max() > 0.1 and sample.xt.dtype == F64


@pytest.mark.parametrize("name", CASES)
def test_path_runs_from_x0_to_x1_up_to_its_margin(name, ends):
    path, (x0, x1, z) = CASES[name], ends
    path = Linear() if name.startswith("linear,") else path
    left = {"vp": 0.007, "cosine": 0.005, "bridge": 0.04, "bridge, σ = 2": 0.07}.get(name, 1e-12)
    for target, t in ((x0, 0.0), (x1, 1.0)):
        sample = path.sample(x0, x1, torch.full((len(x0),), t, dtype=F64), z)
        rest = left * (x0.abs() + x1.abs() + z.abs() + 1e-3)
        assert ((sample.xt - target).abs() <= rest).all()
        assert sample.ut.isfinite().all()


@pytest.mark.parametrize("name", CASES)
def test_each_row_has_its_own_time(name, ends):
    path, (x0, x1, z) = CASES[name], ends
    t = torch.linspace(0.1, 0.9, len(x0), dtype=F64)
    whole = path.sample(x0, x1, t, z)
    for k in range(len(x0)):
        one = path.sample(*(value[k : k + 1] for value in (x0, x1, t, z)))
        torch.testing.assert_close(whole.xt[k], one.xt[0])
        torch.testing.assert_close(whole.ut[k], one.ut[0])


@pytest.mark.parametrize("name", CASES)
def test_noise_changes_noisy_paths_only(name, ends):
    path, (x0, x1, z) = CASES[name], ends
    t = torch.full((len(x0),), 0.3, dtype=F64)
    one, other = path.sample(x0, x1, t, z), path.sample(x0, x1, t, -z)
    assert path.noisy == (name in NOISY) == (not torch.equal(one.xt, other.xt))


def test_linear_path_by_hand():
    x0, x1 = torch.tensor([[1.0, -2.0]], dtype=F64), torch.tensor([[5.0, 2.0]], dtype=F64)
    t = torch.tensor([0.25], dtype=F64)
    _, xt, ut = Linear().sample(x0, x1, t)
    assert xt.tolist() == [[2.0, -1.0]] and ut.tolist() == [[4.0, 4.0]]
    _, xt, ut = Linear(0.5).sample(x0, x1, t)
    assert xt.tolist() == [[2.125, -1.25]] and ut.tolist() == [[4.5, 3.0]]
    _, xt, ut = Linear(noise=0.5).sample(x0, x1, t, torch.ones(1, 2, dtype=F64))
    assert xt.tolist() == [[2.5, -0.5]] and ut.tolist() == [[4.0, 4.0]]


def test_linear_path_ends_at_x1_plus_sigma_times_x0(ends):
    x0, x1, _ = ends
    xt = Linear(0.1).sample(x0, x1, torch.ones(len(x0), dtype=F64)).xt
    torch.testing.assert_close(xt, x1 + 0.1 * x0)


@pytest.mark.parametrize("path", [Linear(), Linear(0.2), Linear(0.2, noise=0.3)])
def test_sample_of_the_linear_path_agrees_with_its_schedule(path, ends, generator):
    x0, x1, z = ends
    t = times(len(x0), generator)
    short, long = path.sample(x0, x1, t.float(), z), Path.sample(path, x0, x1, t.float(), z)
    torch.testing.assert_close(short.xt, long.xt)
    torch.testing.assert_close(short.ut, long.ut)


@pytest.mark.parametrize("name", DIFFUSIONS)
def test_diffusion_paths_preserve_the_variance(name, generator):
    at = CASES[name].schedule(times(50, generator))
    torch.testing.assert_close(at.alpha**2 + at.sigma**2, torch.ones(50, dtype=F64))


def test_vp_path_solves_its_diffusion(generator):
    """dα/ds = -½β(s)α, of which α is the solution that starts at 1: by quadrature of β."""
    s = torch.linspace(0, 1, 20_001, dtype=F64)
    beta = 0.1 + s * 19.9
    integral = torch.cumulative_trapezoid(beta, s)
    at = VariancePreserving().schedule(1 - s[1:])
    torch.testing.assert_close(at.alpha, torch.exp(-0.5 * integral), rtol=1e-9, atol=0)
    assert at.alpha[-1].item() == pytest.approx(math.exp(-0.25 * 19.9 - 0.05))


def test_vp_path_has_the_given_betas():
    """At s = 1: α = exp(-½∫β) with ∫β = (β_min + β_max)/2, and dα/dt = ½β_max α."""
    at = VariancePreserving(beta_min=0.5, beta_max=5.0).schedule(torch.zeros(1, dtype=F64))
    assert at.alpha.item() == pytest.approx(math.exp(-0.25 * 5.5))
    assert at[2].item() == pytest.approx(0.5 * 5.0 * math.exp(-0.25 * 5.5))


def test_cosine_schedule_equals_that_of_the_paper():
    s = torch.linspace(0.001, 0.999, 50, dtype=F64)

    def f(s):
        return torch.cos((s + 0.008) / 1.008 * math.pi / 2) ** 2

    torch.testing.assert_close(Cosine().schedule(1 - s).alpha ** 2, f(s) / f(torch.zeros(())))


def test_bridge_has_the_covariance_of_a_brownian_bridge(generator):
    t = torch.tensor([0.1, 0.5, 0.8], dtype=F64)
    gamma = Bridge(2.0).schedule(t).gamma
    torch.testing.assert_close(gamma**2, 4.0 * t * (1 - t))


def test_noise_of_a_path_adds_to_the_variance_of_a_normal_source(generator):
    path, t = Interpolant(0.7), torch.tensor([0.2, 0.6], dtype=F64)
    at, joint = path.schedule(t), path.schedule(t).gaussian()
    torch.testing.assert_close(joint.sigma**2, at.sigma**2 + at.gamma**2)
    _, slope = torch.func.jvp(
        lambda s: path.schedule(s).gaussian().sigma, (t,), (torch.ones_like(t),)
    )
    torch.testing.assert_close(joint.d_sigma, slope)
    plain = Linear().schedule(t)
    assert joint.gamma == 0.0 and plain.gaussian() is plain


def test_noise_is_drawn_if_none_is_given():
    x = torch.zeros(20_000, 1)
    t = torch.full((20_000,), 0.5)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        assert abs(Bridge(2.0).sample(x, x, t).xt.std().item() - 1.0) < 0.02


def test_path_is_built_from_a_name_and_fields():
    assert PATHS.build("bridge") == Bridge() and PATHS.build(Linear(0.2)) == Linear(0.2)
    assert PATHS.build({"name": "bridge", "sigma": 0.5}) == replace(Bridge(), sigma=0.5)
    with pytest.raises(ValueError, match="unknown path 'bridges'.*Did you mean 'bridge'"):
        PATHS.build("bridges")


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Linear(1.0), "0 <= sigma_min < 1"),
        (lambda: Linear(noise=-1.0), "noise >= 0"),
        (lambda: Polynomial(0.5), "degree >= 1"),
        (lambda: Bridge(0.0), "Bridge: expected sigma"),
        (lambda: Interpolant(-1.0), "Interpolant: expected amplitude"),
        (lambda: VariancePreserving(beta_min=0.0), "expected beta_min"),
        (lambda: Cosine(0.0), "Cosine: expected offset"),
    ],
)
def test_settings_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
