"""A fixed-step loop for `torch.compile`, `torch.func` and CUDA graphs.

torchdiffeq's loop branches on times on the device, which none of them supports. This loop takes
the same steps, with times that are Python numbers.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch._C import _functorch as functorch  # pyright: ignore

from cnf.dynamics.monitor import Dynamics, State

# The Butcher tableaux (nodes, rows, weights) of torchdiffeq, whose rk4 is the 3/8 rule.
TABLEAUX: dict[str, tuple[Sequence[float], Sequence[Sequence[float]], Sequence[float]]] = {
    "euler": ((0,), ((),), (1,)),
    "midpoint": ((0, 1 / 2), ((), (1 / 2,)), (0, 1)),
    "heun2": ((0, 1), ((), (1,)), (1 / 2, 1 / 2)),
    "heun3": ((0, 1 / 3, 2 / 3), ((), (1 / 3,), (0, 2 / 3)), (1 / 4, 0, 3 / 4)),
    "rk4": (
        (0, 1 / 3, 2 / 3, 1),
        ((), (1 / 3,), (-1 / 3, 1), (1, -1, 1)),
        (1 / 8, 3 / 8, 3 / 8, 1 / 8),
    ),
}


def transformed() -> bool:
    """Whether the code is traced by `torch.compile` or transformed by `torch.func`."""
    return torch.compiler.is_compiling() or functorch.peek_interpreter_stack() is not None


def captured() -> bool:
    """Whether a solve must not branch on the values of tensors."""
    if transformed():
        return True
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def integrate(dynamics: Dynamics, state: State, stops: Sequence[float], method: str) -> State:
    """The state at stops[-1], by a step of a method in `TABLEAUX` from each stop to the next."""
    nodes, rows, weights = TABLEAUX[method]
    dtype, device = state[0].dtype, state[0].device
    for start, stop in pairwise(stops):
        h, slopes = stop - start, []
        for node, row in zip(nodes, rows, strict=True):
            t = torch.full((), start + node * h, dtype=dtype, device=device)
            slopes.append(dynamics(t, _add_slopes(state, slopes, row, h)))
        state = _add_slopes(state, slopes, weights, h)
    return state


def _add_slopes(
    state: State, slopes: Sequence[State], weights: Sequence[float], h: float
) -> State:
    """The state plus h·Σ weight·slope."""
    for slope, weight in zip(slopes, weights, strict=True):
        if weight:
            state = tuple(
                torch.add(part, rate, alpha=h * weight)
                for part, rate in zip(state, slope, strict=True)
            )
    return state
