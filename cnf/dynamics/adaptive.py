"""torchdiffeq's adaptive solvers, with their times on the host.

torchdiffeq keeps times on the device and branches on them, some 23 times a step, each of which
waits for the device. Here they are on the CPU, and a step waits once: for its error.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torchdiffeq._impl.misc import (
    _compute_error_ratio,
    _optimal_step_size,
    _PerturbFunc,
    _select_initial_step,
)
from torchdiffeq._impl.odeint import SOLVERS
from torchdiffeq._impl.rk_common import RKAdaptiveStepsizeODESolver, _RungeKuttaState

from cnf.dynamics.solver import ADAPTIVE


class _WithHostTimes(RKAdaptiveStepsizeODESolver):
    """An adaptive solver of torchdiffeq whose steps end at the times wanted.

    Step control, the size of the first step and tableaus are torchdiffeq's. It would step past a
    time and interpolate back, with an error that is not controlled, and evaluate the field outside
    of the interval. The sizes of steps count as constants in backprop.

    Args:
        func: Function of the time, shape (), and the state, as `torchdiffeq.odeint` wraps it.
        y0: The initial state, flat.
        rtol: Relative tolerance.
        atol: Absolute tolerance.
        norm: Function from the errors, in units of the tolerance, to a number, shape ().
        failure: Function that makes the error if no further step can be taken, from whether all
            values are finite, so that the step is too small.
    """

    def __init__(
        self,
        func: _PerturbFunc,
        y0: Tensor,
        rtol: float,
        atol: float,
        norm: Callable[[Tensor], Tensor],
        failure: Callable[[bool], Exception],
    ) -> None:
        def on_device(t: Tensor | float, y: Tensor) -> Tensor:
            # Filled, not copied, as a copy waits for the device.
            return field(y.new_full((), float(t)), y)

        def on_host(errors: Tensor) -> Tensor:
            return norm(errors).detach().cpu()

        # Without the wrapper that perturbs times, and takes the size of the whole state for it.
        field = func.base_func
        # The constants are put where a state is: on the host, as copies wait for the device.
        host = torch.empty(0, dtype=y0.dtype, device="cpu")
        super().__init__(on_device, host, rtol, atol, norm=on_host)
        self.y0, self.failure = y0, failure

    def integrate(self, t: Tensor) -> Tensor:
        return super().integrate(t.cpu())

    def _before_integrate(self, t: Tensor) -> None:
        y0, t0 = self.y0, t[0]
        f0 = self.func(t0, y0)
        dt = _select_initial_step(
            self.func, t0, y0, self.order - 1, self.rtol, self.atol, self.norm, f0=f0
        )
        self.rk_state = _RungeKuttaState(y0, f0, t0, t0, dt.cpu(), [])

    def _advance(self, next_t: Tensor) -> Tensor:
        while next_t > self.rk_state.t1:
            self.rk_state = self._adaptive_step(self.rk_state, next_t)
        return self.rk_state.y1

    def _adaptive_step(self, rk_state: _RungeKuttaState, stop: Tensor) -> _RungeKuttaState:
        y0, f0, _, t0, dt, _ = rk_state
        t1 = t0 + dt
        if not t1 > t0:
            raise self.failure(not t1.isnan())
        if t1 > stop:
            t1, dt = stop, stop - t0
        y1, slopes = self._stages(y0, f0, t0, dt, t1)
        with torch.no_grad():
            # An infinite state has an infinite tolerance, and so no error: 0·∞ makes it NaN.
            error = _weighted(slopes, dt.item(), type(self).tableau.c_error).add_(0 * y1)
            ratio = _compute_error_ratio(error, self.rtol, self.atol, y0, y1, self.norm)
        if ratio.isnan():
            raise self.failure(False)
        size = _optimal_step_size(dt, ratio, self.safety, self.ifactor, self.dfactor, self.order)
        if ratio > 1:
            return rk_state._replace(dt=size)
        return _RungeKuttaState(y1, slopes[-1], t0, t1, size, [])

    def _stages(
        self, y0: Tensor, f0: Tensor, t0: Tensor, dt: Tensor, t1: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        """The state at t1, and the slopes at all stages."""
        tableau, slopes, y1 = type(self).tableau, [f0], y0
        start, size = t0.item(), dt.item()
        # In a field that jumps at the end of the step, the side on which the step lies.
        end = torch.nextafter(t1.to(y0.dtype), t0.to(y0.dtype)).item()
        for node, row in zip(tableau.alpha.tolist(), tableau.beta, strict=True):
            y1 = _weighted(slopes, size, row).add_(y0)
            slopes.append(self.func(end if node == 1 else start + node * size, y1))
        if tableau.c_sol.tolist() != [*tableau.beta[-1].tolist(), 0]:
            y1 = _weighted(slopes, size, tableau.c_sol).add_(y0)
        return y1, slopes


def _weighted(slopes: Sequence[Tensor], size: float, weights: Tensor) -> Tensor:
    """The size times Σ weight·slope."""
    first, *others = weights.tolist()
    total = size * first * slopes[0]
    for slope, weight in zip(slopes[1:], others, strict=True):
        if weight:
            total.add_(slope, alpha=size * weight)
    return total


def _registered(method: str) -> str:
    """The name under which torchdiffeq finds the method with times on the host."""
    name = f"cnf-{method}"
    SOLVERS[name] = type(name, (_WithHostTimes, SOLVERS[method]), {})
    return name


METHODS = {name: _registered(name) for name in ADAPTIVE if name != "scipy_solver"}
