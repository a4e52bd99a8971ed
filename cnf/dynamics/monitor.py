"""Instrumentation of ODE solves: number of evaluations, memory and causes of failure."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch as functorch  # pyright: ignore

from cnf.dynamics.solver import Solver
from cnf.errors import SolverError

State = tuple[Tensor, ...]
Dynamics = Callable[[Tensor, State], State]


@dataclass
class _Counts:
    forward: int = 0
    backward: int = 0


@dataclass
class Stats:
    """The evaluations that `record` counts, also those of later backward solves."""

    _counters: list[_Counts] = field(default_factory=list, repr=False)

    @property
    def solves(self) -> int:
        """Number of solves; stacked blocks are solved one after the other."""
        return len(self._counters)

    @property
    def forward(self) -> int:
        """Evaluations of the dynamics in forward solves."""
        return sum(counter.forward for counter in self._counters)

    @property
    def backward(self) -> int:
        """Evaluations in backward solves: the adjoint's, and those that checkpoints recompute."""
        return sum(counter.backward for counter in self._counters)


_recording: ContextVar[tuple[Stats, ...]] = ContextVar("recording", default=())


@contextmanager
def record() -> Iterator[Stats]:
    """Count the evaluations of every solve inside of the context; contexts may be nested.

    >>> from cnf.dynamics import Solver, solve
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


def count(evaluations: int) -> None:
    """Count a solve that Python did not run, such as one in a CUDA graph that is replayed.

    Args:
        evaluations: How often the solve evaluated the dynamics.
    """
    for stats in _recording.get():
        stats._counters.append(_Counts(evaluations))


class TooMuchMemory(Exception):
    """The graph of a solve exceeds the memory limit of `gradient="auto"`."""


class InstrumentedDynamics:
    """Dynamics that count and limit their evaluations, and explain failures by the last one."""

    def __init__(self, dynamics: Dynamics, solver: Solver, start: float) -> None:
        self.dynamics, self.solver = dynamics, solver
        self.counts = _Counts()  # not self: a record would keep the solve's tensors alive
        self.in_forward = True
        self.limit: float | None = None  # largest size of the graph in bytes
        self.saved = 0  # bytes that one evaluation adds to the graph
        self.restart(start)
        for stats in _recording.get():
            stats._counters.append(self.counts)

    def restart(self, start: float) -> None:
        self.start, self.nfe = start, 0
        self.last: tuple[Tensor, State] | None = None
        self.at: tuple[Tensor, State] | None = None

    def __call__(self, t: Tensor, state: State) -> State:
        if self.nfe >= self.solver.max_nfe:
            raise self._randomness_error(t, state) or self.error(
                "too many evaluations: the field is stiff or the tolerance out of reach",
                "Loosen rtol and atol, lower the learning rate, regularize, or raise max_nfe.",
            )
        self.nfe += 1
        if self.in_forward:
            self.counts.forward += 1
        else:
            self.counts.backward += 1
        # torchdiffeq's adjoint would compute the gradient with respect to time, too.
        rates = self._evaluate(t.detach(), state)
        if not (self.in_forward or any(rate.requires_grad for rate in rates)):
            # It differentiates the rates even where they depend on nothing.
            rates = rates[0] + state[0].flatten()[:0].sum(), *rates[1:]
        self.at = (t.detach(), tuple(part.detach() for part in state))
        self.last = (t.detach(), tuple(rate.detach() for rate in rates))
        # LSODA ignores NaN, and close to infinity reduces its steps until max_nfe.
        if self.solver.method == "scipy_solver" and not all_finite(rates):
            raise self.explain()
        return rates

    def _evaluate(self, t: Tensor, state: State) -> State:
        if self.limit is None:
            return self.dynamics(t, state)
        if self.nfe == 1:
            self.saved, rates = saved_bytes(self.dynamics, t, state)
        else:
            rates = self.dynamics(t, state)
        if self.saved * max(self.nfe, self.solver.evaluations or 0) > self.limit:
            raise TooMuchMemory
        return rates

    def error(self, cause: str, remedy: str) -> SolverError:
        t = math.nan if self.last is None else self.last[0].item()
        t = t if math.isfinite(t) else self.start  # NaN at the first point makes the step size NaN
        return SolverError(cause, remedy, t=t, nfe=self.nfe, settings=str(self.solver))

    def _randomness_error(self, t: Tensor, state: State) -> SolverError | None:
        """The error if two evaluations at the same point differ, else None."""
        with torch.no_grad():
            one, other = (self.dynamics(t, state) for _ in range(2))
        # Tolerances above the effect of non-deterministic sums on a GPU in float32.
        if all(torch.allclose(a, b, 1e-3, 1e-5) for a, b in zip(one, other, strict=True)):
            return None
        return self.error(
            "two evaluations at the same point differ: dropout or other noise in train mode",
            "Call flow.eval(), or remove the noise from the field.",
        )

    def _gradient_error(self) -> SolverError:
        return self.error(
            "the gradient became NaN or infinite in the backward solve",
            "Check the inputs' scale, clip gradients, or lower the learning rate.",
        )

    def start_backward(self, stop: float) -> None:
        """Count further evaluations as those of the backward pass."""
        self.in_forward = False
        self.restart(stop)

    def instrument_adjoint(self, path: State, stop: float) -> None:
        """Count the evaluations of each backward solve from zero, and check its result.

        A second derivative is refused, as the adjoint would silently omit terms of it.
        """
        node: Any = path[0].grad_fn
        while node is not None and not node.name().startswith("OdeintAdjoint"):
            node = node.next_functions[0][0]
        if node is None:
            return

        def before(_: Any) -> None:
            if torch.is_grad_enabled():  # create_graph=True
                raise RuntimeError(
                    "solve: the adjoint has first derivatives only; for second ones "
                    'take Solver(gradient="backprop")'
                )
            self.restart(stop)

        def after(slopes: Sequence[Tensor | None], _: Any) -> None:
            if not all_finite([slope for slope in slopes if slope is not None]):
                raise self._gradient_error()

        node.register_prehook(before)
        node.register_hook(after)

    def failure(self, finite: bool) -> SolverError:
        """The error where an adaptive method cannot take a further step.

        Args:
            finite: Whether all values were finite, so that the step has become too small.
        """
        return self.explain() if self.in_forward or finite else self._gradient_error()

    def explain(self) -> SolverError:
        """The error with the cause of a failed solve, inferred from the last evaluation."""
        if self.last is not None and not all_finite(self.last[1]):
            return self.error(
                "the field returned NaN or infinity",
                "Check the inputs' scale, or lower the learning rate.",
            )
        noisy = None if self.at is None else self._randomness_error(*self.at)
        return noisy or self.error(
            "the step fell below what the dtype resolves: the field is stiff or discontinuous",
            "Loosen rtol/atol, compute in float64, or take a fixed-step method.",
        )


def all_finite(parts: Sequence[Tensor]) -> bool:
    """Whether no value is NaN or infinite; waits for the device once."""
    return bool(torch.stack([part.isfinite().all() for part in parts]).all())


def saved_bytes(dynamics: Dynamics, t: Tensor, state: State) -> tuple[int, State]:
    """Evaluate the dynamics; return the bytes that autograd saves for it, and the rates."""
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        inner = tensor
        while functorch.is_functorch_wrapped_tensor(inner):  # the whole batch of vmap
            inner = functorch.get_unwrapped(inner)
        if not isinstance(inner, torch.nn.Parameter) and not inner._is_zerotensor():
            storage = inner.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
        # Detached, as a node that refers to its own result is a cycle that is never freed. For
        # second derivatives, autograd stores the tensor's place in the graph itself.
        return tensor if tensor.is_leaf else tensor.detach()

    # Eager, as compiled code may reject hooks; it does not save more than eager code.
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with torch.compiler.set_stance("force_eager"), hooks:
        rates = dynamics(t, state)
    return sum(sizes.values()), rates
