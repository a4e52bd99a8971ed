"""The flow of a vector field, against the matrix exponential."""

import math

import pytest
import torch
from torch import nn

from cnf.dynamics import REGULARIZERS, Hutchinson, Solver, record
from cnf.fields import Adapter, MLPField, Piecewise
from cnf.transforms import Compose, Continuous, Coupling, Inverse, Standardize
from cnf.transforms.continuous import is_continuous, reconfigured

F64 = torch.float64
A = torch.tensor([[0.3, -1.2], [0.9, 0.5]], dtype=F64)
TIGHT = Solver(rtol=1e-10, atol=1e-10)


class Linear(nn.Module):
    """v = Ax."""

    def __init__(self):
        super().__init__()
        self.matrix = nn.Parameter(A.clone())

    def forward(self, t, x):
        return x @ self.matrix.T


@pytest.fixture
def linear():
    return Continuous(Adapter(Linear(), (2,)), TIGHT)


@pytest.fixture
def z(generator):
    return torch.randn(5, 2, generator=generator, dtype=F64)


@pytest.mark.parametrize("solver", [TIGHT, Solver("rk4", steps=100)], ids=str)
def test_linear_field_has_closed_form(solver, z):
    transform = Continuous(Adapter(Linear(), (2,)), solver)  # x = e^A z, ladj = tr A
    x, ladj = transform(z)
    torch.testing.assert_close(x, z @ torch.matrix_exp(A).T, rtol=0, atol=1e-7)
    torch.testing.assert_close(ladj, torch.full((5,), 0.8, dtype=F64), rtol=0, atol=1e-7)
    back, ladj = transform.inverse(x)
    torch.testing.assert_close(back, z, rtol=0, atol=1e-7)
    torch.testing.assert_close(ladj, torch.full((5,), -0.8, dtype=F64), rtol=0, atol=1e-7)


def test_gradient_of_the_linear_flow_has_closed_form(linear, z):
    x, ladj = linear(z)
    (grad,) = torch.autograd.grad((x.square().sum() + ladj.sum()), linear.field.net.matrix)
    matrix = A.clone().requires_grad_()
    closed = (z @ torch.matrix_exp(matrix).T).square().sum() + 5 * matrix.trace()
    torch.testing.assert_close(grad, torch.autograd.grad(closed, matrix)[0], rtol=0, atol=1e-6)


class Sum(nn.Module):
    """v = (0.5, -2) + t·c, so that ∫‖v‖² and ∇·v = 0 are known."""

    def forward(self, t, x, context):
        return torch.tensor([0.5, -2.0], dtype=F64) + t.unsqueeze(-1) * context


@pytest.mark.parametrize("towards", ["data", "base"])
def test_integrals_have_closed_form_and_sign_in_both_directions(towards, z):
    transform = Continuous(Adapter(Sum(), (2,), context_dim=2), TIGHT)
    context = torch.tensor([1.0, 3.0], dtype=F64).expand(5, 2)

    def clock(point):
        return point.t.expand(5)

    solved = transform.integrate(
        z, context, towards=towards, integrands=[REGULARIZERS["kinetic"], clock]
    )
    # ∫(½ + t)² + (3t - 2)² dt = [(½+t)³/3 + (3t-2)³/9] from 0 to 1
    kinetic = (1.5**3 - 0.5**3) / 3 + (1 + 8) / 9
    torch.testing.assert_close(solved.integrals[0], torch.full((5,), kinetic, dtype=F64))
    torch.testing.assert_close(solved.integrals[1], torch.full((5,), 0.5, dtype=F64))
    sign = 1 if towards == "data" else -1
    moved = sign * torch.tensor([1.0, -0.5], dtype=F64)
    torch.testing.assert_close(solved.value - z, moved.expand(5, 2))
    torch.testing.assert_close(solved.ladj, torch.zeros(5, dtype=F64))


def test_integrands_do_not_change_value_and_ladj(linear, z):
    plain = linear.integrate(z, towards="base")
    with_cost = linear.integrate(z, towards="base", integrands=[REGULARIZERS["kinetic"]])
    torch.testing.assert_close(plain.value, with_cost.value, rtol=0, atol=1e-7)
    torch.testing.assert_close(plain.ladj, with_cost.ladj, rtol=0, atol=1e-7)
    assert plain.integrals == () and with_cost.integrals[0].shape == (5,)


@pytest.mark.parametrize("divergence", ["exact", "hutchinson"])
@pytest.mark.parametrize("direction", ["forward", "inverse"])
@pytest.mark.parametrize("closed", [True, False])
def test_adjoint_matches_backprop(divergence, direction, closed, randomized, generator, z):
    field = randomized(MLPField(2, (8, 7), context_dim=3))
    field = field if closed else Adapter(field, (2,), context_dim=3)
    leaf = torch.randn(3, generator=generator, dtype=F64, requires_grad=True)
    value = z.clone().requires_grad_()
    if divergence == "hutchinson":
        divergence = Hutchinson(probe=Hutchinson(2).draw(z, generator))
    gradients = {}
    for mode in ("adjoint", "backprop"):
        solver = Solver(rtol=1e-9, atol=1e-9, gradient=mode)
        transform = Continuous(field, solver, divergence)
        context = (2 * leaf).expand(5, 3)  # not a leaf: what an encoder gives
        y, ladj = getattr(transform, direction)(value, context)
        loss = y.pow(3).sum() + (ladj * torch.arange(5)).sum()
        gradients[mode] = torch.autograd.grad(loss, [value, leaf, *field.parameters()])
    for one, other in zip(*gradients.values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)  # solver rtol 1e-9
        assert other.abs().max() > 1e-3


