"""Every gradient mode of a solve, against the matrix exponential and other closed_form forms."""

import pytest
import torch
from torch import nn

from cnf.dynamics import Hutchinson, Solver, record, solve
from cnf.dynamics.ode import GIB
from cnf.dynamics.solver import FIXED, GRADIENTS, STAGES
from cnf.fields import Adapter, MLPField
from cnf.transforms import Continuous

F64 = torch.float64
A = torch.tensor([[0.3, -1.2], [0.9, 0.5]], dtype=F64)
C = torch.tensor([[0.5, 1.0, -0.3], [0.2, -0.7, 0.4]], dtype=F64)
METHODS = ("dopri5", "dopri8", "rk4", "implicit_adams", "explicit_adams", "scipy_solver")
WAYS = [
    (method, mode)
    for method in METHODS
    for mode in GRADIENTS
    if method != "scipy_solver" or mode in ("auto", "adjoint")
]


def setting(method, mode):
    if method in FIXED:
        return Solver(method, steps=100, gradient=mode)
    return Solver(method, rtol=1e-9, atol=1e-9, gradient=mode)


class Linear(nn.Module):
    """v = A x + C c."""

    def __init__(self):
        super().__init__()
        self.matrix = nn.Parameter(A.clone())

    def forward(self, t, x, context):
        return x @ self.matrix.T + context @ C.T


def closed_form(matrix, x, context):
    """e^A x + ∫ e^{A(1-s)} ds C c, and tr A, from one exponential of [[A, I], [0, 0]]."""
    eye, zero = torch.eye(2, dtype=F64), torch.zeros(2, 4, dtype=F64)
    flow = torch.matrix_exp(torch.cat([torch.cat([matrix, eye], 1), zero]))
    end = x @ flow[:2, :2].T + context @ C.T @ flow[:2, 2:].T
    return end, matrix.trace().expand(len(x))


def loss(end, ladj):
    return (end @ torch.tensor([1.0, -2.0], dtype=F64)).square().sum() + (ladj**3).sum()


@pytest.mark.parametrize("towards", ["data", "base"])
@pytest.mark.parametrize(("method", "mode"), WAYS)
def test_a_linear_flow_and_its_gradients_have_closed_form(method, mode, towards, generator):
    transform = Continuous(Adapter(Linear(), (2,), context_dim=3), setting(method, mode))
    x, leaf = (
        torch.randn(4, n, generator=generator, dtype=F64, requires_grad=True) for n in (2, 3)
    )
    inputs = [x, leaf, transform.field.net.matrix]
    solved = transform.integrate(x, 2 * leaf, towards=towards)  # no leaf: an encoder's output
    sign = 1 if towards == "data" else -1
    matrix = A.clone().requires_grad_()
    end, ladj = closed_form(sign * matrix, x, sign * 2 * leaf)
    torch.testing.assert_close(solved.value, end, rtol=0, atol=1e-6)  # tolerance 1e-9, 100 steps
    torch.testing.assert_close(solved.ladj, ladj, rtol=0, atol=1e-6)
    ours = torch.autograd.grad(loss(solved.value, solved.ladj), inputs)
    expected = torch.autograd.grad(loss(end, ladj), [x, leaf, matrix])
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-5)
        assert other.abs().max() > 1


@pytest.mark.parametrize("ends", [(0.0, 1.0), (1.0, 0.0), (0.9, 0.2)], ids=str)
@pytest.mark.parametrize("method", ["dopri5", "dopri8", "bosh3", "rk4", "implicit_adams"])
def test_backward_solve_evaluates_the_field_inside_the_interval_only(method, ends):
    rate, asked = torch.tensor(0.7, dtype=F64, requires_grad=True), []

    def field(t, state):
        asked.append(t.item())
        return (rate * state[0] * torch.cos(3 * t),)

    steps = 6 if method in FIXED else None
    solver = Solver(method, gradient="adjoint", steps=steps)
    (end,), nfe = solve(field, (torch.ones(3, dtype=F64),), *ends, solver, (rate,))
    end.sum().backward()
    assert len(asked) > 1.5 * nfe
    assert min(asked) >= min(ends) - 1e-12 and max(asked) <= max(ends) + 1e-12


def riccati(x, rate, solver):
    """x(1) of dx/dt = rate·x², which is x/(1 - rate·x)."""
    return solve(lambda t, s: (rate * s[0] ** 2,), (x,), 0.0, 1.0, solver, (rate,)).state[0]


@pytest.mark.parametrize("mode", ["auto", "backprop", "checkpoint"])
@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_derivatives_up_to_the_third_have_closed_form(method, mode):
    x = torch.tensor([1.0, 0.5, -2.0], dtype=F64, requires_grad=True)
    rate = torch.tensor(0.1, dtype=F64, requires_grad=True)
    ours, exact = riccati(x, rate, setting(method, mode)), x / (1 - rate * x)
    for _ in range(3):
        pairs = [
            torch.autograd.grad(end.sum(), (x, rate), create_graph=True) for end in (ours, exact)
        ]
        torch.testing.assert_close(*pairs, rtol=1e-6, atol=1e-6)  # tolerance 1e-9
        ours, exact = (slope.sum() + by_rate for slope, by_rate in pairs)


