"""Solving ODEs: the one file that touches torchdiffeq."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torchdiffeq
from torch import Tensor

from cnf.dynamics.solver import Solver
from cnf.errors import SolverError

State = tuple[Tensor, ...]
Dynamics = Callable[[Tensor, State], State]


class Solution(NamedTuple):
    """What `solve` returns: the final state, and the evaluations of the dynamics that it took."""

    state: State
    nfe: int


@dataclass
class _Counts:
    forward: int = 0
    backward: int = 0


@dataclass
class Stats:
    """Evaluations counted by `record`; those of backward solves are counted even afterwards."""

    _counters: list[_Counts] = field(default_factory=list, repr=False)

    @property
    def solves(self) -> int:
        """Number of solves."""
        return len(self._counters)

    @property
    def forward(self) -> int:
        """Evaluations of the dynamics in forward solves."""
        return sum(counter.forward for counter in self._counters)

    @property
    def backward(self) -> int:
        """Evaluations in backward solves (the adjoint's; backprop evaluates nothing again)."""
        return sum(counter.backward for counter in self._counters)


_recording: ContextVar[tuple[Stats, ...]] = ContextVar("recording", default=())


@contextmanager
def record() -> Iterator[Stats]:
    """Count the evaluations of every solve inside, under any nesting.

    >>> with record() as stats:
    ...     _ = solve(lambda t, y: y, (torch.ones(1),), 0.0, 1.0, Solver("rk4", steps=2), ())
    >>> stats.forward, stats.backward, stats.solves
    (8, 0, 1)
    """
    stats = Stats()
    token = _recording.set((*_recording.get(), stats))
    try:
        yield stats
    finally:
        _recording.reset(token)


class _Counted:
    """The dynamics, counted, stopped at `max_nfe`, remembered to explain a failure."""

    def __init__(self, dynamics: Dynamics, solver: Solver, start: float) -> None:
        self.dynamics, self.solver = dynamics, solver
        self.counts = _Counts()  # not self: a record must not keep the solve's tensors alive
        self.in_forward = True
        self.restart(start)
        for stats in _recording.get():
            stats._counters.append(self.counts)

    def restart(self, start: float) -> None:
        self.start, self.nfe = start, 0
        self.last: tuple[Tensor, State] | None = None

    def __call__(self, t: Tensor, state: State) -> State:
        if self.nfe >= self.solver.max_nfe:
            raise self.error(
                "too many evaluations: the field is stiff or the tolerance out of reach",
                "Loosen rtol and atol, lower the learning rate, regularise, or raise max_nfe.",
            )
        self.nfe += 1
        if self.in_forward:
            self.counts.forward += 1
        else:
            self.counts.backward += 1
        rates = self.dynamics(t, state)
        self.last = (t.detach(), tuple(rate.detach() for rate in rates))
        return rates

    def error(self, cause: str, remedy: str) -> SolverError:
        t = math.nan if self.last is None else self.last[0].item()
        t = t if math.isfinite(t) else self.start  # a NaN at the first point makes the step NaN
        return SolverError(cause, remedy, t=t, nfe=self.nfe, settings=str(self.solver))

    def callback_step_adjoint(self, t: Tensor, state: State, dt: Tensor) -> None:
        """Called by torchdiffeq before each backward step, ahead of its own bare assertions."""
        self.check_gradients((dt, *state[1:3]))
        if not self.solver.fixed and t + dt == t:
            raise self.explain()

    def check_gradients(self, parts: Sequence[Tensor | None]) -> None:
        if not all(part is None or part.isfinite().all() for part in parts):
            raise self.error(
                "the gradient became NaN or infinite in the backward solve",
                "Check the inputs' scale, clip gradients, or lower the learning rate.",
            )

    def watch_backward(self, path: State, stop: float) -> None:
        """Each backward solve is counted anew and its result checked; a second derivative, which
        the adjoint would silently leave out, is refused."""
        node: Any = path[0].grad_fn
        while node is not None and not node.name().startswith("OdeintAdjoint"):
            node = node.next_functions[0][0]
        if node is None:
            return

        def before(_: Any) -> None:
            if torch.is_grad_enabled():  # create_graph=True
                raise RuntimeError(
                    "solve: the adjoint has first derivatives only; for a second one "
                    'take Solver(gradient="backprop")'
                )
            self.restart(stop)

        node.register_prehook(before)
        node.register_hook(lambda inputs, _: self.check_gradients(inputs))

    def explain(self) -> SolverError:
        """Why the solver gave up, told from the last evaluation."""
        if self.last is not None and not all(rate.isfinite().all() for rate in self.last[1]):
            return self.error(
                "the field returned NaN or infinity",
                "Check the inputs' scale, or lower the learning rate.",
            )
        return self.error(
            "the step fell below what the dtype resolves: the field is stiff or discontinuous",
            "Loosen rtol/atol, compute in float64, or take a fixed-step method.",
        )


def solve(
    dynamics: Dynamics,
    state: State,
    t0: float,
    t1: float,
    solver: Solver,
    params: Sequence[Tensor],
) -> Solution:
    """Solve d state/dt = dynamics(t, state) from t0 to t1 (t1 < t0 is allowed).

    Args:
        dynamics: (t of shape (), state) → rates, one tensor for each of the state's, of its shape.
        state: The initial state, tensors of one floating dtype, float32 or wider.
        t0: Time of `state`.
        t1: Time of the answer.
        solver: Method, tolerances, gradient mode.
        params: Every tensor, besides the state, that the adjoint must send a gradient to:
            parameters and the context.
    Raises:
        SolverError: NaN in the field, a stiff field, too many evaluations, too narrow a dtype.
    """
    path, nfe = solve_path(dynamics, state, [t0, t1], solver, params)
    return Solution(tuple(values[-1] for values in path), nfe)


def solve_path(
    dynamics: Dynamics,
    state: State,
    times: Sequence[float],
    solver: Solver,
    params: Sequence[Tensor],
) -> tuple[State, int]:
    """As `solve`, with the state at each of `times` (monotone): shapes (len(times), …)."""
    dtype = state[0].dtype
    if dtype not in (torch.float32, torch.float64):
        raise SolverError(
            f"a state of dtype {dtype} is too coarse for error control",
            "Keep the state in float32 or float64 and put autocast inside the field.",
            t=times[0], nfe=0, settings=str(solver),
        )  # fmt: skip
    if not any(part.numel() for part in state):  # its norm, and so the step size, would be NaN
        return tuple(part.expand(len(times), *part.shape) for part in state), 0
    counted = _Counted(dynamics, solver, times[0])
    grid = torch.tensor(times, dtype=dtype, device=state[0].device)
    needs_adjoint = solver.gradient == "adjoint" and torch.is_grad_enabled()
    try:
        if needs_adjoint:
            path: Any = torchdiffeq.odeint_adjoint(
                counted, state, grid, **_arguments(solver, times),
                adjoint_rtol=solver.adjoint_rtol, adjoint_atol=solver.adjoint_atol,
                adjoint_params=tuple(p for p in params if p.requires_grad),
            )  # fmt: skip
        else:
            path = torchdiffeq.odeint(counted, state, grid, **_arguments(solver, times))
    except AssertionError as error:
        if not str(error).startswith(("underflow in dt", "non-finite values")):
            raise  # the field's own
        raise counted.explain() from error
    nfe = counted.nfe
    if solver.fixed and not all(torch.isfinite(values[-1]).all() for values in path):
        raise counted.explain()
    counted.in_forward = False
    counted.restart(times[-1])
    if needs_adjoint:
        counted.watch_backward(path, times[-1])
    return path, nfe


def _arguments(solver: Solver, times: Sequence[float]) -> dict[str, Any]:
    arguments: dict[str, Any] = {"method": solver.method, "rtol": solver.rtol, "atol": solver.atol}
    if solver.fixed:
        # Not torchdiffeq's step_size: it rounds up, so that 1/49 takes 50 steps. Times between the
        # steps join the grid: the answer there is a solver's step, not a line between two of them.
        assert solver.steps is not None
        start, stop, steps = times[0], times[-1], solver.steps

        def grid(func: Any, y0: Tensor, t: Tensor) -> Tensor:
            ends = (t[0].item(), t[-1].item())
            low, high = min(ends), max(ends)
            width = abs(stop - start) / steps
            count = max(1, round((high - low) / width))
            regular = torch.linspace(low, high, count + 1, dtype=t.dtype, device=t.device)
            points = torch.unique(torch.cat([regular, t])) if len(t) > 2 else regular
            return points if ends[0] < ends[1] else points.flip(0)

        arguments["options"] = {"grid_constructor": grid}
    else:
        # Land on each time: torchdiffeq steps past it and interpolates back, with an error that
        # nothing controls, and asks the field for times that do not exist.
        arguments["options"] = {"step_t": torch.tensor(times, dtype=torch.float64)}
    return arguments
