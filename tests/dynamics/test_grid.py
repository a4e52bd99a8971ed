"""Solvers on a grid of unequal steps, against Runge-Kutta methods by hand."""

import json
import math
from dataclasses import asdict
from itertools import pairwise

import numpy as np
import pytest
import torch

import cnf
from cnf import Flow, Solver
from cnf.dynamics import fixed, record, solve
from cnf.dynamics.ode import solve_path
from cnf.dynamics.solver import STAGES
from cnf.fields import Adapter, MLPField, NullContext, Piecewise, Preconditioned
from cnf.metrics.error_bars import log_prob_with_error
from cnf.training import checkpoint
from cnf.transforms import Continuous

F64 = torch.float64
GRID = (0.0, 0.05, 0.15, 0.4, 0.45, 0.8, 1.0)
ENDS = [(0.0, 1.0), (1.0, 0.0), (0.25, 0.9), (0.9, 0.25)]
A = torch.tensor([[0.3, -1.2], [0.9, 0.5]], dtype=F64)
X0 = torch.tensor([[1.0, 0.5], [-2.0, 0.1], [0.3, -0.7]], dtype=F64)

# One step of h from (t, x), as the textbooks write it; torchdiffeq's rk4 is Kutta's 3/8 rule.


def euler(f, t, x, h):
    return x + h * f(t, x)


def midpoint(f, t, x, h):
    return x + h * f(t + h / 2, x + h / 2 * f(t, x))


def heun2(f, t, x, h):
    first = f(t, x)
    return x + h / 2 * (first + f(t + h, x + h * first))


def heun3(f, t, x, h):
    first = f(t, x)
    third = f(t + 2 * h / 3, x + 2 * h / 3 * f(t + h / 3, x + h / 3 * first))
    return x + h / 4 * (first + 3 * third)


def rk4(f, t, x, h):
    a = f(t, x)
    b = f(t + h / 3, x + h / 3 * a)
    c = f(t + 2 * h / 3, x + h * (b - a / 3))
    d = f(t + h, x + h * (a - b + c))
    return x + h / 8 * (a + 3 * b + 3 * c + d)


STEP = {"euler": euler, "midpoint": midpoint, "heun2": heun2, "heun3": heun3, "rk4": rk4}


def by_hand(method, f, x, stops):
    for start, stop in pairwise(stops):
        x = STEP[method](f, start, x, stop - start)
    return x


def stops_between(start, stop, grid=GRID):
    inner = [t for t in grid if min(start, stop) < t < max(start, stop)]
    return [start, *(inner if start < stop else inner[::-1]), stop]


def turning(weight):
    return lambda t, x: torch.tanh(x @ weight.T + 3 * t)


def dynamics(weight):
    f = turning(weight)
    return lambda t, state: (f(t, state[0]),)


@pytest.fixture
def captured(monkeypatch):
    """As if a graph were being captured."""
    monkeypatch.setattr(fixed, "captured", lambda: True)


@pytest.mark.parametrize("gradient", ["auto", "backprop", "checkpoint", "adjoint"])
@pytest.mark.parametrize("loop", ["torchdiffeq's", "captured"])
def test_euler_for_the_exponential_is_the_product_of_its_steps(gradient, loop, monkeypatch):
    monkeypatch.setattr(fixed, "captured", lambda: loop == "captured")
    solver, widths = Solver("euler", grid=GRID, gradient=gradient), np.diff(GRID)

    def field(t, state):
        return state[0], 2 * t.expand(1)

    zero = torch.zeros(1, dtype=F64)
    (x, y), nfe = solve(field, (torch.ones(1, dtype=F64), zero), 0.0, 1.0, solver, ())
    assert x.item() == pytest.approx(np.prod(1 + widths), rel=1e-14) and nfe == 6
    # each step of dy/dt = 2t takes the slope of where it begins
    assert y.item() == pytest.approx((widths * 2 * np.array(GRID[:-1])).sum(), rel=1e-14)
    (x, y), nfe = solve(field, (torch.ones(1, dtype=F64), zero), 1.0, 0.0, solver, ())
    assert x.item() == pytest.approx(np.prod(1 - widths), rel=1e-14) and nfe == 6
    assert y.item() == pytest.approx(-(widths * 2 * np.array(GRID[1:])).sum(), rel=1e-14)


