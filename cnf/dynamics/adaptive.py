"""A loop of adaptive Runge-Kutta steps that waits for the device once a step.

torchdiffeq's loop keeps times on the device and branches on them, some 23 times a step. This loop
takes the same steps: by its tableaus, its choice of the first step and its step control, with
times that are Python numbers.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cnf.dynamics.monitor import Dynamics, State, StepFailed

SAFETY, LARGEST, SMALLEST = 0.9, 10.0, 0.2  # factors of the step size: torchdiffeq's defaults

Norm = Callable[[Sequence[Tensor]], Tensor]


@dataclass(frozen=True)
class Method:
    """An embedded Runge-Kutta pair.

    Args:
        order: Order of the step control.
        nodes: Times of the stages after the first, in units of the step.
        rows: Their weights of the slopes before them.
        weights: Weights of all slopes at the end of the step.
        errors: Weights of all slopes in the estimate of the error.
    """

    order: int
    nodes: Sequence[float]
    rows: Sequence[Sequence[float]]
    weights: Sequence[float]
    errors: Sequence[float]

    @classmethod
    def of(cls, solver: Any) -> "Method":
        """The method of a solver class of torchdiffeq."""
        tableau = solver.tableau
        return cls(
            solver.order, tableau.alpha.tolist(), [row.tolist() for row in tableau.beta],
            tableau.c_sol.tolist(), tableau.c_error.tolist(),
        )  # fmt: skip

    @property
    def ends_in_last_stage(self) -> bool:
        """Whether the state at the end of the step is that of the last stage."""
        return self.weights == [*self.rows[-1], 0]


@dataclass(frozen=True)
class Tolerance:
    """The error that a step may have.

    Args:
        rtol: Relative tolerance.
        atol: Absolute tolerance.
        norm: Function from a state's errors, in units of the tolerance, to a number, shape ().
    """

    rtol: float
    atol: float
    norm: Norm

    def scale(self, *states: State) -> State:
        """The tolerated error of each entry, by the largest of several states."""
        sizes = [tuple(part.abs() for part in state) for state in states]
        largest = sizes[0] if len(sizes) == 1 else map(torch.maximum, *sizes)
        return tuple(size.mul_(self.rtol).add_(self.atol) for size in largest)


def integrate(
    dynamics: Dynamics,
    state: State,
    times: Sequence[float],
    method: Method,
    tolerance: Tolerance,
) -> State:
    """Solve d state/dt = dynamics(t, state), with steps that end at each of the times.

    The graph for backprop consists of the accepted steps, whose sizes count as constants.

    Args:
        dynamics: Function of t, shape (), and the state; it returns rates.
        state: The state at times[0].
        times: Times at which the state is returned, monotone.
        method: The Runge-Kutta pair.
        tolerance: The error that a step may have.

    Returns:
        The states, tensors of shape (len(times), …).

    Raises:
        StepFailed: The error of a step is NaN, or the step size underflows.
    """
    t, sign = times[0], math.copysign(1.0, times[-1] - times[0])
    slope = dynamics(_scalar(t, state), state)
    size = _first_size(dynamics, t, sign, state, slope, method.order, tolerance)
    path = [state]
    for stop in times[1:]:
        while t != stop:
            end = t + sign * size
            if end == t or math.isnan(end):
                raise StepFailed(finite=end == t)
            if sign * (end - stop) > 0:
                end, size = stop, abs(stop - t)
            tried, slopes = _step(dynamics, t, end, state, slope, method)
            ratio = _error_ratio(state, tried, slopes, end - t, method, tolerance)
            if math.isnan(ratio):
                raise StepFailed(finite=False)
            if ratio <= 1:
                t, state, slope = end, tried, slopes[-1]
            size *= _factor(ratio, method.order)
        path.append(state)
    return tuple(torch.stack(values) for values in zip(*path, strict=True))


def _step(
    dynamics: Dynamics, t: float, end: float, state: State, slope: State, method: Method
) -> tuple[State, list[State]]:
    """The state at `end`, and the slopes at all stages."""
    h, slopes, stage = end - t, [slope], state
    for node, row in zip(method.nodes, method.rows, strict=True):
        # In a field that jumps at the end of the step, the side on which the step lies.
        at = _before(end, t, state) if node == 1 else t + node * h
        stage = _add(state, _increment(slopes, row, h))
        slopes.append(dynamics(_scalar(at, state), stage))
    if not method.ends_in_last_stage:
        stage = _add(state, _increment(slopes, method.weights, h))
    return stage, slopes


@torch.no_grad()
def _error_ratio(
    state: State,
    tried: State,
    slopes: Sequence[State],
    h: float,
    method: Method,
    tolerance: Tolerance,
) -> float:
    """The error in units of the tolerance; NaN if the state is not finite."""
    error = _increment(slopes, method.errors, h)
    scale = tolerance.scale(state, tried)
    ratio = tolerance.norm([part.div_(unit) for part, unit in zip(error, scale, strict=True)])
    # An infinite state has an infinite tolerance, and so no error: 0·∞ makes it NaN.
    largest = torch.stack([unit.amax() for unit in scale]).amax()
    return (ratio + 0 * largest).item()


def _factor(ratio: float, order: int) -> float:
    """The next step's size over this step's."""
    if ratio == 0:
        return LARGEST
    smallest = 1.0 if ratio < 1 else SMALLEST
    return min(LARGEST, max(SAFETY / ratio ** (1 / order), smallest))


def _first_size(
    dynamics: Dynamics,
    t: float,
    sign: float,
    state: State,
    slope: State,
    order: int,
    tolerance: Tolerance,
) -> float:
    """The size of the first step, by Hairer, Nørsett and Wanner (1993), section II.4.

    The evaluation is under the caller's grad mode, for which the dynamics may be compiled.
    """
    state, slope = (tuple(part.detach() for part in parts) for parts in (state, slope))
    scale = tolerance.scale(state)

    def norm(parts: Sequence[Tensor]) -> Tensor:
        return tolerance.norm([part / unit for part, unit in zip(parts, scale, strict=True)])

    d0, d1 = norm(state), norm(slope)
    h0 = torch.where(torch.minimum(d0, d1) < 1e-5, 1e-6, 0.01 * d0 / d1)
    further = tuple(part + sign * h0 * rate for part, rate in zip(state, slope, strict=True))
    rates = dynamics(t + sign * h0, further)
    change = [b.detach() - a for a, b in zip(slope, rates, strict=True)]
    steepest = torch.maximum(d1, norm(change) / h0)
    h1 = torch.where(steepest <= 1e-15, 1e-6, (0.01 / steepest) ** (1 / order))
    return torch.minimum(100 * h0, h1).item()


def _increment(slopes: Sequence[State], weights: Sequence[float], h: float) -> State:
    """h·Σ weight·slope, for weights of which the first is not zero."""
    total = torch._foreach_mul(slopes[0], h * weights[0])  # pyright: ignore
    for slope, weight in zip(slopes[1:], weights[1:], strict=True):
        if weight:
            torch._foreach_add_(total, slope, alpha=h * weight)  # pyright: ignore
    return tuple(total)


def _add(state: State, increment: State) -> State:
    return tuple(torch._foreach_add(state, increment))  # pyright: ignore


def _scalar(t: float, state: State) -> Tensor:
    """The time as a tensor, without a copy from the host."""
    return torch.full((), t, dtype=state[0].dtype, device=state[0].device)


def _before(end: float, start: float, state: State) -> float:
    """The last number of the state's dtype before the end."""
    kind = np.float32 if state[0].dtype == torch.float32 else np.float64
    return float(np.nextafter(kind(end), kind(start)))
