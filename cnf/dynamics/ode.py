"""ODE solves by torchdiffeq."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torchdiffeq
from torch import Tensor

from cnf.dynamics import fixed
from cnf.dynamics.adaptive import METHODS
from cnf.dynamics.monitor import (
    Dynamics,
    InstrumentedDynamics,
    State,
    TooMuchMemory,
    all_finite,
    count,
    record,
    saved_bytes,
)
from cnf.dynamics.solver import ENDS, MULTISTEP, STAGES, Solver
from cnf.errors import SolverError
from cnf.rematerialize import checkpointed

__all__ = ["Dynamics", "Solution", "State", "count", "record", "solve", "solve_path"]

GIB = 2**30
DTYPES = torch.float32, torch.float64
FINEST = 5e-4  # least tolerance in units of eps: below it, rounding makes the step size collapse

Norm = Callable[[Sequence[Tensor]], Tensor]


class Solution(NamedTuple):
    """The result of `solve`.

    Attributes:
        state: The final state.
        nfe: Number of evaluations of the dynamics.
    """

    state: State
    nfe: int


class Step(NamedTuple):
    """A step of a solver's method, one of `fixed.TABLEAUX`, made for one field.

    Attributes:
        take: From its start and length, tensors of shape (), and the state, to the next state.
        saved: Bytes that autograd saves for an evaluation in eager mode, by the state's shapes.
    """

    take: Callable[[Tensor, Tensor, State], State]
    saved: dict[tuple[torch.Size, ...], int]


def solve(
    dynamics: Dynamics,
    state: State,
    t0: float,
    t1: float,
    solver: Solver,
    params: Sequence[Tensor],
    step: Step | None = None,
) -> Solution:
    """Solve d state/dt = dynamics(t, state) from t0 to t1 (t1 < t0 is allowed).

    Under `torch.compile`, `torch.func` and the capture of a CUDA graph, a fixed-step solve is a
    loop that each of them supports, differentiated by backprop. Other solves are not compiled by
    `torch.compile`, and not possible under `torch.func`.

    Args:
        dynamics: Function of t, shape (), and the state; it returns rates, one tensor of the same
            shape for each of the state's tensors.
        state: The initial state, tensors of one floating dtype, float32 or wider. For
            `norm="rows"` their first axis is that of the rows.
        t0: Initial time.
        t1: Final time.
        solver: Method, tolerances and gradient mode.
        params: All tensors other than the state for which "adjoint" and "checkpoint" compute
            gradients: parameters and the context.
        step: A step of the solver's method, which is compiled: used in place of the dynamics
            where backprop through all steps is wanted, and fits in the memory.

    Returns:
        The final state and the number of evaluations.

    Raises:
        SolverError: The field returned NaN, is too stiff or needs too many evaluations, or the
            dtype is too narrow.
        TypeError: An adaptive or multistep method under `torch.func`.
    """
    if step is not None and _may_step(step, dynamics, state, t0, solver):
        found = state
        for t, h in fixed.steps_between(solver.stops(t0, t1), state[0]):
            found = step.take(t, h, found)
        if all_finite(found):  # else solve_path explains
            assert solver.evaluations is not None
            count(solver.evaluations)
            return Solution(found, solver.evaluations)
    path, nfe = solve_path(dynamics, state, [t0, t1], solver, params)
    return Solution(tuple(values[-1] for values in path), nfe)


def solve_path(
    dynamics: Dynamics,
    state: State,
    times: Sequence[float],
    solver: Solver,
    params: Sequence[Tensor],
) -> tuple[State, int]:
    """Solve as `solve` does, with the state at several times.

    Args:
        dynamics: The dynamics, see `solve`.
        state: The state at times[0].
        times: Times at which the state is returned, monotone.
        solver: Method, tolerances and gradient mode.
        params: All tensors other than the state that need gradients, see `solve`.

    Returns:
        The states, tensors of shape (len(times), …), and the number of evaluations.
    """
    if fixed.captured():
        return _captured(dynamics, state, times, solver, params)
    dtype = state[0].dtype
    if dtype not in DTYPES:
        raise SolverError(
            f"a state of dtype {dtype} is too coarse for error control",
            "Keep the state in float32 or float64 and put autocast inside the field.",
            t=times[0], nfe=0, settings=str(solver),
        )  # fmt: skip
    finest = FINEST * torch.finfo(dtype).eps
    if solver.has_error_control and max(solver.rtol, solver.atol) < finest:
        raise SolverError(
            f"the tolerances are below the resolution of {dtype}",
            "Raise rtol and atol, or solve in float64: flow.double().log_prob(x.double()).",
            t=times[0], nfe=0, settings=str(solver),
        )  # fmt: skip
    if not any(part.numel() for part in state):  # its norm, and so the step size, would be NaN
        return tuple(part.expand(len(times), *part.shape) for part in state), 0
    instrumented = InstrumentedDynamics(dynamics, solver, times[0])
    path = _differentiable(instrumented, state, times, params)
    nfe = instrumented.nfe
    if not (solver.has_error_control or all_finite(_last(path))):
        raise instrumented.explain()
    instrumented.start_backward(times[-1])
    return path, nfe


def _may_step(step: Step, dynamics: Dynamics, state: State, start: float, solver: Solver) -> bool:
    """Whether backprop through all steps is wanted, and fits in the solver's memory."""
    if fixed.captured() or not state[0].numel() or state[0].dtype not in DTYPES:
        return False
    if (solver.evaluations or 0) > solver.max_nfe:
        return False  # `solve_path` says so
    if not torch.is_grad_enabled() or solver.gradient == "backprop":
        return True
    if solver.gradient != "auto":
        return False
    shapes = tuple(part.shape for part in state)
    if shapes not in step.saved:
        step.saved[shapes] = saved_bytes(dynamics, _tensor([start], state)[0], state)[0]
    return step.saved[shapes] * (solver.evaluations or 0) <= solver.memory * GIB