@pytest.mark.parametrize("loop", ["torchdiffeq's", "captured"])
@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
@pytest.mark.parametrize("ends", ENDS, ids=str)
@pytest.mark.parametrize("method", STAGES)
def test_each_method_takes_the_steps_of_its_tableau(method, ends, dtype, loop, monkeypatch):
    monkeypatch.setattr(fixed, "captured", lambda: loop == "captured")
    stops = stops_between(*ends)
    solver = Solver(method, grid=GRID)
    (x,), nfe = solve(dynamics(A.to(dtype)), (X0.to(dtype),), *ends, solver, ())
    expected = by_hand(method, turning(A), X0, stops)
    tolerance = 1e-13 if dtype == F64 else 3e-6
    torch.testing.assert_close(x.double(), expected, rtol=0, atol=tolerance)
    assert nfe == (len(stops) - 1) * STAGES[method] and x.dtype == dtype
    equal = by_hand(method, turning(A), X0, np.linspace(*ends, len(stops)).tolist())
    assert (equal - expected).abs().max() > 10 * tolerance


@pytest.mark.parametrize("gradient", ["auto", "backprop", "checkpoint"])
@pytest.mark.parametrize("ends", ENDS, ids=str)
@pytest.mark.parametrize("method", STAGES)
def test_gradients_equal_those_of_steps_by_hand(method, ends, gradient):
    solver, found = Solver(method, grid=GRID, gradient=gradient, segments=3), []
    for ours in (True, False):
        weight, x0 = A.clone().requires_grad_(), X0.clone().requires_grad_()
        if ours:
            (x,), _ = solve(dynamics(weight), (x0,), *ends, solver, (weight,))
        else:
            x = by_hand(method, turning(weight), x0, stops_between(*ends))
        found.append(torch.autograd.grad(x.pow(3).sum(), (weight, x0)))
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)
    assert found[0][0].abs().min() > 1e-2


@pytest.mark.parametrize(
    "ends",
    ENDS,
    ids=str,
)
@pytest.mark.parametrize("method", ["midpoint", "rk4"])
def test_adjoint_uses_the_same_grid_backwards(method, ends):
    grid = tuple(math.sin(math.pi / 2 * k / 24) for k in range(24)) + (1.0,)
    found = []
    for gradient in ("backprop", "adjoint"):
        weight, x0 = A.clone().requires_grad_(), X0.clone().requires_grad_()
        solver = Solver(method, grid=grid, gradient=gradient)
        with record() as stats:
            (x,), nfe = solve(dynamics(weight), (x0,), *ends, solver, (weight,))
            found.append(torch.autograd.grad(x.pow(3).sum(), (weight, x0)))
        assert nfe == stats.forward == (len(stops_between(*ends, grid)) - 1) * STAGES[method]
    assert stats.backward == stats.forward  # step for step
    atol = 5e-2 if method == "midpoint" else 1e-4  # two discretizations of one gradient
    torch.testing.assert_close(*found, rtol=0, atol=atol)


@pytest.mark.parametrize("gradient", ["backprop", "checkpoint", "adjoint"])
@pytest.mark.parametrize("ends", ENDS[:2], ids=str)
@pytest.mark.parametrize("method", ["euler", "rk4"])
def test_path_stops_at_its_times_and_at_those_of_the_grid(method, ends, gradient):
    times = [0.0, 0.1, 0.4, 0.41, 0.7, 1.0]
    times = times if ends[0] < ends[1] else times[::-1]
    solver, weight = Solver(method, grid=GRID, gradient=gradient), A.clone().requires_grad_()
    (path,), nfe = solve_path(dynamics(weight), (X0,), times, solver, (weight,))
    joined = sorted({*times, *GRID}, reverse=ends[0] > ends[1])
    assert len(path) == 6 and nfe == (len(joined) - 1) * STAGES[method]
    for k, t in enumerate(times):
        expected = by_hand(method, turning(A), X0, joined[: joined.index(t) + 1])
        torch.testing.assert_close(path[k].detach(), expected, rtol=0, atol=1e-13)


