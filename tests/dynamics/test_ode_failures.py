"""Solves that fail: an error names the error_of in forward and backward solves."""

import math

import numpy as np
import pytest
import torch

from cnf.dynamics.ode import solve, solve_path
from cnf.dynamics.solver import ADAPTIVE, FIXED, GRADIENTS, Solver
from cnf.errors import SolverError

F64 = torch.float64
ONE = torch.ones(3, dtype=F64)


def setting(method, **options):
    return Solver(method, steps=10 if method in FIXED else None, **options)


def adjoint(method, **options):
    return setting(method, gradient="adjoint", **options)


def error_of(field, solver, state=ONE):
    with pytest.raises(SolverError) as caught:
        solve(field, (state,), 0.0, 1.0, solver, ())
    return caught.value


# implicit_adams warns, in torchdiffeq, before NaN reaches the end
QUIET = [name for name in ADAPTIVE + FIXED if name != "implicit_adams"]


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("method", QUIET)
def test_error_names_a_field_that_returns_nan(method, late):
    def field(t, state):
        return (torch.where(t >= 0.5 * late, math.nan, 1.0) * state[0],)

    error = error_of(field, setting(method))
    assert "the field returned NaN or infinity" in str(error)
    assert "Check the inputs' scale" in str(error) and error.nfe < 300
    assert f"({method}, " in str(error)


@pytest.mark.parametrize("method", ADAPTIVE)
def test_error_at_the_first_step_has_its_time(method):
    error = error_of(lambda t, state: (state[0] * math.nan,), setting(method))
    assert 0 <= error.t <= 1  # not NaN: the field was asked at t = 0


@pytest.mark.parametrize("method", ADAPTIVE)
def test_stiff_field_stops_at_max_nfe(method):
    def field(t, state):
        return (-1e6 * (state[0] - torch.cos(50 * t)),)

    error = error_of(field, setting(method, max_nfe=200))
    assert "too many evaluations" in str(error) and "raise max_nfe" in str(error)
    assert error.nfe == 200


WAYS = [
    (method, mode)
    for method in ("dopri5", "rk4", "explicit_adams", "scipy_solver")
    for mode in GRADIENTS
    if method != "scipy_solver" or mode in ("auto", "adjoint")
]


@pytest.mark.parametrize(("method", "mode"), WAYS)
def test_error_names_the_cause_in_every_gradient_mode(method, mode):
    weight, tight = ONE.clone().requires_grad_(), setting(method, gradient=mode, max_nfe=30)
    fields = {
        "the field returned NaN or infinity": lambda t, s: (weight * s[0] / (t < 0.9),),
        "too many evaluations": lambda t, s: (-1e6 * (weight * s[0] - torch.cos(50 * t)),),
    }
    if method == "explicit_adams":
        del fields["too many evaluations"]  # sixteen
    for words, field in fields.items():
        solver = tight if words == "too many evaluations" else setting(method, gradient=mode)
        with pytest.raises(SolverError, match=words):
            solve(field, (ONE,), 0.0, 1.0, solver, (weight,))
    with pytest.raises(SolverError, match="too coarse"):
        solve(lambda t, s: (s[0],), (ONE.half(),), 0.0, 1.0, tight, (weight,))
    with pytest.raises(RuntimeError, match="size"):
        solve(lambda t, s: (s[0][:2] * weight[:2],), (ONE,), 0.0, 1.0, tight, (weight,))


def test_error_in_a_segment_has_its_time():
    def field(t, state):
        return (torch.where(t > 0.6, math.nan, 1.0) * state[0],)

    assert 0.6 <= error_of(field, setting("dopri5", gradient="checkpoint")).t < 0.7


def test_fixed_step_method_stops_at_max_nfe():
    error = error_of(lambda t, state: (state[0],), Solver("rk4", steps=10, max_nfe=12))
    assert error.nfe == 12 and "rk4, 10 steps" in str(error)


@pytest.mark.parametrize("method", ["dopri5", "bosh3", "dopri8"])
def test_error_for_blow_up_in_finite_time_is_a_step_size_underflow(method):
    error = error_of(lambda t, state: (state[0] ** 3,), setting(method))  # escapes at t = ½
    assert "the step fell below what the dtype resolves" in str(error)
    assert error.t == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_state_in_half_precision_is_refused(method, dtype):
    error = error_of(lambda t, state: (state[0],), setting(method), torch.ones(3, dtype=dtype))
    assert str(dtype) in str(error) and "autocast inside the field" in str(error)
    assert error.nfe == 0


def backward(field, solver, cotangent=1.0):
    """The gradient of a solve that goes well forward."""
    weight = ONE.clone().requires_grad_()
    (x,), _ = solve(lambda t, s: field(t, s, weight), (ONE,), 0.0, 1.0, solver, (weight,))
    assert x.isfinite().all()
    (x.sum() * cotangent).backward()
    return weight.grad


@pytest.mark.parametrize("method", QUIET)
def test_error_names_a_nan_gradient_of_a_finite_field(method):
    def field(t, state, weight):
        return (state[0] + torch.sqrt(0 * state[0] * weight),)  # √0: slope 0·∞

    with pytest.raises(SolverError, match="the gradient became NaN or infinite in the backward"):
        backward(field, adjoint(method, max_nfe=500))


@pytest.mark.parametrize("method", ["euler", "midpoint", "rk4", "heun3"])
def test_error_names_a_nan_gradient_at_the_end_of_the_backward_solve(method):
    def field(t, state, weight):
        return (torch.sqrt(torch.where(t < 0.12, 0 * t, 1 + 0 * t) * weight) * state[0],)

    with pytest.raises(SolverError, match="the gradient became NaN or infinite in the backward"):
        backward(field, adjoint(method, max_nfe=2000))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_error_names_a_nan_cotangent(method, bad):
    with pytest.raises(SolverError, match="the gradient became NaN or infinite in the backward"):
        backward(lambda t, s, w: (w * s[0],), adjoint(method), cotangent=bad)