def _captured(
    dynamics: Dynamics,
    state: State,
    times: Sequence[float],
    solver: Solver,
    params: Sequence[Tensor],
) -> tuple[State, int]:
    """`solve_path` inside of torch.compile, torch.func or the capture of a CUDA graph."""
    if solver.evaluations is None:
        if torch.compiler.is_compiling():
            outside: Any = torch.compiler.disable(solve_path)
            return outside(dynamics, state, times, solver, params)
        raise TypeError(
            f"solve: torch.func (grad, vmap, jacrev, …) and CUDA graphs do not support "
            f"{solver.method}, whose steps depend on the values; take a fixed-step solver: "
            'flow.with_solver(Solver("rk4", steps=16, gradient="backprop"))'
        )
    stops = solver.stops(times[0], times[-1])
    stretches = [_times_with_stops(stops, t0, t1) for t0, t1 in pairwise(times)]
    remaining = iter(stretches)
    path = _solve_between(
        lambda y, *_: fixed.integrate(dynamics, y, next(remaining), solver.method), state, times
    )
    nfe = STAGES[solver.method] * sum(len(stretch) - 1 for stretch in stretches)
    if not fixed.transformed():
        count(nfe)
    return path, nfe


def _times_with_stops(stops: Sequence[float], t0: float, t1: float) -> list[float]:
    """The time t0, the stops between t0 and t1, and the time t1."""
    low, high = min(t0, t1) + ENDS, max(t0, t1) - ENDS
    return [t0, *(stop for stop in stops if low < stop < high), t1]


def _differentiable(
    dynamics: InstrumentedDynamics, state: State, times: Sequence[float], params: Sequence[Tensor]
) -> State:
    """The path, with the graph for `Solver.gradient` if gradients are enabled."""
    solver = dynamics.solver
    if not torch.is_grad_enabled() or solver.gradient == "backprop":
        return _odeint(dynamics, state, times)
    if solver.gradient == "checkpoint":
        return _checkpointed(dynamics, state, times, params)
    if solver.gradient == "auto" and solver.method != "scipy_solver":
        dynamics.limit = solver.memory * GIB
        try:
            return _odeint(dynamics, state, times)
        except TooMuchMemory:
            # An adaptive method restarts in each segment, so that the adjoint is faster.
            saved = dynamics.saved * (solver.evaluations or math.inf) / solver.segments
            fits = saved <= dynamics.limit
        finally:
            dynamics.limit = None
        dynamics.restart(times[0])
        if fits:
            return _checkpointed(dynamics, state, times, params)
    return _odeint_adjoint(dynamics, state, times, params)


def _odeint(dynamics: InstrumentedDynamics, state: State, times: Sequence[float]) -> State:
    arguments = _arguments(dynamics, times)

    def run(state: State, *times: float) -> State:
        odeint: Any = torchdiffeq.odeint
        return odeint(dynamics, state, _tensor(times, state), **arguments)

    return _restarted(run, dynamics.solver, state, times)


def _odeint_adjoint(
    dynamics: InstrumentedDynamics, state: State, times: Sequence[float], params: Sequence[Tensor]
) -> State:
    solver = dynamics.solver
    arguments = _arguments(dynamics, times)
    backward = {**arguments["options"]}
    if solver.has_error_control:
        backward["norm"] = _adjoint_norm(solver, len(state))
    if solver.grid is not None and times[0] > times[-1]:  # torchdiffeq has reversed time by then
        grid = backward["grid_constructor"]
        backward["grid_constructor"] = lambda func, y0, t: -grid(func, y0, -t)

    def run(state: State, *times: float) -> State:
        path: Any = torchdiffeq.odeint_adjoint(
            dynamics, state, _tensor(times, state), **arguments, adjoint_options=backward,
            adjoint_rtol=solver.adjoint_rtol, adjoint_atol=solver.adjoint_atol,
            adjoint_params=tuple(p for p in params if p.requires_grad),
        )  # fmt: skip
        dynamics.instrument_adjoint(path, times[-1])
        return path

    return _restarted(run, solver, state, times)