def test_path_in_float32_has_no_tiny_steps():
    grid = tuple(float(t) for t in np.linspace(0, 1, 11))
    times = torch.linspace(0, 1, 11).tolist()  # the same to float32's rounding
    x0, solver = X0.float(), Solver("euler", grid=grid)
    (path,), _ = solve_path(dynamics(A.float()), (x0,), times, solver, ())
    expected = by_hand("euler", turning(A), X0, grid)
    torch.testing.assert_close(path[-1].double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("gradient", ["backprop", "checkpoint", "adjoint"])
@pytest.mark.parametrize("method", ["euler", "heun3"])
def test_each_block_uses_its_part_of_the_grid(method, gradient, randomized):
    """Three blocks: knots at 1/3 and 2/3 are steps' ends, too."""
    field = randomized(Piecewise([MLPField(2, (5,)) for _ in range(3)]))
    transform = Continuous(field, Solver(method, grid=GRID, gradient=gradient))
    ascending = sorted({*GRID, 1 / 3, 2 / 3})
    for towards, stops in (("data", ascending), ("base", ascending[::-1])):
        solved = transform.integrate(X0, towards=towards)
        x, ladj = X0, torch.zeros(3, dtype=F64)
        for start, stop in pairwise(stops):
            block = int(3 * (start + stop) / 2)

            def joint(t, state, block=block):
                t = torch.as_tensor(3 * t - block, dtype=F64)
                v, div = field.pieces[block].field.with_divergence(t, state[:, :2])
                return torch.cat([3 * v, 3 * div[:, None]], 1)

            state = STEP[method](joint, start, torch.cat([x, ladj[:, None]], 1), stop - start)
            x, ladj = state[:, :2], state[:, 2]
        torch.testing.assert_close(solved.value, x, rtol=0, atol=1e-12)
        torch.testing.assert_close(solved.ladj, ladj, rtol=0, atol=1e-12)
        assert solved.nfe == 8 * STAGES[method] and ladj.abs().max() > 0.1


@pytest.mark.parametrize("wrapped", [False, True])
def test_knot_on_the_grid_adds_no_step(wrapped, randomized):
    field = Piecewise([MLPField(2, (5,), 1), MLPField(2, (5,), 1)])
    field = randomized(Preconditioned(NullContext(field)) if wrapped else field)
    transform = Continuous(field, Solver("heun2", grid=(0.0, 0.2, 0.5, 1.0)))
    context = torch.ones(3, 1, dtype=F64)
    assert transform.integrate(X0, context, towards="data").nfe == 6
    found = transform.trajectory(X0, [0.0, 0.3, 0.5, 1.0], context)
    finer = Continuous(field, Solver("heun2", grid=(0.0, 0.2, 0.3, 0.5, 1.0)))
    for k, stop in ((2, 0.5), (3, 1.0)):
        expected = finer.integrate(X0, context, towards="data", stop=stop).value
        torch.testing.assert_close(found[k], expected, rtol=0, atol=1e-12)


def test_inverse_uses_the_reversed_grid_and_trajectory_ends_at_the_samples(small_flow):
    flow = small_flow("cnf", solver=Solver("midpoint", grid=GRID))
    z = X0[:, :2]
    x = flow.decode(z)
    y = (x - flow.preprocess.loc) / flow.preprocess.scale

    def field(t, x):
        return flow.field(torch.as_tensor(t, dtype=F64), x)

    torch.testing.assert_close(y, by_hand("midpoint", field, z, GRID), rtol=0, atol=1e-12)
    back = by_hand("midpoint", field, y, GRID[::-1])
    torch.testing.assert_close(flow.encode(x), back, rtol=0, atol=1e-12)
    torch.testing.assert_close(flow.trajectory(z, GRID)[-1], x, rtol=0, atol=1e-12)
    at = [flow.preprocess(by_hand("midpoint", field, z, GRID[: k + 1]))[0] for k in range(7)]
    torch.testing.assert_close(flow.trajectory(z, GRID), torch.stack(at), rtol=0, atol=1e-12)


def test_partial_solve_uses_the_grid_up_to_its_stop(small_flow):
    flow = small_flow("rnode", solver=Solver("euler", grid=GRID))
    found = flow.transform.integrate(X0, towards="base", stop=0.3)

    def field(t, x):
        return flow.field(torch.as_tensor(t, dtype=F64), x)

    expected = by_hand("euler", field, X0, [1.0, 0.8, 0.45, 0.4, 0.3])
    torch.testing.assert_close(found.value, expected, rtol=0, atol=1e-12)
    assert found.nfe == 4


@pytest.mark.parametrize("name", ["cnf", "otflow"])
def test_captured_flow_uses_the_same_grid(name, captured, small_flow):
    flow = small_flow(name, solver=Solver("rk4", grid=GRID))
    found = flow.log_prob(X0), flow.decode(X0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fixed, "captured", lambda: False)
        expected = flow.log_prob(X0), flow.decode(X0)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_refined_solver_halves_each_step():
    fine = Solver("heun2", grid=(0.0, 0.2, 1.0), gradient="backprop").refined()
    assert fine.grid == pytest.approx((0.0, 0.1, 0.2, 0.6, 1.0)) and fine.steps == 4
    assert (fine.method, fine.gradient) == ("heun2", "backprop")
    assert fine.refined().grid == pytest.approx((0, 0.05, 0.1, 0.15, 0.2, 0.4, 0.6, 0.8, 1))


def test_error_bars_refine_the_grid():
    rate = torch.nn.Parameter(torch.tensor(0.5, dtype=F64))

    class Growth(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.rate = rate

        def forward(self, t, x):
            return self.rate * x

    transform = Continuous(Adapter(Growth(), (2,)), Solver("euler", grid=(0.0, 0.2, 1.0)))
    flow = Flow(None, transform, event_shape=(2,)).double()
    estimate = log_prob_with_error(flow, torch.ones(1, 2, dtype=F64))

    def value(*widths):
        z = np.prod([1 - 0.5 * h for h in widths])
        return -math.log(2 * math.pi) - z**2 - sum(widths)  # ladj = -2·0.5·1

    assert estimate.value.item() == pytest.approx(value(0.2, 0.8), abs=1e-12)
    expected = abs(value(0.1, 0.1, 0.4, 0.4) - value(0.2, 0.8))
    assert estimate.solver_error.item() == pytest.approx(expected, rel=1e-9)


def test_check_accepts_a_flow_on_a_grid():
    grid = tuple(k / 20 for k in range(20)) + (1.0,)
    flow = cnf.models.build("otflow", dim=2, hidden=(6, 6), solver=Solver("rk4", grid=grid))
    assert cnf.check(flow, n=4).findings[0].name != "set-up"


@pytest.mark.parametrize(
    "given",
    [list, iter, np.array, torch.tensor],
)
def test_grid_may_be_any_sequence_of_numbers(given):
    assert Solver("euler", grid=given(GRID)).grid == pytest.approx(GRID)


def test_grid_sets_the_number_of_steps_and_is_printed():
    solver = Solver("rk4", grid=GRID)
    assert (solver.steps, solver.evaluations) == (6, 24)
    assert str(solver) == "rk4, 6 steps on a grid"
    assert Solver("rk4", steps=6, grid=GRID) == solver and hash(solver) == hash(solver)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"grid": (0.0, 0.5)}, r"a grid ascending from 0 to 1"),
        ({"grid": (0.1, 1.0)}, r"a grid ascending from 0 to 1"),
        ({"grid": (0.0, 0.6, 0.5, 1.0)}, r"ascending .* got \(0.0, 0.6, 0.5, 1.0\) and euler"),
        ({"grid": (0.0, 0.5, 0.5, 1.0)}, "ascending"),
        ({"grid": (1.0, 0.0)}, "ascending"),
        ({"grid": (0.0, float("nan"), 1.0)}, "ascending"),
        ({"grid": (1.0,)}, "ascending"),
        ({"grid": ()}, "ascending"),
        ({"grid": (0.0, 1.0), "method": "dopri5"}, "one of euler, midpoint, .* and dopri5"),
        ({"grid": (0.0, 1.0), "method": "explicit_adams"}, "and explicit_adams"),
        ({"grid": (0.0, 1.0), "steps": 2}, "steps=1 or None for a grid .* got 2"),
    ],
)
def test_invalid_grids_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Solver(**{"method": "euler", **options})