def test_stiff_backward_solve_stops_at_max_nfe():
    # contracting forward, so expanding backward: the adjoint needs far more steps
    with pytest.raises(SolverError, match="too many evaluations") as caught:
        backward(lambda t, s, w: (-40 * w * s[0],), adjoint("dopri5", max_nfe=300))
    assert caught.value.nfe == 300


def test_max_nfe_applies_to_each_backward_solve_separately():
    weight = ONE.clone().requires_grad_()
    solver = Solver(max_nfe=100, gradient="adjoint")
    (x,), nfe = solve(lambda t, s: (weight * s[0],), (ONE,), 0.0, 1.0, solver, (weight,))
    for _ in range(20):  # twenty rows of a Jacobian, say
        torch.autograd.grad(x.sum(), weight, retain_graph=True)
    assert nfe < 40


@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_assertion_error_of_the_field_is_not_changed(method):
    def field(t, state):
        raise AssertionError("my own check")

    with pytest.raises(AssertionError, match="my own check"):
        solve(field, (ONE,), 0.0, 1.0, setting(method), ())


@pytest.mark.parametrize("method", ["dopri5", "bosh3", "rk4"])
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_empty_batch_gives_empty_result(method, gradient):
    weight = ONE.clone().requires_grad_()
    solver = setting(method, gradient=gradient)
    empty = torch.zeros(0, 3, dtype=F64)
    (path,), _ = solve_path(
        lambda t, s: (weight * s[0],), (empty,), [0, 0.5, 1], solver, (weight,)
    )
    assert path.shape == (3, 0, 3)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"method": "dopri"}, "unknown Solver method 'dopri'; known: .*dopri5"),
        ({"method": "rk4"}, "rk4 has no step-size control; set steps="),
        ({"steps": 8}, "dopri5 chooses its own steps; drop steps=8"),
        ({"method": "rk4", "steps": 0}, "expected steps > 0, got 0"),
        ({"method": "rk4", "steps": 2.5}, "steps"),
        ({"rtol": 0.0}, "expected rtol > 0"),
        ({"atol": -1e-5}, "expected atol > 0"),
        ({"rtol": math.nan}, "expected rtol > 0"),
        ({"rtol": "a"}, "Solver: expected rtol > 0, got 'a'"),
        ({"rtol": np.ones(2)}, "Solver: expected rtol > 0"),
        (
            {"method": "rk4", "steps": True},
            "Solver: expected steps to be a whole number, got True",
        ),
        ({"method": "rk4", "grid": 3}, "Solver: expected grid to be times ascending"),
        ({"adjoint_rtol": 0}, "expected adjoint_rtol > 0"),
        ({"adjoint_atol": math.inf}, "expected adjoint_atol > 0"),
        ({"max_nfe": 0}, "expected max_nfe > 0"),
        (
            {"method": "scipy_solver", "gradient": "checkpoint"},
            "'adjoint' or 'auto' .* no graph .* got 'checkpoint'",
        ),
        ({"method": "scipy_solver", "steps": 3}, "chooses its own steps"),
        ({"norm": "max"}, "expected norm to be one of 'rms', 'rows'"),
        ({"adjoint_norm": "semi"}, "expected adjoint_norm to be one of 'seminorm', 'full'"),
        ({"memory": 0.0}, "expected memory > 0"),
        ({"segments": 0}, "expected segments > 0"),
        ({"segments": 2.5}, "expected segments to be a whole number, got 2.5"),
        ({"gradient": "autograd"}, "expected gradient to be one of 'auto'"),
    ],
)
def test_invalid_solver_settings_are_refused(options, text):
    with pytest.raises(ValueError, match=text):
        Solver(**options)


def test_solver_is_built_from_arguments_or_an_adaptive_method():
    assert Solver.of("dopri8") == Solver("dopri8")
    assert Solver.of({"method": "rk4", "steps": 3}) == Solver("rk4", steps=3)
    assert Solver.of(None) == Solver()
    with pytest.raises(ValueError, match="rk4 has no step-size control; set steps="):
        Solver.of("rk4")
    with pytest.raises(ValueError, match="Solver: unknown option 'metod'.*Did you mean 'method'"):
        Solver.of({"metod": "rk4"})
    with pytest.raises(TypeError, match="Solver: expected a Solver.*got 3; write"):
        Solver.of(3)  # pyright: ignore


@pytest.mark.parametrize("dtype, least", [(torch.float32, 1e-10), (torch.float64, 1e-15)])
def test_tolerances_below_the_resolution_of_the_dtype_are_refused(dtype, least):
    state = (torch.ones(1, 1, dtype=dtype),)

    def grown(rtol, atol):
        return solve(lambda t, y: (y[0],), state, 0.0, 1.0, Solver(rtol=rtol, atol=atol), ())

    with pytest.raises(SolverError, match=f"below the resolution of {dtype}.*0 evaluations"):
        grown(least * 1e-6, least * 1e-6)
    # Either tolerance alone may be as small as one likes.
    for rtol, atol in ((least, least), (least * 1e-6, 1e-5), (1e-5, least * 1e-6)):
        error = (grown(rtol, atol).state[0].double() - math.e).abs().max()
        assert error < 10 * max(rtol, atol) + 100 * torch.finfo(dtype).eps


def test_solver_has_a_readable_str_and_value_equality():
    assert str(Solver()) == "dopri5, rtol=1e-05, atol=1e-05"
    assert str(Solver("rk4", steps=8)) == "rk4, 8 steps"
    assert Solver() == Solver() and hash(Solver()) == hash(Solver())
