"""The flow of a vector field as a transform: a continuous normalizing flow."""

import copy
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from types import FunctionType
from typing import Any, Literal, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from cnf.dynamics import fixed, numerical, ode
from cnf.dynamics.divergence import (
    DIVERGENCES,
    Divergence,
    Hutchinson,
    Learned,
    is_exact,
    probes_of,
)
from cnf.dynamics.monitor import Stats
from cnf.dynamics.power_series import PowerSeries
from cnf.dynamics.regularizers import Integrand, Point
from cnf.dynamics.solver import FLOW_MAP, STAGES, Solver
from cnf.errors import call_without_edits, expect_choice, expect_not_negative, explain_edit
from cnf.fields.base import VectorField
from cnf.fields.sphere import OnSphere
from cnf.fields.wrappers import wrapped
from cnf.precision import with_current_autocast
from cnf.transforms.base import TRANSFORMS, Transform, transforms_in


class Integral(NamedTuple):
    """The result of an ODE solve by `Continuous.integrate`.

    Attributes:
        value: The end point, shape (*batch, *event).
        ladj: log|det Jacobian| of the direction solved, shape (*batch,), in nats; NaN if
            divergence is None.
        integrals: The integral of each integrand over increasing time, shape (*batch,), whichever
            direction is solved.
        nfe: Number of evaluations of the field.
        estimates: The estimate of `ladj` by each probe, shape (probes, *batch); None without
            probes.
    """

    value: Tensor
    ladj: Tensor
    integrals: tuple[Tensor, ...]
    nfe: int
    estimates: Tensor | None = None


@dataclass(frozen=True)
class Solve:
    """How one of a transform's ODEs is solved; `solve_each` takes one for each of them.

    Args:
        divergence: How ∇·v is computed. Probes that are given, shape (n, *batch, *event of the
            data), may have more entries in a row than the ODE's state, which takes the first.
        integrands: As of `Continuous.integrate`.
        short: How far from its end, as a part of [0, 1], the solve stops.
    """

    divergence: str | Divergence = "exact"
    integrands: Sequence[Integrand] = ()
    short: float = 0.0


@dataclass(frozen=True)
class Recipe:
    """Defaults for training a continuous flow by likelihood; arguments of the objective override.

    Args:
        divergence: Method for the divergence in training, such as "hutchinson"; evaluation stays
            exact.
        penalties: Weights of regularizers by name, such as {"kinetic": 0.01}.
        solver: Solver for training; that of the transform if None.
        lr: Learning rate; that of the objective if None.

    Raises:
        ValueError: A weight is below 0.
    """

    divergence: str | Divergence = "exact"
    penalties: Mapping[str, float] = dataclasses.field(default_factory=dict)
    solver: Solver | None = None
    lr: float | None = None

    def __post_init__(self) -> None:
        expect_not_negative("Recipe", **self.penalties)


