"""Paths on the sphere and the torus."""

import math

import pytest
import torch

import cnf
from cnf.fields import MLPField, OnSphere, Predicts
from cnf.matching import Circular, Geodesic

F64 = torch.float64


def units(generator, *shape):
    return torch.nn.functional.normalize(
        torch.randn(*shape, generator=generator, dtype=F64), dim=-1
    )


@pytest.fixture(params=["geodesic", "circular"])
def case(request, generator):
    """A path, its ends and times."""
    t = 0.05 + 0.9 * torch.rand(50, generator=generator, dtype=F64)
    if request.param == "geodesic":
        return Geodesic(), units(generator, 50, 4), units(generator, 50, 4), t
    ends = 6 * torch.randn(2, 50, 3, generator=generator, dtype=F64)
    return Circular(2.5), *ends, t


def test_velocity_is_time_derivative_of_path(case):
    path, x0, x1, t = case
    sample = path.sample(x0, x1, t)
    derivative = torch.func.jvp(lambda s: path.sample(x0, x1, s).xt, (t,), (torch.ones_like(t),))[
        1
    ]
    torch.testing.assert_close(sample.ut, derivative, rtol=1e-10, atol=1e-10)
    assert torch.equal(sample.t, t) and derivative.abs().max() > 0.1


def test_geodesic_is_spherical_interpolation(generator):
    """sin((1 - t)θ)/sin θ · x0 + sin(tθ)/sin θ · x1, of Shoemake (1985)."""
    x0, x1 = units(generator, 50, 3), units(generator, 50, 3)
    t = torch.rand(50, generator=generator, dtype=F64)
    _, xt, ut = Geodesic().sample(x0, x1, t)
    angle = (x0 * x1).sum(-1).acos()
    a, b = (((s * angle).sin() / angle.sin())[:, None] for s in (1 - t, t))
    torch.testing.assert_close(xt, a * x0 + b * x1)
    torch.testing.assert_close(ut.norm(dim=-1), angle)
    torch.testing.assert_close((xt * ut).sum(-1), torch.zeros_like(t), atol=1e-12, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("offset", [0.0, 1e-12, 1e-6, 1e-3])
def test_path_between_near_equal_or_antipodal_points_stays_on_the_sphere(offset, dtype, generator):
    x0 = units(generator, 20, 3).to(dtype)
    moved = torch.nn.functional.normalize(x0 + offset * units(generator, 20, 3).to(dtype), dim=-1)
    for x1, angle in ((moved, 0.0), (-moved, math.pi)):
        for t in (0.0, 0.5, 1.0):
            _, xt, ut = Geodesic().sample(x0, x1, torch.full((20,), t, dtype=dtype))
            close = 0.02 if dtype == torch.float32 else 1e-4  # where rounding has a direction
            assert (xt.norm(dim=-1) - 1).abs().max() < close
            assert (ut.norm(dim=-1) - angle).abs().max() < 2 * offset + close
        assert (xt - x1).norm(dim=-1).max() < 1e-5 if dtype == F64 else 1e-2


def test_circular_path_goes_the_shorter_way_around():
    x0, x1 = torch.tensor([[3.0, 1.0]]), torch.tensor([[-3.0, 2.0]])
    _, xt, ut = Circular().sample(x0, x1, torch.ones(1))
    torch.testing.assert_close(ut, torch.tensor([[2 * math.pi - 6.0, 1.0]]))
    torch.testing.assert_close(xt, x1 + torch.tensor([[2 * math.pi, 0.0]]))


@pytest.mark.parametrize("path", [Geodesic(), Circular()])
def test_paths_without_a_schedule_say_so(path):
    with pytest.raises(TypeError, match=f"{type(path).__name__}: .* train the velocity itself"):
        path.schedule(torch.zeros(1))
    field = Predicts(MLPField(3, (4,)), path=path)
    with pytest.raises(TypeError, match="depend on its ends"):
        field(torch.tensor(0.5), torch.ones(1, 3))


def test_fields_on_a_sphere_or_torus_have_their_path(generator):
    x = units(generator, 64, 3).float()
    quick = cnf.TrainConfig(steps=1, progress=False, compile=False, validations=0)
    flow = cnf.models.sphere(hidden=(4,))
    assert flow.field.path == Geodesic()
    cnf.fit(flow, cnf.FlowMatching(path="geodesic"), x, quick)
    cnf.fit(cnf.models.sphere(hidden=(4,)), cnf.FlowMatching(coupling="minibatch-ot"), x, quick)
    with pytest.raises(ValueError, match=r"the field was made for Geodesic\(\), got path=Linear"):
        cnf.fit(flow, cnf.FlowMatching(path="linear"), x, quick)
    with pytest.raises(ValueError, match=r"made for Circular\(period=2.0\), got path=Circular"):
        cnf.FlowMatching(path="circular").begin(
            cnf.models.torus(2, period=2.0), lambda n: None, generator
        )


def test_ends_off_the_sphere_are_refused(generator):
    x = torch.randn(64, 3, generator=generator)
    quick = cnf.TrainConfig(steps=1, progress=False, compile=False, validations=0)
    with pytest.raises(ValueError, match="expected base samples of length 1 for a path on the"):
        cnf.fit(cnf.models.cnf(3, hidden=(4,)), cnf.FlowMatching(path="geodesic"), x, quick)
    transform = cnf.transforms.Continuous(OnSphere(MLPField(3, (4,))))
    flow = cnf.Flow(cnf.distributions.UniformSphere(3), transform)
    with pytest.raises(ValueError, match="expected data of length 1 for a path on the sphere"):
        cnf.fit(flow, cnf.FlowMatching(), x, quick)
    with pytest.raises(ValueError, match=r"UnitVectors.fit: .* got 58 of 58 rows of other length"):
        cnf.fit(cnf.models.sphere(hidden=(4,)), cnf.MaximumLikelihood(), x)
    with pytest.raises(ValueError, match="Circular: expected period > 0"):
        Circular(0.0)