def _restarted(
    run: Callable[..., State], solver: Solver, state: State, times: Sequence[float]
) -> State:
    """The path of a run, which multistep methods restart at each time.

    They assume that the previous steps are equal.
    """
    if solver.method in MULTISTEP and len(times) > 2:
        return _solve_between(lambda y, *ends: _last(run(y, *ends)), state, times)
    return run(state, *times)


def _checkpointed(
    dynamics: InstrumentedDynamics, state: State, times: Sequence[float], params: Sequence[Tensor]
) -> State:
    """Backprop that stores only the state between segments, and recomputes each segment."""
    arguments = _arguments(dynamics, times)
    odeint: Any = torchdiffeq.odeint
    knots = times if len(times) > 2 else _knots(dynamics.solver, times[0], times[1])

    def run(state: State, t0: float, t1: float) -> State:
        def segment(state: State) -> State:
            if dynamics.in_forward:
                dynamics.start = t0
            else:
                dynamics.restart(t0)
            return _last(odeint(dynamics, state, _tensor([t0, t1], state), **arguments))

        return checkpointed(segment, state, params)

    path = _solve_between(run, state, knots)
    return path if len(times) > 2 else tuple(values[[0, -1]] for values in path)


def _solve_between(
    run: Callable[[State, float, float], State], state: State, times: Sequence[float]
) -> State:
    path = [state]
    for t0, t1 in pairwise(times):
        path.append(run(path[-1], t0, t1))
    return tuple(torch.stack(values) for values in zip(*path, strict=True))


def _last(path: State) -> State:
    return tuple(values[-1] for values in path)


def _knots(solver: Solver, t0: float, t1: float) -> list[float]:
    """Ends of the segments, which for a fixed-step method are also ends of its steps."""
    stops = solver.stops(t0, t1)
    count = min(solver.segments, len(stops) - 1)
    return [stops[k * (len(stops) - 1) // count] for k in range(count + 1)]


def _tensor(times: Sequence[float], state: State) -> Tensor:
    return torch.tensor(times, dtype=state[0].dtype, device=state[0].device)


def _arguments(dynamics: InstrumentedDynamics, times: Sequence[float]) -> dict[str, Any]:
    """The arguments of torchdiffeq for all of the times, or for two that follow each other."""
    solver = dynamics.solver
    return {
        "method": METHODS.get(solver.method, solver.method), "rtol": solver.rtol,
        "atol": solver.atol, "options": _options(dynamics, times),
    }  # fmt: skip


def _options(dynamics: InstrumentedDynamics, times: Sequence[float]) -> dict[str, Any]:
    solver = dynamics.solver
    if solver.has_error_control:
        return {"norm": _norm(solver), "failure": dynamics.failure}
    if solver.steps is None:
        return {}
    # torchdiffeq's step_size rounds up, so that 1/49 takes 50 steps. Times between the steps
    # are added to the grid, as torchdiffeq would interpolate linearly there.
    width = abs(times[-1] - times[0]) / solver.steps

    def grid(func: Any, y0: Tensor, t: Tensor) -> Tensor:
        t0, t1 = t[0].item(), t[-1].item()
        if solver.grid is None:
            steps = max(1, round(abs(t1 - t0) / width))
            points = torch.linspace(t0, t1, steps + 1, dtype=t.dtype, device=t.device)
        else:
            points = t.new_tensor(solver.stops(t0, t1))
        if len(t) > 2:
            # A point that differs from a time by rounding only would add a tiny step.
            apart = (points.unsqueeze(1) - t).abs().amin(1) > ENDS
            points = torch.cat([points[apart], t]).sort(descending=t0 > t1).values
        return points

    # explicit_adams is unstable with torchdiffeq's default, 12.
    return {"grid_constructor": grid, **({"max_order": 5} if solver.method in MULTISTEP else {})}


def _norm(solver: Solver) -> Norm:
    return _worst_row if solver.norm == "rows" else _worst_part


def _adjoint_norm(solver: Solver, parts: int) -> Norm:
    """The norm of the adjoint's state: that of the solver for the state and for its gradient."""
    norm = _norm(solver)

    def seminorm(values: Sequence[Tensor]) -> Tensor:
        _, *values = values  # the gradient with respect to time
        return torch.maximum(norm(values[:parts]), norm(values[parts : 2 * parts]))

    def full(values: Sequence[Tensor]) -> Tensor:
        params = values[1 + 2 * parts :]
        return torch.maximum(seminorm(values), _worst_part(params)) if params else seminorm(values)

    return seminorm if solver.adjoint_norm == "seminorm" else full


def _worst_part(parts: Sequence[Tensor]) -> Tensor:
    """The largest RMS norm of a part of the state."""
    return torch.stack([part.norm() / math.sqrt(part.numel()) for part in parts]).max()


def _worst_row(parts: Sequence[Tensor]) -> Tensor:
    """The largest RMS norm of a row, over all rows and parts of the state."""
    rows = [part.reshape(len(part) if part.dim() else 1, -1) for part in parts]
    return torch.stack([row.square().mean(-1).max() for row in rows]).max().sqrt()
