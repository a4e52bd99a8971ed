r"""The numerical map: the steps of a one-step method as the model, with their log-determinant.

Where an ODE is solved by few steps, the integral of the divergence is the log-determinant of no
map that was computed. The steps have one: each is a map Φ(x) = x + h ψ(t, x), whose
:math:`\log\det \partial\Phi/\partial x` follows from D tangents that the method carries through
its stages together with x. One direction takes the steps as they are, the other inverts them.

Source: Onken & Ruthotto (2020), https://arxiv.org/abs/2005.13420, for optimizing what is
discretized; Behrmann et al. (2019), https://arxiv.org/abs/1811.00995, for steps that are inverted.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from cnf.dynamics import fixed
from cnf.dynamics.monitor import State, count
from cnf.dynamics.preimage import per_row, preimage
from cnf.dynamics.regularizers import Integrand, Point
from cnf.dynamics.solver import FLOW_MAP, MAPS
from cnf.errors import abbreviated, warn
from cnf.fields.base import VectorField, tangent_products


class Mapped(NamedTuple):
    """What the steps make of points.

    Attributes:
        value: The points at the other end, shape (N, *event); NaN where a step was not inverted.
        ladj: log|det| of the direction computed, shape (N,), or (N, n) with n estimates; NaN also
            where a step's determinant is not positive, or where it was not asked for.
        integrals: The integral of each integrand over increasing time, shape (N,).
    """

    value: Tensor
    ladj: Tensor
    integrals: tuple[Tensor, ...]


def take(
    method: str,
    integrands: tuple[Integrand, ...],
    field: VectorField,
    context: Tensor | None,
    t: Tensor,
    h: Tensor,
    state: State,
) -> State:
    """A step of points alone, or of points, tangents, shape (n, N, *event), and integrals.

    Args:
        method: One of `fixed.TABLEAUX`.
        integrands: As of `Continuous.integrate`.
        field: The vector field.
        context: Condition, shape (N, C), or None.
        t: Where the step starts, shape ().
        h: Its length, shape ().
        state: What is taken along.
    """

    def rates(t: Tensor, state: State) -> State:
        x = state[0]
        if len(state) == 1:
            return (field(t, x, context).to(x.dtype),)
        v, products = tangent_products(field, t, x, context, state[1])
        point = Point(field, t, x, context, v)
        return v.to(x.dtype), products.to(x.dtype), *(each(point) for each in integrands)

    return fixed.step(rates, state, t, h, method)


@dataclass(frozen=True)
class NumericalStep:
    """One step Φ(x) = x + h ψ(t, x) of a method in `cnf.dynamics.solver.MAPS`.

    Attributes:
        field: The vector field; of a flow map, the average velocity until t + h.
        context: Condition, shape (N, C), or None.
        method: The method.
        t: Where the step starts.
        h: Its length, negative for a step towards the base.
        run: What takes it: `take`, or that compiled.
    """

    field: VectorField
    context: Tensor | None
    method: str
    t: float
    h: float
    run: Callable[..., State] = take

    def __call__(self, x: Tensor) -> Tensor:
        """Φ(x), of x's shape (N, *event)."""
        return self._taken((x,))[0]

    def with_jacobian(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Φ(x) and the transposed Jacobian [n, j, i] = ∂Φ_i/∂x_j of each row, (N, D, D)."""
        return self.with_integrals(x, ())[:2]

    def with_integrals(
        self, x: Tensor, integrands: Sequence[Integrand]
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """As `with_jacobian`, and the integral of each integrand over increasing time, (N,)."""
        size = math.prod(x.shape[1:])
        basis = torch.eye(size, dtype=x.dtype, device=x.device).reshape(size, 1, *x.shape[1:])
        value, columns, integrals = self.with_tangents(x, basis.expand(size, *x.shape), integrands)
        return value, columns.flatten(2).movedim(1, 0), integrals

    def with_tangents(
        self, x: Tensor, tangents: Tensor, integrands: Sequence[Integrand]
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """Φ(x), ∂Φ of each tangent, both of shape (n, N, *event), and integrals, (N,)."""
        zeros = [x.new_zeros(len(x)) for _ in integrands]
        value, products, *integrals = self._taken((x, tangents, *zeros), integrands)
        sign = math.copysign(1.0, self.h)
        return value, products, tuple(sign * each for each in integrals)

    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """The x with Φ(x) = y, and whether none was found that is not folded, shape (N,).

        See `preimage`, which begins with a step of the ODE the other way.
        """
        with torch.no_grad():
            start = self.between(self.t + self.h, self.t)(y)
        x, missed, jacobian = preimage(self, y, start)
        return x, missed if jacobian is None else missed | ~(det(jacobian) > 0)

    def between(self, start: float, stop: float) -> "NumericalStep":
        """The step of the same method from one time to another."""
        field = self.field.until(stop) if self.method == FLOW_MAP else self.field
        return replace(self, field=field, t=start, h=stop - start)

    def of_rows(self, rows: Tensor) -> "NumericalStep":
        """The step of some rows, by their indices; for each number another would be compiled."""
        context = None if self.context is None else self.context[rows]
        return replace(self, context=context, run=take)

    def _taken(self, state: State, integrands: Sequence[Integrand] = ()) -> State:
        if not fixed.transformed():
            count(MAPS[self.method])
        t, h = state[0].new_full((), self.t), state[0].new_full((), self.h)
        method = "euler" if self.method == FLOW_MAP else self.method
        return self.run(method, tuple(integrands), self.field, self.context, t, h, state)


class LogDeterminant(Protocol):
    """A method to compute log|det ∂Φ| of a step.

    Attributes:
        failure: Ends the sentence "the solver's step k …" about rows in which it is NaN.
    """

    @property
    def failure(self) -> str: ...

    def __call__(
        self, step: NumericalStep, x: Tensor, integrands: Sequence[Integrand]
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """Φ(x), log|det ∂Φ|, shape (N,) or (N, n) with n estimates, and integrals, (N,)."""
        ...


@dataclass(frozen=True)
class ExactLogDeterminant:
    """The log-determinant by D tangents; NaN where the determinant is not positive."""

    failure = (
        "is not one to one, or was not inverted; take more steps, or train them for longer, by "
        "likelihood with this solver"
    )

    def __call__(
        self, step: NumericalStep, x: Tensor, integrands: Sequence[Integrand]
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        value, jacobian, integrals = step.with_integrals(x, integrands)
        return value, log_det(jacobian), integrals


EXACT = ExactLogDeterminant()


def explicit(
    steps: Sequence[NumericalStep],
    x: Tensor,
    *,
    log_determinant: LogDeterminant | None,
    integrands: Sequence[Integrand] = (),
) -> Mapped:
    """Take the steps one after the other.

    Args:
        steps: The steps, in their order.
        x: Points, shape (N, *event).
        log_determinant: How it is computed; None where it is not wanted.
        integrands: As of `Continuous.integrate`.
    """
    if not (log_determinant or integrands):
        for step in steps:
            x = step(x)
        return Mapped(x, x.new_full((len(x),), math.nan), ())
    given, found, folds = x, [], []
    by = log_determinant or EXACT
    for step in steps:
        x, each, parts = by(step, x, integrands)
        found.append((each, parts))
        folds.append(_without(each))
    _tell(steps, given, folds, by.failure)
    return Mapped(x, *_sums(found))


def implicit(
    steps: Sequence[NumericalStep],
    y: Tensor,
    *,
    log_determinant: LogDeterminant | None,
    integrands: Sequence[Integrand] = (),
) -> Mapped:
    """Invert the steps, the last one first.

    Args:
        steps: The steps, in the order in which `explicit` takes them.
        y: Points, shape (N, *event).
        log_determinant: How it is computed; None where it is not wanted.
        integrands: As of `Continuous.integrate`.
    """
    given, found, folds = y, [], []
    by = log_determinant or EXACT
    lost = torch.zeros(len(y), dtype=torch.bool, device=y.device)
    for step in reversed(steps):
        y, folded = step.inverse(y)
        lost = lost | folded
        if log_determinant or integrands:
            _, each, parts = by(step, y, integrands)
            found.append((each, parts))
            folded = folded | _without(each)
        folds.append(folded)
    _tell(steps, given, folds[::-1], by.failure)
    y = y.masked_fill(per_row(lost, y), math.nan)
    if not found:
        return Mapped(y, y.new_full((len(y),), math.nan), ())
    whole, totals = _sums(found)
    return Mapped(y, (-whole).masked_fill(per_row(lost, whole), math.nan), totals)


def _sums(found: Sequence[Sequence[Any]]) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The log-determinants and the integrals of all steps, added."""
    logs, integrals = zip(*found, strict=True)
    return _sum(logs), tuple(_sum(parts) for parts in zip(*integrals, strict=True))


def _sum(parts: Sequence[Tensor]) -> Tensor:
    return sum(parts[1:], start=parts[0])


def _without(ladj: Tensor) -> Tensor:
    """Rows in which a log-determinant, or an estimate of it, is not finite, shape (N,)."""
    bad = ~ladj.isfinite()
    return bad if bad.dim() == 1 else bad.any(1)


def path(steps: Sequence[NumericalStep], value: Tensor, times: Sequence[float]) -> Tensor:
    """The points at several times, shape (times, N, *event).

    Between the ends of a step they are those of a shorter step from its start.

    Args:
        steps: The steps, in the order in which `explicit` takes them.
        value: Points at times[0], shape (N, *event).
        times: Monotone times, of which the first is where the steps start or end.

    Raises:
        ValueError: The first time is another one.
    """
    start, stop = steps[0].t, steps[-1].t + steps[-1].h
    if times[0] not in (start, stop):
        raise ValueError(
            f"Continuous.trajectory: expected times from {start} or {stop} on, where the steps of "
            f"a solver with discrete=True start and end, got {times[0]}"
        )
    points = [value]
    if times[0] == start:
        for step in steps:
            points.append(step(points[-1]))
    else:
        for step in reversed(steps):
            points.insert(0, implicit([step], points[0], log_determinant=None).value)

    def at(time: float) -> Tensor:
        passed = [k for k, step in enumerate(steps) if (time - step.t) * step.h >= 0]
        if time == stop:
            return points[-1]
        step = steps[passed[-1]]
        return step.between(step.t, time)(points[passed[-1]])

    return torch.stack([at(time) for time in times])


def log_det(jacobian: Tensor) -> Tensor:
    """The log-determinant of matrices, (N, D, D) → (N,); NaN, without gradient, where det ≤ 0."""
    if jacobian.shape[-1] <= 2:
        found = det(jacobian)
        positive = found > 0
        return torch.where(positive, torch.where(positive, found, 1.0).log(), math.nan)
    sign, found = torch.linalg.slogdet(jacobian)
    return torch.where(sign > 0, found, math.nan)


def det(jacobian: Tensor) -> Tensor:
    """The determinant of matrices, (N, D, D) → (N,)."""
    if jacobian.shape[-1] > 2:
        return torch.linalg.det(jacobian)
    found = jacobian[:, 0, 0]  # ten times as fast as a factorization of many small matrices
    if jacobian.shape[-1] == 2:
        found = found * jacobian[:, 1, 1] - jacobian[:, 0, 1] * jacobian[:, 1, 0]
    return found


def least_stretch(jacobian: Tensor) -> Tensor:
    """The smallest singular value of matrices, (N, D, D) → (N,), with the sign of the determinant.

    It passes through 0 where a map folds.
    """
    if jacobian.shape[-1] == 1:
        return jacobian[:, 0, 0]
    if jacobian.shape[-1] == 2:  # of a rotation with scaling and a reflection with scaling
        (a, b), (c, d) = (row.unbind(-1) for row in jacobian.unbind(1))
        turned, mirrored = torch.stack([a + d, b - c]), torch.stack([a - d, b + c])
        return 0.5 * (turned.norm(dim=0) - mirrored.norm(dim=0))
    with torch.no_grad():
        gram = jacobian.mT @ jacobian
        finite = gram.flatten(1).isfinite().all(1).reshape(-1, 1, 1)
        eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
        # eigh raises an error for all matrices where one is not finite, whose result is NaN below
        right = torch.linalg.eigh(torch.where(finite, gram, eye))[1][..., :1]
        left = torch.nn.functional.normalize(jacobian @ right, dim=1)
        left = left * torch.linalg.slogdet(jacobian)[0].reshape(-1, 1, 1)
    return (left.mT @ jacobian @ right).reshape(-1)


class Folds:
    """Which rows have no density, and at which step, as `watched` collects it."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, tuple[tuple[int, float], ...]], list[Tensor]] = {}

    def add(self, steps: Sequence[NumericalStep], folded: Tensor, failure: str) -> None:
        """Record the rows of a chunk.

        Args:
            steps: The steps, in the order in which they are explicit.
            folded: Whether a row has no density for a step, shape (steps, N).
            failure: What such a step is, as of `LogDeterminant`.
        """
        places = tuple((id(step.field), step.t) for step in steps)
        self._found.setdefault((failure, places), []).append(folded)

    def told(self) -> str | None:
        """What is to be said of them; None if there are none. Waits for the device."""
        for (failure, places), chunks in self._found.items():
            folded = torch.cat(chunks, 1)
            rows = folded.any(0).nonzero().flatten().tolist()
            if rows:
                steps = [k for k, found in enumerate(folded.any(1).tolist()) if found]
                which = ", ".join(f"{k + 1} (from t = {places[k][1]:.3g})" for k in steps)
                return (
                    f"{len(rows)} of {folded.shape[1]} rows ({abbreviated(rows)}) have NaN as "
                    f"density or as value: there the solver's step {which} of {len(places)} "
                    f"{failure}"
                )
        return None


_folds: ContextVar[Folds | None] = ContextVar("folds", default=None)


@contextmanager
def watched() -> Iterator[Folds]:
    """Inside, rows without a density are collected, and not warned of."""
    token = _folds.set(Folds())
    try:
        found = _folds.get()
        assert found is not None
        yield found
    finally:
        _folds.reset(token)


@contextmanager
def warning_of_folds() -> Iterator[None]:
    """Inside, rows without a density are collected, and warned of at its end, all at once."""
    if fixed.captured() or _folds.get() is not None:
        yield
        return
    with watched() as found:
        yield
    if text := found.told():
        warn(f"Flow: {text}")


def _tell(
    steps: Sequence[NumericalStep], given: Tensor, folds: Sequence[Tensor], failure: str
) -> None:
    """Record, or warn of, rows that folded though what was given is finite."""
    if fixed.captured():
        return
    with warning_of_folds():
        found = _folds.get()
        assert found is not None
        found.add(steps, torch.stack([*folds]) & given.flatten(1).isfinite().all(1), failure)
