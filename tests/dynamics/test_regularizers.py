"""Kinetic energy, Jacobian norm and the Hamilton-Jacobi-Bellman residual, in closed form."""

import itertools

import pytest
import torch
from torch import nn

from cnf.dynamics import REGULARIZERS, Hutchinson, Solver, record
from cnf.dynamics.regularizers import Point
from cnf.fields import Adapter, ConvField, MLPField, PotentialField, VectorField
from cnf.transforms import Continuous

F64 = torch.float64
A = torch.tensor([[0.3, -1.2], [0.9, 0.5]], dtype=F64)
NOW = torch.tensor(0.3, dtype=F64)


class Linear(VectorField):
    """v = Ax, counted."""

    def __init__(self):
        super().__init__((2,))
        self.matrix, self.calls = nn.Parameter(A.clone()), 0

    def forward(self, t, x, context=None):
        self.calls += 1
        return x @ self.matrix.T


def at(field, x, context=None, products=None):
    return Point(field, NOW, x, context, field(NOW, x, context), products)


def test_kinetic_energy_of_a_linear_flow_is_the_integral_of_its_speed(generator):
    # ‖A e^{At} z‖², by Gauss-Legendre of the matrix exponential
    z = torch.randn(5, 2, generator=generator, dtype=F64)
    solver = Solver(rtol=1e-10, atol=1e-10)
    solved = Continuous(Linear(), solver).integrate(
        z, towards="data", integrands=[REGULARIZERS["kinetic"]]
    )
    nodes = torch.linspace(0, 1, 2001, dtype=F64)
    speed = torch.stack([(z @ (A @ torch.matrix_exp(A * t)).T).square().sum(-1) for t in nodes])
    expected = torch.trapezoid(speed, nodes, dim=0)
    torch.testing.assert_close(solved.integrals[0], expected, rtol=1e-6, atol=0)  # trapezoid


@pytest.mark.parametrize("towards", ["data", "base"])
def test_jacobian_norm_of_a_linear_flow_is_the_frobenius_norm(towards, generator):
    x = torch.randn(5, 2, generator=generator, dtype=F64)
    solved = Continuous(Linear()).integrate(
        x, towards=towards, integrands=[REGULARIZERS["jacobian"]]
    )
    expected = A.square().sum().expand(5)
    torch.testing.assert_close(solved.integrals[0], expected, rtol=0, atol=1e-12)


def test_jacobian_norm_from_probes_is_exact_in_the_mean_over_all_signs(generator):
    x = torch.randn(5, 2, generator=generator, dtype=F64)
    signs = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=2)), dtype=F64)
    probe = signs.unsqueeze(1).expand(4, 5, 2)
    forms = (signs @ A).square().sum(-1)  # ‖εᵀA‖²
    for chosen, expected in ((probe, A.square().sum()), (probe[:1], forms[0])):
        solved = Continuous(Linear()).integrate(
            x, towards="base", divergence=Hutchinson(probe=chosen),
            integrands=[REGULARIZERS["jacobian"]],
        )  # fmt: skip
        torch.testing.assert_close(solved.integrals[0], expected.expand(5), rtol=0, atol=1e-12)
    assert (forms - A.square().sum()).abs().min() > 0.1


def test_jacobian_norm_reuses_products_of_an_estimated_divergence_only(generator, monkeypatch):
    field, calls = Linear(), []
    grad = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: calls.append(1) or grad(*a, **k))
    x = torch.randn(5, 2, generator=generator, dtype=F64)
    transform = Continuous(field, Solver("rk4", steps=2))
    both = [REGULARIZERS["kinetic"], REGULARIZERS["jacobian"]]
    with record() as stats:
        transform.integrate(x, towards="base", divergence=Hutchinson(3), integrands=both)
    assert (field.calls, len(calls), stats.forward) == (8, 24, 8)  # one field, three products
    field.calls = 0
    sketched = Hutchinson(3, sketch=1)  # whose products are along other directions
    solved = transform.integrate(x, towards="base", divergence=sketched, integrands=both)
    torch.testing.assert_close(solved.integrals[1], A.square().sum().expand(5))
    assert field.calls == 24 + 2  # sketch, estimate, tangents; forward mode tried once, two ways


@pytest.mark.parametrize("batch", [(), (4,), (2, 3)], ids=str)
def test_jacobian_norm_equals_autograds(batch, randomized, generator):
    field = randomized(MLPField(2, (8, 7), context_dim=3))
    x, context = (torch.randn(*batch, n, generator=generator, dtype=F64) for n in (2, 3))
    found = REGULARIZERS["jacobian"](at(field, x, context))
    rows = zip(x.reshape(-1, 2), context.reshape(-1, 3), strict=True)
    expected = torch.stack([
        torch.autograd.functional.jacobian(lambda y, c=c: field(NOW, y, c), row).square().sum()
        for row, c in rows
    ]).reshape(batch)  # fmt: skip
    torch.testing.assert_close(found, expected)
    (slope,) = torch.autograd.grad(found.sum(), field.layers[0].linear.weight)
    assert slope.abs().max() > 1e-3


