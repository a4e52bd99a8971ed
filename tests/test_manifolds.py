"""Flows on the sphere and the torus."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

import cnf
from cnf.distributions import UniformSphere
from cnf.fields import MLPField, OnSphere, VectorField
from cnf.transforms import Continuous, UnitVectors, WrappedAngles

F64 = torch.float64
TIGHT = cnf.Solver(rtol=1e-9, atol=1e-9)


class Constant(VectorField):
    """The same vector everywhere."""

    def __init__(self, vector):
        super().__init__(len(vector))
        self.vector = torch.nn.Parameter(torch.tensor(vector, dtype=F64))

    def forward(self, t, x, context=None):
        return self.vector.expand_as(x)


def grid(side=40):
    """Unit vectors and weights of area: Gauss-Legendre in z, equal steps of longitude."""
    z, weights = np.polynomial.legendre.leggauss(side)
    longitude = torch.arange(2 * side, dtype=F64) * math.pi / side
    z, longitude = torch.meshgrid(torch.from_numpy(z), longitude, indexing="ij")
    across = (1 - z * z).sqrt()
    x = torch.stack([across * longitude.cos(), across * longitude.sin(), z], -1)
    return x.reshape(-1, 3), torch.from_numpy(weights).repeat_interleave(2 * side) * math.pi / side


def test_flow_of_a_constant_vector_has_closed_form():
    """u = cos of the angle to it: du/dt = κ(1 - u²), so atanh u grows by κ, and p = du0/du/4π."""
    flow = cnf.Flow(
        UniformSphere(3), Continuous(OnSphere(Constant([0.0, 0.0, 1.3])), TIGHT), UnitVectors(3)
    )
    x, weights = grid(12)
    u = x[:, 2]
    start = torch.tanh(torch.atanh(u) - 1.3)
    expected = ((1 - start**2) / (1 - u**2) / (4 * math.pi)).log()
    torch.testing.assert_close(flow.log_prob(x), expected, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(flow.encode(x)[:, 2], start, rtol=1e-7, atol=1e-7)
    assert expected.std() > 0.5


def test_density_integrates_to_one_over_the_sphere(randomized):
    flow = randomized(cnf.models.sphere(hidden=(12, 12), fourier=4, frequencies=1, solver=TIGHT))
    x, weights = grid()
    log_prob = flow.log_prob(x)
    assert abs((log_prob.exp() * weights).sum().item() - 1) < 1e-6
    assert log_prob.std() > 0.1


def test_divergence_is_that_of_intrinsic_coordinates(randomized, generator):
    """(∂_θ(v_θ sin θ) + ∂_φ v_φ)/sin θ, of the velocity's parts along the meridian and across."""
    field = randomized(OnSphere(MLPField(3, (9, 9), fourier=3)))
    angles = torch.tensor([0.6, 0.3], dtype=F64) + torch.rand(
        20, 2, generator=generator, dtype=F64
    )
    t = torch.tensor(0.4, dtype=F64)

    def point(a):
        return torch.stack([a[0].sin() * a[1].cos(), a[0].sin() * a[1].sin(), a[0].cos()])

    def flux(a):
        along = torch.stack([a[0].cos() * a[1].cos(), a[0].cos() * a[1].sin(), -a[0].sin()])
        across = torch.stack([-a[1].sin(), a[1].cos(), torch.zeros_like(a[0])])
        v = field(t, point(a))
        return torch.stack([(v * along).sum() * a[0].sin(), (v * across).sum()])

    for a in angles:
        expected = torch.func.jacrev(flux)(a).trace() / a[0].sin()
        _, div = field.with_divergence(t, point(a))
        torch.testing.assert_close(div, expected)
    assert expected.abs() > 1e-2


def test_length_of_a_point_changes_neither_direction_nor_divergence(randomized, generator):
    field = randomized(OnSphere(MLPField(4, (9,), 2)))
    x, c = (torch.randn(6, n, generator=generator, dtype=F64) for n in (4, 2))
    t = torch.tensor(0.4, dtype=F64)
    v, div = field.with_divergence(t, x, c)
    torch.testing.assert_close(field.with_divergence(t, 3 * x, c), (3 * v, div))
    torch.testing.assert_close(field(t, 3 * x, c), 3 * v)
    torch.testing.assert_close((v * x).sum(-1), torch.zeros(6, dtype=F64), atol=1e-12, rtol=0)


