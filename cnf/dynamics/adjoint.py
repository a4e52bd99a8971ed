"""Gradients of a solve by the adjoint ODE, which is solved backwards."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from cnf.dynamics.monitor import Dynamics, InstrumentedDynamics, State

Integrate = Callable[[Dynamics, State, Sequence[float]], State]


def solve_with_adjoint(
    dynamics: InstrumentedDynamics,
    state: State,
    times: Sequence[float],
    params: Sequence[Tensor],
    forward: Integrate,
    backward: Integrate,
) -> State:
    """Solve without a graph; the gradient is the solution of the adjoint ODE.

    For the gradient a of the loss with respect to the state, da/dt = -a ∂f/∂state, and the
    gradient with respect to a parameter is the integral of a ∂f/∂parameter. The state is solved
    backwards along with them, and set to the forward solution at each of the times.

    Source: Chen et al. (2018), Neural Ordinary Differential Equations,
    https://arxiv.org/abs/1806.07366.

    Args:
        dynamics: The dynamics, see `ode.solve`.
        state: The state at times[0].
        times: Times at which the state is returned, monotone.
        params: All tensors other than the state that need gradients.
        forward: Solves the dynamics.
        backward: Solves the adjoint ODE, whose state is the dynamics' state, as many gradients,
            and the gradients of the parameters.

    Returns:
        The states, tensors of shape (len(times), …).

    Raises:
        RuntimeError: In the backward pass: a second derivative is asked for, which the adjoint
            would silently omit terms of.
    """
    wanted = [p for p in params if p.requires_grad]
    solves = dynamics, tuple(times), forward, backward
    return _Adjoint.apply(solves, len(state), *state, *wanted)  # pyright: ignore


class _Adjoint(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, solves: Any, parts: int, *tensors: Tensor) -> Any:
        dynamics, times, forward, _ = ctx.solves = solves
        path = forward(dynamics, tensors[:parts], times)
        ctx.save_for_backward(*path, *tensors[parts:])
        return path

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True
            raise RuntimeError(
                "solve: the adjoint has first derivatives only; for second ones "
                'take Solver(gradient="backprop")'
            )
        dynamics, times, _, solve = ctx.solves
        parts = len(cotangents)
        path, params = ctx.saved_tensors[:parts], ctx.saved_tensors[parts:]
        dynamics.restart(times[-1])
        adjoint = _AdjointDynamics(dynamics, parts, params)
        slopes = [values[-1] for values in cotangents]
        slopes += [torch.zeros_like(param) for param in params]
        for k, (t1, t0) in enumerate(pairwise(reversed(times)), 2):
            start = (*(values[1 - k] for values in path), *slopes)
            with dynamics.explaining():
                solved = solve(adjoint, start, [t1, t0])
            slopes = [values[-1] for values in solved[parts:]]
            for slope, values in zip(slopes, cotangents, strict=False):
                slope += values[-k]
        dynamics.check_gradients(slopes)
        return None, None, *slopes


class _AdjointDynamics:
    """The rates of (state, its gradient, the parameters' gradients).

    Args:
        dynamics: The dynamics of the state.
        parts: Number of tensors of the state.
        params: The parameters.
    """

    def __init__(self, dynamics: Dynamics, parts: int, params: Sequence[Tensor]) -> None:
        self.dynamics, self.parts, self.params = dynamics, parts, params

    def __call__(self, t: Tensor, values: State) -> State:
        slopes = values[self.parts : 2 * self.parts]
        with torch.enable_grad():
            state = tuple(v.detach().requires_grad_() for v in values[: self.parts])
            rates = self.dynamics(t, state)
            pairs = [
                (rate, -a) for rate, a in zip(rates, slopes, strict=True) if rate.requires_grad
            ]
            products = torch.autograd.grad(
                [rate for rate, _ in pairs], (*state, *self.params), [a for _, a in pairs],
                retain_graph=True, materialize_grads=True, allow_unused=True,
            )  # fmt: skip
        return *(rate.detach() for rate in rates), *products