@TRANSFORMS.register("continuous")
class Continuous(Transform):
    r"""The solution map of the ODE dx/dt = v(t, x, c), from z at t = 0 to x at t = 1.

    Its log-determinant is
    :math:`\log|\det \partial x/\partial z| = \int_0^1 \nabla\cdot v(t, x_t)\,dt`. The inverse
    solves the same ODE from 1 to 0. Stacked blocks are one `Continuous` with a `Piecewise` field:
    the solver restarts at each knot, and divides its steps equally among the blocks.

    Source: Chen et al. (2018), Neural Ordinary Differential Equations,
    https://arxiv.org/abs/1806.07366.

    Args:
        field: The vector field v.
        solver: Method, tolerances and gradient mode; dopri5 at 1e-5 by default.
        divergence: How ∇·v is computed: "exact" (the default), another name in `DIVERGENCES`, a
            `Divergence`, or None for no log-determinant (it is then NaN).
        recipe: Defaults for training by likelihood.

    Raises:
        TypeError: The field is not a `VectorField`.
    """

    def __init__(
        self,
        field: VectorField,
        solver: Solver | None = None,
        divergence: str | Divergence | None = "exact",
        recipe: Recipe | None = None,
    ) -> None:
        if not isinstance(field, VectorField):
            raise TypeError(
                f"Continuous: expected field to be a VectorField, got a {type(field).__name__}; "
                "wrap your own network: cnf.fields.Adapter(net, event_shape=(D,))"
            )
        super().__init__(context_dim=field.context_dim, event_shape=field.event_shape)
        self.optional_context = field.optional_context
        self.field = field
        self.solver = solver or Solver()
        self.divergence = divergence
        self.recipe = recipe or Recipe()

    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self._expect("z", z, context)
        return self.integrate(z, context, towards="data", divergence=self.divergence)[:2]

    def inverse(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self._expect("x", x, context)
        return self.integrate(x, context, towards="base", divergence=self.divergence)[:2]

    def extra_repr(self) -> str:
        return f"{self.field}, {self.solver}"

    def integrate(
        self,
        value: Tensor,
        context: Tensor | None = None,
        *,
        towards: Literal["data", "base"],
        divergence: str | Divergence | None = "exact",
        integrands: Sequence[Integrand] = (),
        stop: float | None = None,
    ) -> Integral:
        """Solve the ODE from one end to the other, with the log-determinant and integrals.

        Args:
            value: Starting points, shape (*batch, *event).
            context: Condition, shape (*batch, context_dim).
            towards: "data" runs t from 0 to 1, "base" from 1 to 0.
            divergence: As in the constructor.
            integrands: Functions from a `Point` to shape (*batch,), which are integrated over time
                together with the state.
            stop: Time in [0, 1] at which to stop; the other end if None.

        Raises:
            ValueError: The direction or divergence is unknown, or `stop` is not in [0, 1].
        """
        expect_choice("Continuous.integrate", "towards", towards, ("data", "base"))
        ends = (0.0, 1.0) if towards == "data" else (1.0, 0.0)
        start, stop = ends[0], ends[1] if stop is None else stop
        if not 0 <= stop <= 1:
            raise ValueError(f"Continuous.integrate: expected stop inside [0, 1], got {stop}")
        estimator = None if divergence is None else DIVERGENCES.build(divergence)
        if self.solver.discrete:
            self._expect_log_determinant(estimator)
        probe = None if estimator is None else estimator.draw(value)
        batch = value.shape[: value.dim() - self.event_dims]
        # The solver and the field get a single batch axis.
        x = value.reshape(-1, *self.field.event_shape)
        if context is not None:
            context = context.expand(*batch, -1).reshape(x.shape[0], self.context_dim)
        if probe is not None:
            probe = probe.reshape(len(probe), *x.shape)
        if self.solver.discrete:
            if isinstance(estimator, Hutchinson):
                estimator = replace(estimator, probe=probe)
            return self._by_steps(x, context, (start, stop), estimator, tuple(integrands), batch)
        channels = [] if estimator is None else [estimator.channels]
        shapes = [(x.shape[0], *shape) for shape in (*channels, *((),) * len(integrands))]
        state = (x, *(x.new_zeros(shape) for shape in shapes))
        settings = (estimator, tuple(integrands), probe)
        rates, step = partial(_rates, *settings), None
        if self._compiles():
            rates = partial(_compiled, _rates, *settings)
            if self.solver.method in STAGES and not torch.is_autocast_enabled(x.device.type):
                step = partial(_compiled, _step, self.solver.method, *settings)
        state, nfe = self._solve(rates, step, tuple(integrands), state, start, stop, context)
        ladj = x.new_full(x.shape[:1], float("nan")) if estimator is None else state[1]
        sign = 1.0 if start < stop else -1.0
        integrals = [sign * part for part in state[1 + len(channels) :]]
        return self._integral(state[0], ladj, integrals, nfe, batch)

    def _integral(
        self,
        value: Tensor,
        ladj: Tensor,
        integrals: Sequence[Tensor],
        nfe: int,
        batch: Sequence[int],
    ) -> Integral:
        """What was solved for N rows; `ladj` may have an estimate of each probe."""
        estimates = None
        if ladj.dim() > 1:
            ladj, estimates = ladj.mean(-1), ladj.T.reshape(ladj.shape[1], *batch)
        return Integral(
            value.reshape(*batch, *self.field.event_shape), ladj.reshape(batch),
            tuple(each.reshape(batch) for each in integrals), nfe, estimates,
        )  # fmt: skip

    def _by_steps(
        self,
        x: Tensor,
        context: Tensor | None,
        ends: tuple[float, float],
        divergence: Divergence | None,
        integrands: tuple[Integrand, ...],
        batch: Sequence[int],
    ) -> Integral:
        """`integrate` where the solver's steps are the model.

        Args:
            x: Starting points, shape (N, *event).
            context: Condition, shape (N, C), or None.
            ends: Where it starts and where it stops: 0 and 1 or 1 and 0.
            divergence: The exact one, Hutchinson's with probes of shape (n, N, *event), the
                learned one of a flow map, or None for no log-determinant.
            integrands: As of `integrate`.
            batch: The shape that N is of.
        """
        if set(ends) != {0.0, 1.0}:
            raise ValueError(
                f"Continuous: expected whole steps, got a solve that stops at {ends[1]}"
            )
        if isinstance(divergence, Learned) and self.solver.method == FLOW_MAP:
            run = partial(self._estimated, x, context, ends, divergence, integrands)
        else:
            plain = ends[0] == (0.0 if self.solver.explicit == "sample" else 1.0)
            run = partial(
                numerical.explicit if plain else numerical.implicit, self.steps(context), x,
                log_determinant=_log_determinant(divergence), integrands=integrands,
            )  # fmt: skip
        # torch.compile cannot trace what counts the evaluations.
        with nullcontext(Stats()) if fixed.transformed() else ode.record() as stats:
            value, ladj, integrals = run()
        return self._integral(value, ladj, integrals, stats.forward, batch)

    def _expect_log_determinant(self, divergence: Divergence | None) -> None:
        """Raise unless it is a way to the log-determinant of a discrete solver's steps."""
        learned = isinstance(divergence, Learned) and self.solver.method == FLOW_MAP
        probed = isinstance(divergence, Hutchinson) and not divergence.sketch
        if divergence is None or is_exact(divergence) or learned or probed:
            return
        sketched = isinstance(divergence, Hutchinson)
        got = "Hutchinson with a sketch" if sketched else type(divergence).__name__
        raise ValueError(
            "Continuous: expected 'exact' or 'hutchinson' for the log-determinant of "
            f"{self.solver}, got {got}; 'learned' is for flow maps, and others are for solvers "
            "with discrete=False"
        )

    def _estimated(
        self,
        x: Tensor,
        context: Tensor | None,
        ends: tuple[float, float],
        divergence: Learned,
        integrands: tuple[Integrand, ...],
    ) -> numerical.Mapped:
        """The steps of a flow map in either direction, with the log-determinant that it learned.

        Args:
            x: Starting points, shape (N, *event).
            context: Condition, shape (N, C), or None.
            ends: 0 and 1 or 1 and 0.
            divergence: The learned one.
            integrands: As of `integrate`.
        """
        take = partial(_compiled, _step) if self._compiles() else _step
        state = (x, *(x.new_zeros(len(x)) for _ in range(1 + len(integrands))))
        for step in self.steps(context, ends):
            if not fixed.transformed():
                ode.count(1)
            t, h = x.new_full((), step.t), x.new_full((), step.h)
            state = take("euler", divergence, integrands, None, step.field, context, t, h, state)
        value, ladj, *integrals = state
        sign = ends[1] - ends[0]
        return numerical.Mapped(value, ladj, tuple(sign * each for each in integrals))

    def steps(
        self, context: Tensor | None = None, ends: tuple[float, float] | None = None
    ) -> list[numerical.NumericalStep]:
        """The steps of a discrete solver, in their order.

        Args:
            context: Condition, shape (N, C), or None.
            ends: Where they start and where they stop; as they are explicit if None.

        Raises:
            TypeError: The field is one on the sphere, which steps leave.
        """
        if any(isinstance(part, OnSphere) for part in wrapped(self.field)):
            raise TypeError(
                "Continuous: steps of a discrete solver leave the sphere, and their determinant "
                "is not that of areas; take the solver with discrete=False"
            )
        if ends is None:
            ends = (0.0, 1.0) if self.solver.explicit == "sample" else (1.0, 0.0)
        run = numerical.take
        if self._compiles():
            run = partial(_compiled, numerical.take)
        method = self.solver.method
        return [
            numerical.NumericalStep(piece, context, method, a, b - a, run).between(a, b)
            for t0, t1, piece in self._stretches(*ends)
            for a, b in pairwise(self._solver_on(t0, t1).stops(t0, t1))
        ]

    def _solve(
        self,
        rates: Callable[[VectorField, Tensor, Tensor, Tensor | None], ode.State],
        step: Callable[..., ode.State] | None,
        integrands: tuple[Integrand, ...],
        state: ode.State,
        start: float,
        stop: float,
        context: Tensor | None,
    ) -> tuple[ode.State, int]:
        """Solve block by block of the field; the state at `stop` and the evaluations."""
        nfe, rates = 0, _checking_inputs(rates)
        for t0, t1, piece in self._stretches(start, stop):

            def dynamics(t: Tensor, state: ode.State, piece: VectorField = piece) -> ode.State:
                return rates(piece, t, state[0], context)

            dynamics = with_current_autocast(dynamics, state[0])
            own = None
            if step is not None:
                saved = _saved.setdefault(piece, {}).setdefault((state[0].dtype, integrands), {})
                own = ode.Step(partial(step, piece, context), saved)
            state, evaluations = ode.solve(
                dynamics, state, t0, t1, self._solver_on(t0, t1), self._params(context), own
            )
            nfe += evaluations
        return state, nfe

    def trajectory(
        self, value: Tensor, times: Sequence[float], context: Tensor | None = None
    ) -> Tensor:
        """The solution of the ODE at several times, shape (times, *batch, *event).

        Args:
            value: Points at times[0], shape (*batch, *event).
            times: Monotone times in [0, 1].
            context: Condition, shape (*batch, C), or None.

        Raises:
            ValueError: A time is not in [0, 1].
        """
        if not all(0 <= t <= 1 for t in times):
            raise ValueError(f"Continuous.trajectory: expected times in [0, 1], got {times}")
        if self.solver.discrete:
            return numerical.path(self.steps(context), value, times)
        # A time that is a knot up to rounding in float32 is moved to it, as no solve is so short.
        knots = self.field.knots[1:]
        times = [next((knot for knot in knots if abs(knot - t) < 1e-6), t) for t in times]
        path, stamps = [value.unsqueeze(0)], [times[0]]
        rates = _checking_inputs(partial(_rates, None, (), None))
        for t0, t1, piece in self._stretches(times[0], times[-1]):

            def dynamics(t: Tensor, state: ode.State, piece: VectorField = piece) -> ode.State:
                return rates(piece, t, state[0], context)

            dynamics = with_current_autocast(dynamics, value)
            stretch = [t0, *(t for t in times if min(t0, t1) < t < max(t0, t1)), t1]
            (points,), _ = ode.solve_path(
                dynamics, (path[-1][-1],), stretch, self._solver_on(t0, t1), self._params(context)
            )
            path.append(points[1:])
            stamps += stretch[1:]
        return torch.cat(path)[[k for k, t in enumerate(stamps) if t in times]]  # without knots

    def _stretches(self, start: float, stop: float) -> list[tuple[float, float, VectorField]]:
        """The blocks between start and stop, as (t0, t1, field), in the order of the solve."""
        low, high = min(start, stop), max(start, stop)
        found = [
            (max(a, low), min(b, high), self.field.block(k))
            for k, (a, b) in enumerate(pairwise(self.field.knots))
            if a < high and b > low
        ]
        return found if start < stop else [(b, a, piece) for a, b, piece in reversed(found)]

    def _compiles(self) -> bool:
        return not fixed.captured() and (self.solver.compile or _compiling.get())

    def _solver_on(self, t0: float, t1: float) -> Solver:
        """The solver with its share of the steps, which are given for [0, 1], from t0 to t1."""
        steps = self.solver.steps
        if steps is None or self.solver.grid is not None:
            return self.solver
        return replace(self.solver, steps=max(1, math.ceil(steps * abs(t1 - t0) - 1e-6)))

    def _params(self, context: Tensor | None) -> list[Tensor]:
        # With the context: the adjoint computes no gradient for a tensor that is not listed.
        return [*self.field.parameters(), *([] if context is None else [context])]


def _log_determinant(divergence: Divergence | None) -> numerical.LogDeterminant | None:
    """How that of steps is computed, by Hutchinson's probes, which have been drawn, or exactly."""
    if isinstance(divergence, Hutchinson):
        assert divergence.probe is not None
        return PowerSeries(divergence.probe, divergence.generator)
    return None if divergence is None else numerical.EXACT


def _checking_inputs(
    rates: Callable[[VectorField, Tensor, Tensor, Tensor | None], ode.State],
) -> Callable[[VectorField, Tensor, Tensor, Tensor | None], ode.State]:
    """Wrap `rates` such that it raises ValueError if the field modifies its inputs in place."""
    known: set[VectorField] = set()

    def checked(field: VectorField, t: Tensor, x: Tensor, context: Tensor | None) -> ode.State:
        if torch.compiler.is_compiling():
            return rates(field, t, x, context)
        if field not in known:
            known.add(field)
            return call_without_edits(
                field, lambda: rates(field, t, x, context), t=t, x=x, context=context
            )
        try:
            return rates(field, t, x, context)
        except RuntimeError as error:  # autograd may find a modification only in a later product
            explain_edit(field, error)
            raise

    return checked


def _rates(
    divergence: Divergence | None,
    integrands: tuple[Integrand, ...],
    probe: Tensor | None,
    field: VectorField,
    t: Tensor,
    x: Tensor,
    context: Tensor | None,
) -> ode.State:
    """Velocity, divergence and integrands at (t, x), in x's dtype under autocast as well."""
    if divergence is None:
        v, products = field(t, x, context).to(x.dtype), None
        rates = (v,)
    else:
        v, div, products = divergence.rates(field, t, x, context, probe)
        v = v.to(x.dtype)
        rates = (v, div.to(x.dtype))
    point = Point(field, t, x, context, v, products)
    return (*rates, *(integrand(point).to(x.dtype) for integrand in integrands))


_compiling: ContextVar[bool] = ContextVar("compiling", default=False)


@contextmanager
def compiled_solves() -> Iterator[None]:
    """A context in which every solve is as if its solver had compile=True."""
    token = _compiling.set(True)
    try:
        yield
    finally:
        _compiling.reset(token)


def _step(
    method: str,
    divergence: Divergence | None,
    integrands: tuple[Integrand, ...],
    probe: Tensor | None,
    field: VectorField,
    context: Tensor | None,
    t: Tensor,
    h: Tensor,
    state: ode.State,
) -> ode.State:
    """One step of a fixed-step method from the time t, of length h."""

    def dynamics(t: Tensor, state: ode.State) -> ode.State:
        return _rates(divergence, integrands, probe, field, t, state[0], context)

    return fixed.step(dynamics, state, t, h, method)


# For each field, dtype and integrands, see `ode.Step`.
_saved: WeakKeyDictionary[VectorField, dict[Any, dict[tuple[torch.Size, ...], int]]]
_saved = WeakKeyDictionary()
_compiled_for: WeakKeyDictionary[VectorField, dict[str, Callable[..., ode.State]]]
_compiled_for = WeakKeyDictionary()


def _compiled(function: FunctionType, *arguments: Any) -> ode.State:
    """Call `_rates` or `_step`, compiled separately for each field among the arguments.

    torch.compile limits the number of recompilations of a code object, so that fields that share
    one would soon not be compiled.
    """
    field = next(value for value in arguments if isinstance(value, VectorField))
    own = _compiled_for.setdefault(field, {})
    if function.__name__ not in own:
        copied = FunctionType(function.__code__.replace(), function.__globals__)
        own[function.__name__] = torch.compile(copied, dynamic=False)
    return own[function.__name__](*arguments)


def reconfigured(transform: Transform, **settings: Any) -> Transform:
    """A copy with the same weights and another solver or divergence in every `Continuous`.

    Such a solver is also used in training, instead of that of the recipe. To copy a `Continuous`
    takes 7 μs. A context variable would avoid it, but torch.compile cannot trace one, and does
    not notice a change of a thread-local variable.

    Args:
        transform: The transform.
        settings: The new attributes, solver=… or divergence=….
    """
    if not is_continuous(transform):
        return transform

    def change(part: Continuous) -> None:
        for name, value in settings.items():
            setattr(part, name, value)
        if "solver" in settings:
            part.recipe = replace(part.recipe, solver=None)

    return _with_changes(transform, change)


def refined(transform: Transform) -> Transform:
    """A copy with the same weights and the `refined` solver in every `Continuous`."""

    def change(part: Continuous) -> None:
        part.solver = part.solver.refined()

    return _with_changes(transform, change)


def under_recipes(transform: Transform) -> Transform:
    """A copy with the same weights in which each `Continuous` has the solver of its recipe."""

    def change(part: Continuous) -> None:
        part.solver = part.recipe.solver or part.solver

    return _with_changes(transform, change)


def without_odes(transform: Transform) -> Transform:
    """A copy with the same other parts, in which each `Continuous` leaves points where they are.

    Args:
        transform: The transform.
    """
    return _with_odes(transform, _Still)


def _with_changes(transform: Transform, change: Callable[[Continuous], None]) -> Transform:
    def changed(part: Continuous) -> Transform:
        clone = copy.copy(part)
        change(clone)
        return clone

    return _with_odes(transform, changed)


def _with_odes(transform: Transform, become: Callable[[Continuous], Transform]) -> Transform:
    """A copy of the transform in which each `Continuous` is what `become` makes of it."""

    def copied(module: nn.Module) -> nn.Module:
        if isinstance(module, Continuous):
            return become(module)
        if not isinstance(module, Transform | nn.ModuleList):
            return module
        clone = copy.copy(module)
        clone._modules = {name: copied(child) for name, child in module._modules.items()}  # pyright: ignore
        return clone

    result = copied(transform)
    assert isinstance(result, Transform)
    return result


def odes_in(transform: nn.Module) -> list[Continuous]:
    """Every `Continuous` of a transform, in the order of `solve_each`."""
    if isinstance(transform, Continuous):
        return [transform]
    if not isinstance(transform, Transform | nn.ModuleList):
        return []
    return [ode for part in transform._modules.values() if part for ode in odes_in(part)]


def solve_each(
    transform: Transform, x: Tensor, context: Tensor | None, solves: Sequence[Solve]
) -> tuple[Tensor, Tensor, tuple[Integral, ...]]:
    """Data → base, as `transform.inverse`, with each ODE solved in its own way.

    Args:
        transform: Any nest of transforms, such as a multi-scale flow.
        x: Data, shape (*batch, *event).
        context: Condition, shape (*batch, C), or None.
        solves: One for each of `odes_in(transform)`, in their order.

    Returns:
        z and log|det ∂z/∂x|, as of `transform.inverse`, and the result of each ODE. Its integrals
        and estimates have shape (*batch,) and (probes, *batch), summed over the pixels where the
        ODE is one of each pixel.

    Raises:
        ValueError: Something is integrated in a `Compose` that recomputes its activations, through
            which integrals have no gradient.
    """
    parts = transforms_in(transform)
    if any(s.integrands for s in solves) and any(getattr(p, "recompute", False) for p in parts):
        raise ValueError(
            "Compose: expected recompute=False where penalties are integrated, as integrals have "
            "no gradient through recomputed steps, got recompute=True"
        )
    batch_dims = x.dim() - transform.event_dims
    told, solved = iter(enumerate(solves)), {}
    recording = _with_odes(transform, lambda ode: _Recorded(ode, *next(told), solved, batch_dims))
    z, ladj = recording.inverse(x, context)
    return z, ladj, tuple(solved[k] for k in range(len(solves)))


class _Still(Transform):
    """A `Continuous` in which no time passes.

    Args:
        ode: The `Continuous`.
    """

    def __init__(self, ode: Continuous) -> None:
        super().__init__(ode.event_dims, ode.context_dim, ode.event_shape)

    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return z, z.new_zeros(z.shape[: z.dim() - self.event_dims])

    def inverse(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.forward(x, context)


class _Recorded(Transform):
    """A `Continuous` within `solve_each`, which keeps what its solve gives.

    Args:
        ode: The `Continuous`.
        index: Its place among the ODEs.
        solve: How it is solved.
        solved: Where the result is kept, by the index.
        batch_dims: Number of axes of a batch of data.
    """

    def __init__(
        self, ode: Continuous, index: int, solve: Solve, solved: dict[int, Integral],
        batch_dims: int,
    ) -> None:  # fmt: skip
        super().__init__(ode.event_dims, ode.context_dim)
        self.ode, self.index, self.solve = ode, index, solve
        self.solved, self.batch_dims = solved, batch_dims

    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self.ode._expect("z", z, context)
        return self._recorded(z, context, "data", 1.0 - self.solve.short)

    def inverse(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self.ode._expect("x", x, context)
        return self._recorded(x, context, "base", self.solve.short)

    def _recorded(
        self, value: Tensor, context: Tensor | None, towards: Literal["data", "base"], stop: float
    ) -> tuple[Tensor, Tensor]:
        result = self.ode.integrate(
            value, context, towards=towards, divergence=self._divergence(value),
            integrands=self.solve.integrands, stop=stop,
        )  # fmt: skip
        estimates = result.estimates
        self.solved[self.index] = result._replace(
            integrals=tuple(_summed(part, self.batch_dims) for part in result.integrals),
            estimates=None if estimates is None else _summed(estimates, 1 + self.batch_dims),
        )
        return result.value, result.ladj

    def _divergence(self, value: Tensor) -> Divergence:
        """The solve's divergence, with the first entries of its probes as far as value has any."""
        divergence = DIVERGENCES.build(self.solve.divergence)
        probe = probes_of(divergence)
        if probe is None:
            return divergence
        size = math.prod(value.shape[self.batch_dims :])
        own = probe.flatten(1 + self.batch_dims)[..., :size]
        return replace(divergence, probe=own.reshape(len(probe), *value.shape))


def ends_of_odes(
    transform: Transform, x: Tensor, context: Tensor | None
) -> list[tuple[Tensor, Tensor]]:
    """Where data are at t = 1 and at t = 0 of each ODE of `odes_in(transform)`.

    Args:
        transform: Any nest of transforms.
        x: Data, shape (*batch, *event).
        context: Condition, shape (*batch, C), or None.
    """
    seen: dict[int, tuple[Tensor, Tensor]] = {}
    numbers = iter(range(len(odes_in(transform))))
    _with_odes(transform, lambda ode: _Seen(ode, next(numbers), seen)).inverse(x, context)
    return [seen[number] for number in sorted(seen)]


class _Seen(Transform):
    """A `Continuous` within `ends_of_odes`.

    Args:
        ode: The `Continuous`.
        index: Its place among the ODEs.
        seen: Where both ends are kept, by the index.
    """

    def __init__(
        self, ode: Continuous, index: int, seen: dict[int, tuple[Tensor, Tensor]]
    ) -> None:
        super().__init__(ode.event_dims, ode.context_dim)
        self.ode, self.index, self.seen = ode, index, seen

    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.ode(z, context)

    def inverse(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        z, ladj = self.ode.inverse(x, context)
        self.seen[self.index] = x, z
        return z, ladj


def _summed(parts: Tensor, dims: int) -> Tensor:
    """The sum over all axes after the first `dims`."""
    return parts.flatten(dims).sum(-1) if parts.dim() > dims else parts


def is_continuous(transform: Transform) -> bool:
    """Whether the transform contains a `Continuous`."""
    return next(solvers_in(transform), None) is not None


def has_fixed_steps(transform: Transform) -> bool:
    """Whether it contains an ODE that is solved without step-size control, with an error."""
    return any(solver.fixed and not solver.discrete for solver in solvers_in(transform))


def has_discrete_steps(transform: Transform) -> bool:
    """Whether it contains an ODE whose solver's steps are the model."""
    return any(solver.discrete for solver in solvers_in(transform))


def is_adaptive(transform: Transform) -> bool:
    """Whether it contains an ODE with step-size control, whose steps all rows share."""
    return any(not solver.fixed for solver in solvers_in(transform))


def solvers_in(transform: Transform) -> Iterator[Solver]:
    """Those of the ODEs in a transform."""
    return (part.solver for part in transforms_in(transform) if isinstance(part, Continuous))
