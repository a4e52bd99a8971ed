"""ODE solves: results, orders, gradients and evaluations, against the matrix exponential."""

import gc
import math
import weakref
from itertools import pairwise

import pytest
import torch

from cnf.dynamics.ode import record, solve, solve_path
from cnf.dynamics.solver import ADAPTIVE, FIXED, GRADIENTS, Solver

F64 = torch.float64
A = torch.tensor([[0.3, -1.2, 0.1], [0.9, -0.4, 0.5], [0.2, 0.3, 0.6]], dtype=F64)
B = torch.tensor([0.5, -1.0, 0.25], dtype=F64)
X0 = torch.tensor([[1.0, 0.5, -0.3], [-2.0, 0.1, 1.4]], dtype=F64)
# One-step methods and how fast their error falls; the evaluations of one step are the same number.
ORDER = {"euler": 1, "midpoint": 2, "heun2": 2, "heun3": 3, "rk4": 4}
ADAMS = tuple(name for name in FIXED if "adams" in name)


def linear(a=A, b=B):
    return lambda t, state: (state[0] @ a.T + b,)


def exact(x0=X0, t=1.0, a=A, b=B):
    """x(t) of dx/dt = Ax + b: one matrix exponential of [[A, b], [0, 0]]."""
    block = torch.cat([torch.cat([a, b[:, None]], 1), torch.zeros(1, 4, dtype=a.dtype)])
    flow = torch.matrix_exp(block * t)
    return x0 @ flow[:3, :3].T + flow[:3, 3]


def setting(method, **options):
    if method in FIXED:
        return Solver(method, steps=options.pop("steps", 200), **options)
    return Solver(method, **{"rtol": 1e-9, "atol": 1e-9, **options})


# 200 steps: C·h^order. Adaptive: the local errors of a few dozen steps add up.
FIXED_ERROR = {"euler": 3e-2, "midpoint": 1e-4, "heun2": 1e-4, "heun3": 1e-6, "rk4": 1e-8}
FACTOR = {"fehlberg2": 400}  # torchdiffeq reuses its last stage as if the pair were FSAL