def test_every_step_of_a_grid_is_taken_or_refused():
    with pytest.raises(ValueError, match="steps of a grid above 2e-06"):
        Solver("euler", grid=(0.0, 5e-7, 0.5, 1.0))
    solver = Solver("euler", grid=(0.0, 3e-6, 0.5, 1.0))
    (_,), nfe = solve(dynamics(A), (X0,), 0.0, 1.0, solver, ())
    assert nfe == solver.evaluations


@pytest.mark.parametrize("source", ["built", "replaced", "from a file's words"])
def test_flow_on_a_grid_is_saved_and_loaded(source, tmp_path):
    solver = Solver("heun2", grid=GRID, gradient="backprop")
    if source == "built":
        flow = cnf.models.build("cnf", dim=2, hidden=(6,), solver=solver)
    elif source == "replaced":
        flow = cnf.models.build("cnf", dim=2, hidden=(6,)).with_solver(solver)
    else:
        words = json.loads(json.dumps(asdict(solver)))
        flow = cnf.models.build("cnf", dim=2, hidden=(6,), solver=words)
    assert Solver.of(json.loads(json.dumps(asdict(solver)))) == solver
    flow = flow.double()
    back = cnf.load(checkpoint.save(flow, tmp_path / "flow.safetensors"))
    assert back.transform.solver == solver
    assert torch.equal(back.log_prob(X0), flow.log_prob(X0))


def test_run_with_a_grid_saves_its_settings_and_resumes(tmp_path):
    settings = {"batch_size": 16, "validations": 0, "progress": False, "device": "cpu"}
    solver = Solver("euler", grid=(0.0, 0.3, 1.0))
    x = torch.randn(64, 2, generator=torch.Generator().manual_seed(0))

    def run(**more):
        torch.manual_seed(0)
        flow = cnf.models.build("cnf", dim=2, hidden=(4,)).with_solver(solver)
        config = cnf.TrainConfig(steps=3, folder=tmp_path / "run", **settings, **more)
        cnf.fit(flow, cnf.FlowMatching(), x, config)
        return flow

    flow, again = run(), run(resume=True)
    back = cnf.load(tmp_path / "run")
    assert back.transform.solver == solver
    for one in (back, again):
        assert torch.equal(one.decode(x[:4]), flow.decode(x[:4]))