@pytest.mark.parametrize(
    "solver",
    [
        Solver(gradient="adjoint"),
        Solver(memory=1 / GIB),
        Solver("rk4", steps=8, memory=1 / GIB),
        Solver("scipy_solver"),
    ],
    ids=["asked for", "auto, adaptive", "auto, fixed", "scipy"],
)
def test_adjoint_refuses_second_derivatives(solver):
    x = torch.tensor([1.0, 0.5], dtype=F64, requires_grad=True)
    end = riccati(x, torch.tensor(0.1, dtype=F64), solver)
    with pytest.raises(RuntimeError, match='first derivatives only.*gradient="backprop"'):
        torch.autograd.grad(end.sum(), x, create_graph=True)


@pytest.fixture
def problem(randomized, generator):
    """(solver, divergence) → value and every gradient of a small random flow."""
    field = randomized(MLPField(2, (8, 7), context_dim=3))
    x, context = (
        torch.randn(5, n, generator=generator, dtype=F64, requires_grad=True) for n in (2, 3)
    )
    probe = Hutchinson(2, sketch=1).draw(x, generator)
    kinds = {"exact": "exact", "hutchinson": Hutchinson(probe=probe[:2])}
    kinds["hutch++"] = Hutchinson(probe=probe, sketch=1)

    def run(solver, divergence="exact"):
        transform = Continuous(field, solver, kinds[divergence])
        end, ladj = transform.inverse(x, context)
        value = loss(end, ladj)
        return value.detach(), torch.autograd.grad(value, [x, context, *field.parameters()])

    return run


@pytest.mark.parametrize("divergence", ["exact", "hutchinson", "hutch++"])
@pytest.mark.parametrize(("method", "steps", "segments"), [("rk4", 7, 3), ("heun3", 4, 9)])
def test_gradient_of_checkpoint_equals_backprop(method, steps, segments, divergence, problem):
    one = problem(Solver(method, steps=steps, gradient="backprop"), divergence)
    with record() as stats:
        solver = Solver(method, steps=steps, gradient="checkpoint", segments=segments)
        other = problem(solver, divergence)
    torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)  # sums in another order
    count = steps * STAGES[method]  # each evaluation once more, whatever the divergence
    assert (stats.forward, stats.backward) == (count, count)


@pytest.mark.parametrize("name", ["rtol", "atol"])
def test_adjoint_tolerances_apply_to_the_backward_solve(name, generator):
    """Tighter ones take more evaluations backwards, and as many forwards."""
    x = torch.randn(4, 2, generator=generator, dtype=F64)
    field = MLPField(2, (8,)).double()
    loose = {"rtol": 1e-8, "atol": 1e-8, name: 1e-3}
    counts = []
    for setting in ({}, {f"adjoint_{name}": 1e-8}):
        with record() as stats:
            value, ladj = Continuous(field, Solver(gradient="adjoint", **loose, **setting))(x)
            (value.square().sum() + ladj.sum()).backward()
        counts.append((stats.forward, stats.backward))
    (forward, backward), tight = counts
    assert tight[0] == forward and tight[1] > backward


@pytest.mark.parametrize("mode", GRADIENTS)
def test_second_backward_pass_gives_the_same_gradient(mode, generator):
    x = torch.randn(4, 2, generator=generator, dtype=F64, requires_grad=True)
    end = riccati(x, torch.tensor(0.1, dtype=F64), Solver("rk4", steps=9, gradient=mode))
    first, again = (torch.autograd.grad(end.sum(), x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, again)


@pytest.mark.parametrize("mode", GRADIENTS)
def test_solve_without_gradients_has_no_graph(mode, generator):
    x = torch.randn(4, 2, generator=generator, dtype=F64, requires_grad=True)
    with torch.no_grad(), record() as stats:
        end = riccati(x, x[0, 0], Solver("rk4", steps=9, gradient=mode, memory=1 / GIB))
    assert not end.requires_grad and (stats.forward, stats.solves) == (36, 1)


class DtypeRecorder(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.dtypes = nn.Linear(2, 2), []

    def forward(self, t, x):
        v = self.linear(x)
        self.dtypes.append(v.dtype)
        return v


def test_checkpoint_recomputes_under_autocast_of_forward_pass():
    net = DtypeRecorder()
    transform = Continuous(Adapter(net, (2,)), Solver("rk4", steps=4, gradient="checkpoint"), None)
    with torch.autocast("cpu", torch.bfloat16):
        end, _ = transform(torch.ones(3, 2))
    end.sum().backward()
    assert net.dtypes == [torch.bfloat16] * 32 and end.dtype == torch.float32
