"""A fixed-step loop for `torch.compile`, `torch.func` and CUDA graphs.

torchdiffeq's loop branches on times on the device, which none of them supports. This loop takes
the same steps, with times that are Python numbers.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import pairwise

import torch
from torch import Tensor
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


_recorded: ContextVar[bool] = ContextVar("recorded", default=False)


@contextmanager
def recorded() -> Iterator[None]:
    """A context in which a caller records each operation on tensors, to replay it later."""
    token = _recorded.set(True)
    try:
        yield
    finally:
        _recorded.reset(token)


def captured() -> bool:
    """Whether a solve must not branch on the values of tensors."""
    if transformed() or _recorded.get():
        return True
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def integrate(dynamics: Dynamics, state: State, stops: Sequence[float], method: str) -> State:
    """The state at stops[-1], by a step of a method in `TABLEAUX` from each stop to the next."""
    for t, h in steps_between(stops, state[0]):
        state = step(dynamics, state, t, h, method)
    return state


def steps_between(stops: Sequence[float], like: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The start and the length of each step, shape (), from each stop to the next.

    Args:
        stops: Times.
        like: A tensor of the wanted dtype and device.
    """
    for start, stop in pairwise(stops):
        yield like.new_full((), start), like.new_full((), stop - start)


def step(dynamics: Dynamics, state: State, t: Tensor, h: Tensor, method: str) -> State:
    """The state at t + h, by one step of a method in `TABLEAUX`.

    Args:
        dynamics: Function of t, shape (), and the state; it returns rates.
        state: The state at t.
        t: Time, shape ().
        h: Length of the step, shape ().
        method: The method.
    """
    nodes, rows, weights = TABLEAUX[method]
    slopes: list[State] = []
    for node, row in zip(nodes, rows, strict=True):
        at = t + node * h if node else t
        slopes.append(dynamics(at, _add_slopes(state, slopes, row, h)))
    return _add_slopes(state, slopes, weights, h)


def _add_slopes(
    state: State, slopes: Sequence[State], weights: Sequence[float], h: Tensor
) -> State:
    """The state plus h·Σ weight·slope."""
    for slope, weight in zip(slopes, weights, strict=True):
        if weight:
            state = tuple(
                torch.addcmul(part, rate, h, value=weight)
                for part, rate in zip(state, slope, strict=True)
            )
    return state