@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
@pytest.mark.parametrize("method", ADAPTIVE + FIXED)
def test_every_method_solves_the_linear_ode(method, dtype):
    a, b, x0 = A.to(dtype), B.to(dtype), X0.to(dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-7
    solver = setting(method, rtol=tolerance, atol=tolerance)
    (x,), _ = solve(linear(a, b), (x0,), 0.0, 1.0, solver, ())
    atol = FIXED_ERROR.get(method, FACTOR.get(method, 30) * tolerance)
    rounding = 100 * torch.finfo(dtype).eps
    torch.testing.assert_close(x, exact().to(dtype), rtol=0, atol=atol + rounding)
    assert x.dtype == dtype
    assert (exact() - X0).abs().min() > 0.1


@pytest.mark.parametrize("method", ORDER)
@pytest.mark.parametrize("ends", [(0.0, 1.0), (1.0, 0.0)], ids=str)
def test_error_falls_at_the_stated_order(method, ends):
    def error(steps):
        (x,), _ = solve(linear(), (X0,), *ends, Solver(method, steps=steps), ())
        return (x - exact(t=ends[1] - ends[0])).norm().item()

    slope = math.log2(error(20) / error(40))
    assert slope == pytest.approx(ORDER[method], abs=0.2)


@pytest.mark.parametrize("method", ADAMS)
def test_error_of_adams_falls_at_fourth_order_or_faster(method):
    def error(steps):
        (x,), _ = solve(linear(), (X0,), 0.0, 1.0, Solver(method, steps=steps), ())
        return (x - exact()).norm().item()

    errors = [error(steps) for steps in (20, 40, 80, 160)]
    assert all(fine < coarse / 12 for coarse, fine in pairwise(errors))


@pytest.mark.parametrize("method", ADAPTIVE)
def test_error_of_adaptive_methods_follows_the_tolerance(method):
    def error(tolerance):
        solver = Solver(method, rtol=tolerance, atol=tolerance)
        return (solve(linear(), (X0,), 0.0, 1.0, solver, ()).state[0] - exact()).norm().item()

    factor = FACTOR.get(method, 30)
    assert error(1e-4) < factor * 1e-4 and error(1e-7) < factor * 1e-7


@pytest.mark.parametrize("rate", [1.0, 3.0])
@pytest.mark.parametrize("method", ADAPTIVE)
def test_adaptive_error_is_close_to_the_tolerance_for_an_oscillating_field(method, rate):
    # dx/dt = cos(rate·π·t)·x; a solver that steps past t1 and interpolates back misses by far more
    def field(t, state):
        return (torch.cos(rate * math.pi * t) * state[0],)

    t1 = 0.55
    (x,), _ = solve(field, (X0,), 0.0, t1, Solver(method, rtol=1e-5, atol=1e-5), ())
    answer = X0 * math.exp(math.sin(rate * math.pi * t1) / (rate * math.pi))
    torch.testing.assert_close(x, answer, rtol=0, atol=FACTOR.get(method, 30) * 1e-5)


@pytest.mark.parametrize("method", ADAPTIVE + FIXED)
def test_field_is_evaluated_inside_the_interval_only(method):
    asked = []

    def field(t, state):
        asked.append(t.item())
        return (0.1 * state[0],)

    solve(field, (X0,), 0.0, 1.0, setting(method, **({"steps": 5} if method in FIXED else {})), ())
    assert min(asked) >= -1e-12 and max(asked) <= 1.0 + 1e-12


@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_solve_may_run_backwards_in_time(method):
    (x,), _ = solve(linear(), (X0,), 0.0, 1.0, setting(method), ())
    (back,), _ = solve(linear(), (x,), 1.0, 0.0, setting(method), ())
    torch.testing.assert_close(back, X0, rtol=0, atol=1e-7)
    (past,), _ = solve(linear(), (X0,), 0.0, -1.0, setting(method), ())
    torch.testing.assert_close(past, exact(t=-1.0), rtol=0, atol=1e-7)


def test_state_may_have_several_parts_and_depend_on_time():
    # dx/dt = 2t, dy/dt = x: x = t², y = t³/3 from zero
    def field(t, state):
        return 2 * t.expand(4), state[0].sum().reshape(1)

    zero = (torch.zeros(4, dtype=F64), torch.zeros(1, dtype=F64))
    (x, y), _ = solve(field, zero, 0.0, 3.0, Solver(rtol=1e-10, atol=1e-10), ())
    torch.testing.assert_close(x, torch.full((4,), 9.0, dtype=F64))
    torch.testing.assert_close(y, torch.full((1,), 36.0, dtype=F64))


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("method", ["dopri5", "bosh3", "rk4", "midpoint"])
def test_gradients_equal_those_of_the_matrix_exponential(method, gradient):
    tight = {"rtol": 1e-8, "atol": 1e-8} if method in ADAPTIVE else {"steps": 400}
    solver = setting(method, gradient=gradient, **tight)
    weight = torch.tensor([1.0, -2.0, 0.5], dtype=F64)

    def gradients(answer):
        leaves = [value.clone().requires_grad_() for value in (A, B, X0)]
        (answer(*leaves) @ weight).square().sum().backward()
        return [leaf.grad for leaf in leaves]

    ours = gradients(
        lambda a, b, x0: solve(linear(a, b), (x0,), 0.0, 1.0, solver, (a, b)).state[0]
    )
    closed = gradients(lambda a, b, x0: exact(x0, 1.0, a, b))
    for one, other in zip(ours, closed, strict=True):
        atol = 1e-3 if method == "midpoint" else 1e-5
        torch.testing.assert_close(one, other, rtol=0, atol=atol)
        assert other.abs().max() > 1


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("ends", [(0.0, 1.0), (1.0, 0.0)], ids=str)
def test_gradients_equal_finite_differences(gradient, ends):
    solver = Solver(rtol=1e-10, atol=1e-10, gradient=gradient)

    def answer(a, x0):
        def field(t, state):
            return (torch.tanh(state[0] @ a.T + t),)

        return solve(field, (x0,), *ends, solver, (a,)).state[0].square().sum()

    a, x0 = A.clone().requires_grad_(), X0.clone().requires_grad_()
    answer(a, x0).backward()
    for leaf in (a, x0):
        step = torch.zeros_like(leaf)
        step[1, 2] = 1e-4
        with torch.no_grad():
            move = (step, 0) if leaf is a else (0, step)
            high = answer(a + move[0], x0 + move[1])
            low = answer(a - move[0], x0 - move[1])
        assert leaf.grad[1, 2].item() == pytest.approx((high - low).item() / 2e-4, rel=1e-5)


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("method", ["dopri5", "rk4", "euler"])
def test_path_passes_through_every_time(method, gradient):
    times = [0.0, 0.1, 1 / 3, 0.77, 1.0]
    solver = setting(method, gradient=gradient)
    a = A.clone().requires_grad_()
    (path,), _ = solve_path(linear(a), (X0,), times, solver, (a,))
    expected = torch.stack([exact(t=t) for t in times])
    atol = FIXED_ERROR.get(method, 1e-6)
    torch.testing.assert_close(path.detach(), expected, rtol=0, atol=atol)
    (backwards,), _ = solve_path(linear(a), (path[-1],), times[::-1], solver, (a,))
    torch.testing.assert_close(backwards[-1], X0, rtol=0, atol=10 * atol)
    path[2].sum().backward()
    b = A.clone().requires_grad_()
    exact(t=times[2], a=b).sum().backward()
    torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=10 * atol)