def test_penalties_of_images_equal_those_of_vectors(randomized, generator):
    field = randomized(ConvField((1, 4, 4), (3,)))
    x = torch.randn(3, 1, 4, 4, generator=generator, dtype=F64)
    point = at(field, x)
    torch.testing.assert_close(REGULARIZERS["kinetic"](point), point.v.pow(2).sum((1, 2, 3)))
    jacobians = torch.stack(
        [torch.autograd.functional.jacobian(lambda y: field(NOW, y[None])[0], row) for row in x]
    )
    expected = jacobians.square().flatten(1).sum(1)
    torch.testing.assert_close(REGULARIZERS["jacobian"](point), expected)
    eye = torch.eye(16, dtype=F64).reshape(16, 1, 1, 4, 4).expand(16, 3, 1, 4, 4)
    products = Hutchinson(probe=eye).rates(field, NOW, x, None, eye).products
    mean = REGULARIZERS["jacobian"](at(field, x, products=products))  # over the basis
    torch.testing.assert_close(16 * mean, expected)


def plane(velocity):
    """φ = b·x - ‖b‖²t/2, whose field b moves all points alike: optimal transport."""
    field = PotentialField(2, width=3).double()
    with torch.no_grad():
        for parameter in field.parameters():
            parameter.zero_()
        field.linear.copy_(torch.cat([velocity, -velocity.square().sum(-1, keepdim=True) / 2]))
    return field


def test_hjb_vanishes_for_optimal_transport_only(generator):
    velocity = torch.tensor([1.5, -0.7], dtype=F64)
    field, x = plane(velocity), torch.randn(5, 2, generator=generator, dtype=F64)
    torch.testing.assert_close(field(NOW, x), velocity.expand(5, 2))
    assert REGULARIZERS["hjb"](at(field, x)).abs().max() < 1e-15
    field.linear.data[2] += 0.25  # φ as before, plus t/4
    torch.testing.assert_close(REGULARIZERS["hjb"](at(field, x)), torch.full((5,), 0.25).double())


def test_hjb_of_a_quadratic_potential_has_closed_form(generator):
    # φ = ½‖Qx‖² with Q orthogonal: v = x, ∂φ/∂t = 0, residual ‖x‖²/2
    field, x = plane(torch.zeros(2)), torch.randn(5, 2, generator=generator, dtype=F64)
    field.quadratic.data[:2, :2] = torch.tensor([[0.6, -0.8], [0.8, 0.6]], dtype=F64)
    torch.testing.assert_close(REGULARIZERS["hjb"](at(field, x)), x.square().sum(-1) / 2)


def test_hjb_of_a_negative_residual_is_its_absolute_value(generator):
    """A penalty that could fall without bound would be trained to -∞."""
    velocity = torch.tensor([1.5, -0.7], dtype=F64)
    field, x = plane(velocity), torch.randn(5, 2, generator=generator, dtype=F64)
    field.linear.data[2] -= 0.25  # φ as along optimal transport, less t/4
    torch.testing.assert_close(REGULARIZERS["hjb"](at(field, x)), torch.full((5,), 0.25).double())


@pytest.mark.parametrize("context_dim", [0, 3])
def test_hjb_equals_that_of_autograd(context_dim, randomized, generator):
    field = randomized(PotentialField(2, width=7, layers=3, context_dim=context_dim))
    x = torch.randn(4, 2, generator=generator, dtype=F64, requires_grad=True)
    context = torch.randn(4, context_dim, generator=generator, dtype=F64) if context_dim else None
    t = NOW.clone().expand(4).clone().requires_grad_()
    by_x, by_t = torch.autograd.grad(field.potential(t, x, context).sum(), (x, t))
    expected = (by_t + by_x.square().sum(-1) / 2).abs()
    torch.testing.assert_close(REGULARIZERS["hjb"](at(field, x, context)), expected)
    assert expected.min() > 1e-3


@pytest.mark.parametrize("field", [Linear(), Adapter(nn.Identity(), (2,)), MLPField(2, (4,))])
def test_hjb_of_a_field_without_potential_is_refused(field):
    x = torch.ones(4, 2)
    with pytest.raises(TypeError, match=f"expected a PotentialField, got {type(field).__name__}"):
        REGULARIZERS["hjb"](Point(field, NOW, x, None, x))