def test_products_of_tangents_are_those_of_autograd(randomized, generator):
    field = randomized(OnSphere(MLPField(4, (9,), 2, fourier=2)))
    tangents = torch.randn(3, 6, 4, generator=generator, dtype=F64)
    x, c = (torch.randn(6, n, generator=generator, dtype=F64) for n in (4, 2))
    t = torch.tensor(0.4, dtype=F64)
    v, products = field.with_tangents(t, x, c, tangents)
    torch.testing.assert_close(v, field(t, x, c))
    for tangent, product in zip(tangents, products, strict=True):
        expected = torch.func.jvp(lambda y: field(t, y, c), (x,), (tangent,))[1]
        torch.testing.assert_close(product, expected)


def test_origin_has_no_nan():
    field = OnSphere(MLPField(3, (4,)))
    x = torch.zeros(1, 3, requires_grad=True)
    v, div = field.with_divergence(torch.tensor(0.5), x)
    (v.sum() + div.sum()).backward()
    assert v.isfinite().all() and div.isfinite().all() and x.grad.isfinite().all()


@pytest.mark.parametrize("dim", [2, 3, 5])
def test_uniform_sphere_is_the_limit_of_scipys(dim, generator):
    base = UniformSphere(dim).double()
    x = base.sample((20_000,), generator)
    torch.testing.assert_close(x.norm(dim=-1), torch.ones(20_000, dtype=F64))
    assert (
        x.mean(0).abs().max() < 0.02
        and (x.T @ x / 20_000 - torch.eye(dim) / dim).abs().max() < 0.02
    )
    expected = stats.vonmises_fisher(np.eye(dim)[0], 1e-9).logpdf(x[:3].numpy())
    torch.testing.assert_close(base.log_prob(x[:3]), torch.from_numpy(expected), atol=1e-6, rtol=0)
    assert base.log_prob(torch.full((1, dim), math.nan)).isnan().all()
    with pytest.raises(ValueError, match="UniformSphere: expected dim >= 2, got 1"):
        UniformSphere(1)


def test_samples_of_a_coarse_solver_have_the_density_of_their_direction(randomized):
    flow = randomized(cnf.models.sphere(hidden=(12, 12), fourier=4))
    x, claimed = flow.with_solver(cnf.Solver("rk4", steps=1)).sample_and_log_prob((200,))
    length = x.norm(dim=-1, keepdim=True)
    log_prob = flow.log_prob(x)
    torch.testing.assert_close(log_prob, flow.log_prob(x / length), rtol=1e-4, atol=1e-4)
    assert (length - 1).abs().max() > 1e-3 and (claimed - log_prob).abs().median() < 0.2


def test_samples_are_on_the_sphere_and_points_off_it_have_no_density(randomized):
    flow = randomized(cnf.models.sphere(4, hidden=(12, 12), fourier=4, context=2)).float()
    context = torch.randn(50, 2)
    x = flow.sample((), context)
    assert (x.norm(dim=-1) - 1).abs().max() < 1e-4  # solver rtol 1e-6
    assert flow.log_prob(x, context).isfinite().all()
    assert (flow.log_prob(1.2 * x, context) == -math.inf).all()


@pytest.mark.parametrize("objective", ["flow-matching", "maximum-likelihood"])
def test_both_objectives_train_the_same_flow(objective, generator):
    """On a von Mises-Fisher density of κ = 5, whose entropy scipy has."""
    law = stats.vonmises_fisher([0.0, 0.6, 0.8], 5.0)
    x = torch.from_numpy(law.rvs(2_000, random_state=np.random.default_rng(0))).float()
    flow = cnf.models.sphere(hidden=(32, 32), fourier=0, solver={"method": "rk4", "steps": 6})
    settings = {"progress": False, "compile": False, "validations": 0, "ema": None}
    steps, size = (300, 256) if objective == "flow-matching" else (40, 200)
    cnf.fit(flow, objective, x, cnf.TrainConfig(steps=steps, batch_size=size, lr=1e-2, **settings))
    test = torch.from_numpy(law.rvs(2_000, random_state=np.random.default_rng(1))).float()
    gap = torch.from_numpy(law.logpdf(test.numpy())) - flow.log_prob(test).detach()
    assert gap.mean() < 0.1 < math.log(4 * math.pi) - law.entropy()  # that of the start