@pytest.mark.parametrize("solver", [TIGHT, Solver("rk4", steps=64)], ids=str)
def test_trajectory_follows_the_closed_form_and_ends_at_forward(solver, z):
    transform = Continuous(Adapter(Linear(), (2,)), solver)
    times = [0.0, 0.3, 0.55, 1.0]
    path = transform.trajectory(z, times)
    expected = torch.stack([z @ torch.matrix_exp(A * t).T for t in times])
    torch.testing.assert_close(path, expected, rtol=0, atol=1e-7)
    torch.testing.assert_close(path[-1], transform(z)[0], rtol=0, atol=1e-7)
    path[1].sum().backward()
    assert transform.field.net.matrix.grad.abs().max() > 0.1


def test_trajectory_by_the_adjoint_has_gradient_of_the_context(randomized, generator, z):
    field = randomized(MLPField(2, (8,), context_dim=3))
    leaf = torch.randn(3, generator=generator, dtype=F64, requires_grad=True)
    gradients = []
    for mode in ("adjoint", "backprop"):
        transform = Continuous(field, Solver("rk4", steps=32, gradient=mode))
        path = transform.trajectory(z, [0.0, 0.5, 1.0], (2 * leaf).expand(5, 3))
        gradients += torch.autograd.grad(path.square().sum(), leaf)
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)  # rk4's error
    assert gradients[0].abs().min() > 1e-3


def test_trajectory_may_run_backwards(linear, z):
    path = linear.trajectory(z, [1.0, 0.5, 0.0])
    torch.testing.assert_close(path[-1], linear.inverse(z)[0], rtol=0, atol=1e-7)


def test_ladj_is_nan_without_divergence(linear, z):
    free = Continuous(linear.field, TIGHT, divergence=None)
    x, ladj = free(z)
    assert ladj.isnan().all() and ladj.shape == (5,)
    torch.testing.assert_close(x, linear(z)[0], rtol=0, atol=1e-8)


def test_nfe_equals_the_count_of_record(linear, z):
    with record() as stats:
        solved = linear.integrate(z, towards="data")
    assert solved.nfe == stats.forward > 7
    fast = Continuous(linear.field, Solver("midpoint", steps=3))
    assert fast.integrate(z, towards="base").nfe == 6


def test_state_keeps_its_dtype_over_a_bfloat16_field():
    class Half(nn.Module):
        def forward(self, t, x):
            return (0.5 * x).to(torch.bfloat16)

    x = torch.ones(4, 2)
    y = Continuous(Adapter(Half(), (2,)), Solver("rk4", steps=8), None)(x)[0]
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, x * math.exp(0.5), rtol=2e-2, atol=0)  # bfloat16: 8 bits


def test_reconfigured_shares_weights_of_nested_transforms(randomized, z):
    inner = Continuous(MLPField(2, (6, 5)))
    whole = randomized(Inverse(Compose([Coupling(2), Inverse(Compose([inner]))])))
    fast = reconfigured(whole, solver=Solver("rk4", steps=4), divergence=None)
    with record() as stats:
        _, ladj = fast(z)
    assert stats.forward == 16 and ladj.isnan().all()
    assert inner.solver == Solver() and inner.divergence == "exact"
    for ours, theirs in zip(fast.parameters(), whole.parameters(), strict=True):
        assert ours is theirs
    before = fast(z)[0]
    with torch.no_grad():
        for parameter in inner.field.parameters():
            parameter.add_(0.5)
    assert (fast(z)[0] - before).abs().max() > 0.1


def test_is_continuous_finds_nested_transforms():
    field = MLPField(2, (4,))
    assert is_continuous(Inverse(Compose([Coupling(2), Continuous(field)])))
    assert not is_continuous(Compose([Coupling(2), Standardize((2,))]))


def test_unknown_direction_and_divergence_are_refused(linear, z):
    with pytest.raises(ValueError, match="towards to be one of 'data', 'base', got 'x'"):
        linear.integrate(z, towards="x")
    with pytest.raises(ValueError, match="Did you mean 'exact'"):
        linear.integrate(z, towards="base", divergence="exat")


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("edited", ["x", "context"])
def test_field_that_modifies_its_input_is_named_in_the_error(edited, gradients):

    class Halving(nn.Module):
        def forward(self, t, x, context):
            {"x": x, "context": context}[edited].mul_(0.5)
            return x * context

    field = Adapter(Halving(), (2,), context_dim=2)
    transform = Continuous(field, Solver("rk4", steps=2)).double()
    x, context = torch.ones(3, 2, dtype=torch.float64), torch.ones(3, 2, dtype=torch.float64)
    with torch.set_grad_enabled(gradients):
        with pytest.raises(ValueError, match=f"Halving: edits its input {edited} in place"):
            transform.integrate(x, context, towards="base", divergence=None)
        # Where a derivative is taken torch may refuse before.
        with pytest.raises(ValueError, match="Halving: .*edite?[sd] .*in place"):
            transform.integrate(x, context, towards="base")


def test_modification_of_the_input_in_a_later_block_is_refused():
    class Halving(nn.Module):
        def forward(self, t, x):
            return x.mul_(0.5) * 1.0

    blocks = [MLPField(2, (4,)), Adapter(Halving(), (2,))]
    transform = Continuous(Piecewise(blocks), Solver("rk4", steps=4))
    with torch.no_grad(), pytest.raises(ValueError, match="Halving: edits its input x in place"):
        transform.integrate(torch.ones(3, 2), towards="data", divergence=None)
