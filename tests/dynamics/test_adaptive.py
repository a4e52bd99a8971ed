"""The adaptive solvers beside torchdiffeq's own, and how often they wait for the device."""

import pytest
import torch
import torchdiffeq
from torchdiffeq._impl import rk_common
from torchdiffeq._impl.odeint import SOLVERS

from cnf.dynamics import Solver, record, solve
from cnf.dynamics.adaptive import METHODS
from cnf.dynamics.ode import solve_path
from cnf.errors import SolverError
from tests.pretended import DEVICE

F64 = torch.float64
A = torch.tensor([[0.3, -1.2], [0.9, 0.5]], dtype=F64)
NORMS = {
    "rms": lambda parts: max(part.square().mean().sqrt() for part in parts),
    "rows": lambda parts: max(
        row.square().mean().sqrt() for part in parts for row in part.reshape(len(part), -1)
    ),
}


def field(weight, asked):
    """A field that turns fast in the middle of [0, 1], for which steps are rejected."""

    def dynamics(t, state):
        asked.append(t.item())
        x, y = state
        turn = 1 + 8 * torch.exp(-200 * (t - 0.6) ** 2)
        return turn * torch.tanh(x @ weight.T + t), (x * torch.cos(2 * t)).sum(-1) - 0.3 * y

    return dynamics


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("times", [(0.0, 1.0), (1.0, 0.0), (0.9, 0.25, 0.1)], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_solver_takes_the_steps_of_torchdiffeq(method, times, norm, generator, monkeypatch):
    # Its gradient counts the size of the first step as a function of the weights, ours does not.
    first = torch.no_grad()(rk_common._select_initial_step)
    monkeypatch.setattr(rk_common, "_select_initial_step", first)
    tolerance = 1e-5 if method in ("dopri5", "dopri8") else 1e-4
    start = torch.randn(5, 2, generator=generator, dtype=F64)
    found = []
    for ours in (True, False):
        weight, x, asked = A.clone().requires_grad_(), start.clone().requires_grad_(), []
        state = (x, torch.ones(5, dtype=F64))
        if ours:
            solver = Solver(
                method, rtol=tolerance, atol=tolerance / 2, norm=norm, gradient="backprop"
            )
            path, _ = solve_path(field(weight, asked), state, times, solver, ())
        else:
            stops = torch.tensor(times, dtype=F64)
            path = torchdiffeq.odeint(
                field(weight, asked), state, stops, method=method, rtol=tolerance,
                atol=tolerance / 2, options={"step_t": stops, "norm": NORMS[norm]},
            )  # fmt: skip
        slopes = torch.autograd.grad(sum(part.pow(2).sum() for part in path), (weight, x))
        found.append((torch.tensor(asked, dtype=F64), (*path, *slopes)))
    (ours, values), (theirs, expected) = found
    assert len(ours) == len(theirs) > 20
    # The size of a step after one with next to no error is a function of rounding.
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    torch.testing.assert_close(values, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("method", METHODS)
def test_steps_of_that_field_are_rejected(method):
    rejected, dynamics = [], field(A, [])

    class Recording:
        def __call__(self, t, state):
            return dynamics(t, state)

        def callback_reject_step(self, t, state, dt):
            rejected.append(t)

    state = torch.ones(5, 2, dtype=F64), torch.ones(5, dtype=F64)
    times = torch.tensor([0.0, 1.0], dtype=F64)
    torchdiffeq.odeint(Recording(), state, times, method=method, rtol=1e-4, atol=1e-4)
    assert rejected


@pytest.mark.parametrize(("start", "rate"), [(0.0, 1.0), (1.0, 0.0), (0.0, 0.0), (1e-9, 1e4)])
@pytest.mark.parametrize("method", METHODS)
def test_first_step_from_zero_or_at_rest_is_that_of_torchdiffeq(method, start, rate):
    asked = []

    def dynamics(t, state):
        asked.append(t.item())
        return (torch.full_like(state[0], rate),)

    state, stops = (torch.full((3,), start, dtype=F64),), torch.tensor([0.0, 1.0], dtype=F64)
    solve(dynamics, state, 0.0, 1.0, Solver(method, rtol=1e-5, atol=1e-5), ())
    ours = asked.copy()
    asked.clear()
    options = {"step_t": stops}
    torchdiffeq.odeint(
        dynamics, state, stops, rtol=1e-5, atol=1e-5, method=method, options=options
    )
    assert ours[:3] == pytest.approx(asked[:3], rel=1e-9, abs=0)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("ends", [(0.0, 1.0), (1.0, 0.0)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
def test_field_that_jumps_at_the_end_is_not_evaluated_beyond_the_jump(dtype, ends, method):
    def dynamics(t, state):
        return (torch.where(t == ends[1], 50.0, 1.0).to(dtype).expand(3),)

    (x,), _ = solve(dynamics, (torch.zeros(3, dtype=dtype),), *ends, Solver(method), ())
    expected = torch.full((3,), ends[1] - ends[0], dtype=dtype)
    torch.testing.assert_close(x, expected, rtol=0, atol=1e-6)


def attempts(evaluations, method):
    """Attempted steps of a solve that evaluates the field twice to size the first."""
    count, rest = divmod(evaluations - 2, len(SOLVERS[method].tableau.alpha))
    assert count > 1 and rest == 0
    return count


# Once a solve torchdiffeq compares the times (that they ascend is one comparison, that they
# descend another), and takes three norms for the size of the first step; times are copied from
# the host and back.
ASCENDS, DESCENDS, FIRST, COPIES = 3, 4, 3, 2


@pytest.mark.parametrize("gradient", ["backprop", "adjoint"])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("method", METHODS)
def test_solve_waits_once_a_step(method, norm, gradient, pretended):
    weight = A.to(DEVICE).requires_grad_()

    def dynamics(t, state):
        return torch.tanh(state[0] @ weight.T + t), state[0].sum(-1)

    state = tuple(torch.ones(shape, dtype=F64, device=DEVICE) for shape in ((5, 2), (5,)))
    solver = Solver(method, rtol=1e-4, atol=1e-4, norm=norm, gradient=gradient)
    pretended.forget()
    with record() as stats:
        (x, y), _ = solve(dynamics, state, 0.0, 1.0, solver, (weight,))
    adjoint = gradient == "adjoint"
    start = COPIES + ASCENDS * (1 + adjoint) + FIRST
    assert len(pretended.waits) == start + attempts(stats.forward, method)
    pretended.forget()
    torch.autograd.grad(x.sum() + y.sum(), weight)
    if adjoint:  # and once to find NaN in the gradient
        start = COPIES - 1 + DESCENDS + FIRST + 1
        assert len(pretended.waits) == start + attempts(stats.backward, method)
    else:
        assert not pretended.waits


@pytest.mark.parametrize("gradient", ["backprop", "adjoint"])
def test_log_prob_and_its_gradient_wait_once_a_step(gradient, small_flow, pretended):
    flow = small_flow("cnf", solver=Solver(rtol=1e-4, atol=1e-4, gradient=gradient)).to(DEVICE)
    x = torch.ones(5, 2, dtype=F64).to(DEVICE)
    pretended.forget()
    with record() as stats:
        flow.log_prob(x).sum().backward()
    expected = COPIES + DESCENDS + FIRST + attempts(stats.forward, "dopri5") + 1  # rows with NaN
    if gradient == "adjoint":
        backward = attempts(stats.backward, "dopri5") + 1
        expected += ASCENDS + COPIES - 1 + DESCENDS + FIRST + backward
    assert len(pretended.waits) == expected


@pytest.mark.parametrize("method", METHODS)
def test_adjoint_controls_the_error_of_the_state_and_of_its_gradient_only(method):
    # For dx/dt = cos(9t)·w·x, beside torchdiffeq's solve of the adjoint ODE as written by hand.
    w, x = torch.tensor([0.7, -1.1], dtype=F64, requires_grad=True), torch.ones(3, 2, dtype=F64)
    solver = Solver(method, rtol=1e-4, atol=1e-4, gradient="adjoint")
    with record() as stats:
        (end,), _ = solve(
            lambda t, s: (torch.cos(9 * t) * w * s[0],), (x,), 0.0, 1.0, solver, (w,)
        )
        (slope,) = torch.autograd.grad(end.square().sum(), w)
    asked = []

    def adjoint(t, state):
        asked.append(t)
        x, a, _ = state
        rate = torch.cos(9 * t) * w.detach()
        return rate * x, -rate * a, -torch.cos(9 * t) * (a * x).sum(0)

    stops = torch.tensor([1.0, 0.0], dtype=F64)
    *_, expected = torchdiffeq.odeint(
        adjoint, (end.detach(), 2 * end.detach(), torch.zeros(2, dtype=F64)), stops, rtol=1e-4,
        atol=1e-4, method=method, options={"norm": lambda s: NORMS["rms"](s[:2]), "step_t": stops},
    )  # fmt: skip
    assert stats.backward == len(asked)
    torch.testing.assert_close(slope, expected[1], rtol=0, atol=1e-9)


@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_adjoint_does_not_differentiate_with_respect_to_time(method):
    x, tracked = torch.ones(3, dtype=F64, requires_grad=True), []

    def dynamics(t, state):
        tracked.append(t.requires_grad)
        return (torch.cos(t) * state[0],)

    solver = Solver(method, steps=4 if method == "rk4" else None, gradient="adjoint")
    (end,), nfe = solve(dynamics, (x,), 0.0, 1.0, solver, ())
    torch.autograd.grad(end.sum(), x)
    assert len(tracked) > nfe and not any(tracked)


def test_state_that_overflows_at_the_end_is_an_error():
    def dynamics(t, state):  # finite everywhere, its solution at t = 1 is not
        return (torch.full_like(state[0], 3e38),)

    with pytest.raises(SolverError):
        solve(dynamics, (torch.full((3,), 1e38),), 0.0, 1.0, Solver(), ())


@pytest.mark.parametrize("method", ["dopri5", "rk4", "scipy_solver"])
def test_adjoint_of_rates_without_a_graph_is_the_identity(method):
    x = torch.ones(3, dtype=F64, requires_grad=True)
    solver = Solver(method, steps=4 if method == "rk4" else None, gradient="adjoint")
    (end,), _ = solve(lambda t, s: (torch.cos(t).expand(3),), (x,), 0.0, 1.0, solver, ())
    (slope,) = torch.autograd.grad(end.square().sum(), x)
    torch.testing.assert_close(slope, 2 * end.detach(), rtol=0, atol=1e-10)