@pytest.mark.parametrize("method", ADAMS)
def test_times_between_steps_do_not_reduce_the_accuracy_of_adams_methods(method):
    def field(t, state):
        return (state[0],)

    one = torch.ones(1, dtype=F64)
    (path,), _ = solve_path(field, (one,), [0.0, 0.301, 0.652, 1.0], Solver(method, steps=40), ())
    assert path[-1].item() == pytest.approx(math.e, abs=1e-3)


@pytest.mark.parametrize("gradient", ["backprop", "adjoint"])
@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
@pytest.mark.parametrize("backwards", [False, True])
def test_times_at_the_ends_of_steps_add_no_step(backwards, dtype, gradient):
    times = [k * 0.1 * 10 / 30 for k in range(30)] + [1.0]  # as rounding leaves them
    times = times[::-1] if backwards else times
    solver = Solver("rk4", steps=30, gradient=gradient)
    a, b = A.to(dtype).requires_grad_(), B.to(dtype)
    (path,), nfe = solve_path(linear(a, b), (X0.to(dtype),), times, solver, (a,))
    assert (len(path), nfe) == (31, 120)


@pytest.mark.parametrize("steps", [1, 7, 10, 49])
@pytest.mark.parametrize("method", ORDER)
@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
@pytest.mark.parametrize("ends", [(0.0, 1.0), (1.0, 0.0), (0.2, 0.9)], ids=str)
def test_fixed_steps_take_their_exact_number_of_evaluations(method, steps, dtype, ends):
    (_,), nfe = solve(linear(A.to(dtype), B.to(dtype)), (X0.to(dtype),), *ends,
                      Solver(method, steps=steps), ())  # fmt: skip
    assert nfe == steps * ORDER[method]  # stages of a step = its order for these methods


def test_record_counts_forward_and_backward_under_nesting():
    a = A.clone().requires_grad_()
    with record() as outer:
        solver = Solver("rk4", steps=3, gradient="adjoint")
        first, nfe = solve(linear(a), (X0,), 0.0, 1.0, solver, (a,))
        with record() as inner:
            solve(linear(a), (X0,), 0.0, 1.0, Solver("euler", steps=5), (a,))
        first[0].sum().backward()
    solve(linear(a), (X0,), 0.0, 1.0, Solver("euler", steps=5), (a,))
    assert (nfe, inner.forward, inner.backward, inner.solves) == (12, 5, 0, 1)
    assert (outer.forward, outer.backward, outer.solves) == (17, 12, 2)


def test_record_does_not_keep_the_tensors_of_a_solve_alive():
    def run():
        big = torch.zeros(3, dtype=F64)
        solve(lambda t, state: (state[0] + big,), (X0,), 0.0, 1.0, Solver("rk4", steps=3), ())
        return weakref.ref(big)

    with record() as stats:
        big = run()
        gc.collect()
        assert big() is None  # thousands of training steps fit into one record
    assert stats.forward == 12


def test_backprop_takes_no_further_evaluations():
    a = A.clone().requires_grad_()
    with record() as stats:
        solver = Solver("rk4", steps=3, gradient="backprop")
        solve(linear(a), (X0,), 0.0, 1.0, solver, (a,)).state[0].sum().backward()
    assert (stats.forward, stats.backward) == (12, 0)
