"""Solving ODEs: the one file that touches torchdiffeq."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torchdiffeq
from torch import Tensor

from cnf.errors import SolverError, UnknownNameError, expect_choice, expect_positive

State = tuple[Tensor, ...]
Dynamics = Callable[[Tensor, State], State]

ADAPTIVE = ("adaptive_heun", "bosh3", "dopri5", "dopri8", "fehlberg2")
FIXED = ("euler", "explicit_adams", "heun2", "heun3", "implicit_adams", "midpoint", "rk4")
GRADIENTS = ("adjoint", "backprop")


@dataclass(frozen=True)
class Solver:
    """How an ODE is solved and differentiated.

    >>> Solver("rk4", steps=8, gradient="backprop").steps
    8

    Args:
        method: Adaptive (dopri5, dopri8, bosh3, adaptive_heun, fehlberg2) or fixed-step (euler,
            midpoint, heun2, heun3, rk4, explicit_adams, implicit_adams).
        rtol: Relative tolerance of the adaptive methods.
        atol: Absolute tolerance of the adaptive methods.
        steps: Steps of a fixed-step method over the whole interval; required there, refused
            elsewhere.
        gradient: "adjoint" solves the adjoint ODE backwards (memory flat in the number of
            evaluations; first derivatives only), "backprop" differentiates the solver's own
            operations (memory grows with evaluations; exact gradient of what was computed, any
            order).
        adjoint_rtol: Relative tolerance of the backward solve; `rtol` if None.
        adjoint_atol: Absolute tolerance of the backward solve; `atol` if None.
        max_nfe: Evaluations of the dynamics allowed in one solve, and again in its backward solve,
            before a `SolverError`.
    Raises:
        ValueError: An unknown method or gradient, a tolerance that is not positive, steps missing
            or out of place.
    """

    method: str = "dopri5"
    rtol: float = 1e-5
    atol: float = 1e-5
    steps: int | None = None
    gradient: str = "adjoint"
    adjoint_rtol: float | None = None
    adjoint_atol: float | None = None
    max_nfe: int = 10_000

    def __post_init__(self) -> None:
        if self.method not in ADAPTIVE + FIXED:
            raise UnknownNameError("Solver method", self.method, ADAPTIVE + FIXED)
        expect_choice("Solver", "gradient", self.gradient, GRADIENTS)
        expect_positive(
            "Solver", rtol=self.rtol, atol=self.atol, max_nfe=self.max_nfe, steps=self.steps,
            adjoint_rtol=self.adjoint_rtol, adjoint_atol=self.adjoint_atol,
        )  # fmt: skip
        if self.fixed and self.steps is None:
            raise ValueError(f"Solver: {self.method} has no step-size control; give it steps=…")
        if not self.fixed and self.steps is not None:
            raise ValueError(
                f"Solver: {self.method} chooses its own steps; drop steps={self.steps}, "
                f"or take a fixed-step method: {', '.join(FIXED)}"
            )

    @property
    def fixed(self) -> bool:
        """Whether the steps are set beforehand."""
        return self.method in FIXED

    def __str__(self) -> str:
        if self.fixed:
            return f"{self.method}, {self.steps} steps"
        return f"{self.method}, rtol={self.rtol:g}, atol={self.atol:g}"


def as_solver(solver: "Solver | Mapping[str, Any] | None") -> Solver:
    """A `Solver` as it is, or one from its arguments (as a config file holds them)."""
    return solver if isinstance(solver, Solver) else Solver(**(solver or {}))


class Solution(NamedTuple):
    """What `solve` returns: the final state, and the evaluations of the dynamics that it took."""

    state: State
    nfe: int


@dataclass
class Stats:
    """Evaluations counted by `record`; those of backward solves are counted even afterwards."""

    _counters: list["_Counted"] = field(default_factory=list, repr=False)

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

    def __init__(self, dynamics: Dynamics, solver: Solver) -> None:
        self.dynamics, self.solver = dynamics, solver
        self.forward = self.backward = 0
        self.in_forward = True
        self.last: tuple[Tensor, State] | None = None
        for stats in _recording.get():
            stats._counters.append(self)

    @property
    def nfe(self) -> int:
        return self.forward if self.in_forward else self.backward

    def __call__(self, t: Tensor, state: State) -> State:
        if self.nfe >= self.solver.max_nfe:
            raise self.error(
                "too many evaluations: the field is stiff or the tolerance out of reach",
                "Loosen rtol and atol, lower the learning rate, regularise, or raise max_nfe.",
            )
        if self.in_forward:
            self.forward += 1
        else:
            self.backward += 1
        rates = self.dynamics(t, state)
        self.last = (t.detach(), tuple(rate.detach() for rate in rates))
        return rates

    def error(self, cause: str, remedy: str) -> SolverError:
        t = math.nan if self.last is None else self.last[0].item()
        return SolverError(cause, remedy, t=t, nfe=self.nfe, settings=str(self.solver))

    def callback_step_adjoint(self, t: Tensor, state: State, dt: Tensor) -> None:
        """Called by torchdiffeq before each backward step, ahead of its own bare assertions."""
        if not all(part.isfinite().all() for part in (dt, *state[1:3])):
            raise self.error(
                "the gradient became NaN or infinite in the backward solve",
                "Check the inputs' scale, clip gradients, or lower the learning rate.",
            )
        if not self.solver.fixed and t + dt == t:
            raise self.explain()

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
    counted = _Counted(dynamics, solver)
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
    except AssertionError as error:  # torchdiffeq's "underflow in dt" and "non-finite values"
        raise counted.explain() from error
    nfe = counted.forward
    if solver.fixed and not all(torch.isfinite(values[-1]).all() for values in path):
        raise counted.explain()
    counted.in_forward, counted.last = False, None
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
    return arguments
