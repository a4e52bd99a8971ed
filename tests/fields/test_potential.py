"""The potential field: velocity, time derivative and Laplacian against autograd."""

import math

import pytest
import torch

from cnf.fields import FIELDS, HasDivergence, PotentialField
from cnf.fields.potential import _log_two_cosh

F64 = torch.float64


@pytest.fixture
def build(randomized):
    return lambda *args, **options: randomized(PotentialField(*args, **options))


@pytest.mark.parametrize("layers", [1, 2, 3, 4])
@pytest.mark.parametrize("dim", [1, 2, 5])
@pytest.mark.parametrize("context_dim", [0, 3])
@pytest.mark.parametrize("own_time", [False, True])
def test_velocity_and_time_derivative_are_the_potentials_gradient(
    layers, dim, context_dim, own_time, build, points
):
    field = build(dim, 7, layers, context_dim)
    t, x, context = points(field, (2, 3), own_time)
    t = t.expand(2, 3).clone().requires_grad_()
    potential = field.potential(t, x.requires_grad_(), context)
    assert potential.shape == (2, 3)
    velocity, slope = torch.autograd.grad(potential.sum(), (x, t))
    ours = field(t, x, context), field.time_derivative(t, x, context)
    torch.testing.assert_close(ours, (velocity, slope), rtol=1e-11, atol=1e-11)
    assert slope.abs().min() > 1e-3


@pytest.mark.parametrize("layers", [1, 2, 3, 4])
@pytest.mark.parametrize("dim", [1, 2, 5, 8])
@pytest.mark.parametrize("context_dim", [0, 3])
@pytest.mark.parametrize("own_time", [False, True])
def test_divergence_is_the_trace_of_the_jacobian(
    layers, dim, context_dim, own_time, build, assert_divergence
):
    assert_divergence(build(dim, 7, layers, context_dim), own_time=own_time)


@pytest.mark.parametrize("rank", [None, 0, 1, 6])
def test_divergence_is_correct_for_every_rank(rank, build, assert_divergence):
    field = build(3, 5, rank=rank)
    assert field.quadratic.shape == (4 if rank is None else rank, 4)
    assert_divergence(field)


def test_divergence_is_the_laplacian_of_the_potential(build, points):
    field = build(3, 6, 3)
    t, x, _ = points(field)
    for row, div in zip(x, field.with_divergence(t, x)[1], strict=True):
        hessian = torch.autograd.functional.hessian(lambda y: field.potential(t, y), row)
        torch.testing.assert_close(div, hessian.trace(), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("layers", [1, 2, 3, 4])
def test_gradients_of_the_divergence_equal_autograds(layers, build, assert_gradients):
    assert_gradients(build(2, 5, layers, context_dim=2))


def fill(field, **values):
    names = [name for name, _ in field.named_parameters()]
    assert set(values) <= {name.replace(".", "_") for name in names}
    with torch.no_grad():
        for name, parameter in field.named_parameters():
            parameter.copy_(torch.tensor(values.get(name.replace(".", "_"), 0.0)))


def test_one_unit_has_closed_form():
    # φ = 3 log 2cosh(2x + 5t + 0.5) + ½(4x + t)² + 7x + 11t
    field = PotentialField(1, 1, layers=1, rank=1).double()
    fill(
        field,
        first_weight=[[2.0, 5.0]],
        first_bias=[0.5],
        weight=[3.0],
        quadratic=[[4.0, 1.0]],
        linear=[7.0, 11.0],
    )
    t, x = torch.tensor(0.1, dtype=F64), torch.tensor([[-0.3]], dtype=F64)
    a, b = 0.4, -1.1
    potential = 3 * math.log(2 * math.cosh(a)) + b * b / 2 - 7 * 0.3 + 1.1
    assert field.potential(t, x).item() == pytest.approx(potential, rel=1e-12)
    v, div = field.with_divergence(t, x)
    assert v.item() == pytest.approx(6 * math.tanh(a) + 4 * b + 7, rel=1e-12)
    assert div.item() == pytest.approx(12 / math.cosh(a) ** 2 + 16, rel=1e-12)
    slope = field.time_derivative(t, x).item()
    assert slope == pytest.approx(15 * math.tanh(a) + b + 11, rel=1e-12)


def test_divergence_of_the_quadratic_term_has_closed_form(build, points):
    field = build(3, 4)
    torch.nn.init.zeros_(field.weight)
    t, x, _ = points(field)
    div = field.with_divergence(t, x)[1]
    expected = field.quadratic[:, :3].square().sum()
    torch.testing.assert_close(div, expected.expand(4), rtol=1e-12, atol=1e-12)
    assert expected > 0.1


def test_velocity_has_no_rotation(build, points):
    field = build(4, 6, 3)
    t, x, _ = points(field, ())
    jacobian = torch.func.jacrev(lambda y: field(t, y))(x)
    torch.testing.assert_close(jacobian, jacobian.T, rtol=1e-12, atol=1e-12)
    assert jacobian.triu(1).abs().max() > 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_log_two_cosh_is_exact_at_all_scales(dtype):
    a = torch.tensor([0.0, 1e-3, 0.7, 5.0, 9.99, 10.01, 15.0, 19.0, 21.0, 50.0, 1e4, 1e30])
    a = torch.cat([-a, a]).to(dtype).requires_grad_()
    value = _log_two_cosh(a)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(value, torch.logaddexp(a, -a), rtol=4 * eps, atol=0)
    (slope,) = torch.autograd.grad(value.sum(), a, create_graph=True)
    torch.testing.assert_close(slope, a.tanh(), rtol=0, atol=2 * eps)
    (curvature,) = torch.autograd.grad(slope.sum(), a)
    torch.testing.assert_close(curvature, 1 - a.tanh().square(), rtol=0, atol=4 * eps)
    assert curvature[0] == 1


@pytest.mark.parametrize("scale", [1e4, 1e8])
def test_field_in_float32_equals_its_asymptote_far_out(scale, build, points):
    field = build(3, 5, 3)
    t, x, _ = points(field)
    expected = field.with_divergence(t, scale * x)
    ours = field.float().with_divergence(t.float(), scale * x.float())
    torch.testing.assert_close(ours[0].double() / scale, expected[0] / scale, rtol=0, atol=1e-5)
    torch.testing.assert_close(ours[1].double(), expected[1], rtol=1e-5, atol=1e-5)
    assert field.potential(t.float(), scale * x.float()).isfinite().all()


def test_potential_field_is_registered_with_closed_form_divergence():
    assert FIELDS["potential"] is PotentialField
    assert isinstance(PotentialField(2), HasDivergence)


@pytest.mark.parametrize("options", [{"width": 0}, {"layers": 0}])
def test_widths_and_numbers_of_layers_below_one_are_refused(options):
    with pytest.raises(ValueError, match="PotentialField: expected width and layers >= 1, got"):
        PotentialField(2, **options)