def test_density_on_the_torus_is_periodic_and_integrates_to_one(randomized):
    flow = randomized(
        cnf.models.torus(2, hidden=(12, 12), fourier=2, frequencies=1, period=3.0, solver=TIGHT)
    )
    line = torch.arange(120, dtype=F64) * 3.0 / 120
    x = torch.cartesian_prod(line, line)
    log_prob = flow.log_prob(x)
    assert abs(log_prob.exp().sum().item() * (3.0 / 120) ** 2 - 1) < 1e-6
    torch.testing.assert_close(flow.log_prob(x - 6.0), log_prob)
    assert log_prob.std() > 0.1 and flow.sample(100).abs().max() <= 1.5


def test_one_model_is_refused_what_the_other_is_for():
    with pytest.raises(
        ValueError, match=r"sphere: expected ambient .* >= 3, got 2; a circle is cnf"
    ):
        cnf.models.sphere(2)
    with pytest.raises(
        ValueError, match="torus: expected angles to be a whole number >= 1, got 0"
    ):
        cnf.models.torus(0)
    with pytest.raises(ValueError, match="period > 0"):
        cnf.models.torus(1, period=0.0)
    with pytest.raises(ValueError, match="skip=True is not periodic"):
        MLPField(2, (4,), skip=True, period=1.0)
    with pytest.raises(ValueError, match="WrappedAngles: expected period > 0"):
        WrappedAngles(2, -1.0)
    with pytest.raises(ValueError, match="OnSphere: expected a field of vectors of 2 numbers"):
        OnSphere(MLPField(1, (4,)))


@pytest.mark.parametrize(
    "flow", [cnf.models.sphere(hidden=(8,)), cnf.models.torus(2, hidden=(8,))]
)
def test_checks_pass_and_the_flow_is_loaded_again(flow, tmp_path):
    assert cnf.check(flow, n=16).ok
    x = flow.sample(4)
    again = cnf.load(cnf.save(flow, tmp_path / "flow.safetensors"))
    assert torch.equal(again.log_prob(x), flow.log_prob(x))


def test_circular_path_is_refused_for_a_field_that_is_not_periodic():
    flow, config = cnf.models.cnf(2, hidden=(8,)), cnf.TrainConfig(steps=1, progress=False)
    with pytest.raises(ValueError, match="made for Circular.*cnf.models.torus"):
        cnf.fit(flow, cnf.FlowMatching(path="circular"), torch.rand(200, 2), config)


def test_discrete_steps_that_leave_the_sphere_are_refused():
    flow = cnf.models.sphere(hidden=(8, 8)).with_solver(cnf.Solver("rk4", steps=2, discrete=True))
    x = torch.eye(3)
    for call in (flow.log_prob, flow.encode, flow.decode):
        with pytest.raises(TypeError, match="leave the sphere"):
            call(x)


def test_held_out_rows_off_the_sphere_are_refused_and_have_a_density_of_zero():
    flow, config = cnf.models.sphere(hidden=(8,)), cnf.TrainConfig(steps=1, progress=False)
    x = flow.base.sample((12,), torch.Generator().manual_seed(0))
    far = x.clone()
    far[1] *= 2
    with pytest.raises(ValueError, match="held-out rows to be vectors of length 1, got 1 of 12"):
        cnf.fit(flow, cnf.FlowMatching(), x, config, validation=far)
    log_prob = flow.log_prob(far)
    assert log_prob[1] == -math.inf
    assert torch.allclose(log_prob[[0, 2]], flow.log_prob(x)[[0, 2]])


def test_vectors_of_nan_are_no_unit_vectors():
    with pytest.raises(ValueError, match="4 of 4"):
        UnitVectors(3).fit(torch.full((4, 3), torch.nan))


def test_angles_in_degrees_are_told():
    degrees = 360 * torch.rand(100, 1, generator=torch.Generator().manual_seed(0))
    with pytest.warns(UserWarning, match="more than 4 periods of 6.283; give degrees as radians"):
        WrappedAngles(1).fit(degrees)
    WrappedAngles(1).fit(degrees.deg2rad())
