"""A flow: a base distribution and a transform, with what stands between it and the data."""

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.nn.modules.dropout import _DropoutNd

from cnf.dequantization import Dequantization
from cnf.distributions import Base, FromTorch, as_base, expect_volume, flow_distribution
from cnf.dynamics.divergence import (
    DIVERGENCES,
    Divergence,
    innermost,
    is_exact,
    probes_of,
    seconds_of_exact,
    traced_field,
)
from cnf.dynamics.fixed import captured, transformed
from cnf.dynamics.regularizers import Integrand
from cnf.dynamics.solver import FLOW_MAP, Solver
from cnf.errors import (
    expect_context,
    expect_event,
    expect_generator,
    expect_shape,
    expect_times,
    warn,
)
from cnf.fields.base import VectorField
from cnf.precision import collapsing, widest
from cnf.printing import shaped, weights_of, wrapped
from cnf.rows import AllFinite, FiniteRows, all_finite
from cnf.transforms.base import Transform, transforms_in
from cnf.transforms.chunks import by_chunks
from cnf.transforms.continuous import (
    Continuous,
    Integral,
    Solve,
    is_adaptive,
    is_continuous,
    odes_in,
    reconfigured,
    solve_each,
)
from cnf.transforms.normalization import initializing

Shape = int | Sequence[int]
LONG = 60.0  # seconds after which `log_prob` says beforehand what it will take
FEW, MANY = 20, 64  # evaluations of an adaptive solve at least; tangents whose time is measured
FAR = 1_000.0  # scales: none of n points is further than √n from their mean


@contextmanager
def evaluating(module: Any) -> Iterator[None]:
    """Inside, a module is in eval mode; then each of its parts is in its own mode again.

    What is no module (a density) has none.
    """
    parts = list(module.modules()) if isinstance(module, nn.Module) else []
    modes = [part.training for part in parts]
    try:
        for part in parts:
            part.training = False
        yield
    finally:
        for part, mode in zip(parts, modes, strict=True):
            part.training = mode


class Flow(nn.Module):
    """p(x) by change of variables: z from `base`, x = preprocess(transform(z)).

    x may have more digits than the weights: a flow in float32 takes float64 data, standardizes
    them in float64 and goes on in float32. Log-densities come in the dtype of x, samples in
    `data_dtype`, and z and contexts are of the flow's own `dtype`.

    >>> import cnf
    >>> flow = cnf.models.build("realnvp", dim=2)
    >>> flow
    Flow 'realnvp': points of 2; 35,344 weights
        base: StandardNormal(2)
        transform: Compose(8 × Coupling(2, affine, hidden (64, 64)))
        preprocess: Standardize(2, not fitted)
    >>> x = flow.sample(5)
    >>> x.shape, flow.log_prob(x).shape
    (torch.Size([5, 2]), torch.Size([5]))

    Args:
        base: A `cnf.distributions.Base`, a torch distribution, a density, or None for N(0, I);
            it is cast to the dtype of the transform's weights.
        transform: Base → (standardized) data.
        preprocess: A transform without parameters to train, from what `transform` gives to data;
            its log-determinant counts. Where it has a `fit` method, the first `cnf.fit` calls it
            with the training data, once.
        dequantization: For discrete data. `log_prob` is then a lower bound of log P(x) from one
            draw.
        event_shape: Shape of one z, needed only when `base` is None.
        context_preprocess: A module from a context to what `transform` takes, such as
            `StandardizeContext`; fitted like `preprocess`.

    Raises:
        ValueError: No event shape, parts that do not fit each other, or a discrete base.
    """

    def __init__(
        self,
        base: Base | Distribution | Any | None,
        transform: Transform,
        preprocess: Transform | None = None,
        dequantization: Dequantization | None = None,
        event_shape: Sequence[int] | None = None,
        context_preprocess: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if base is None and event_shape is None:
            raise ValueError("Flow: expected event_shape=… where base is None")
        self.base = as_base(base, event_shape or ())
        if isinstance(self.base, FromTorch):
            expect_volume(self.base.distribution)
        weights = next((p.dtype for p in transform.parameters()), self.base._like.dtype)
        if weights != self.base._like.dtype:  # points and means often come in float64
            self.base.to(weights)
        self.transform = transform
        self.preprocess = preprocess
        self.dequantization = dequantization
        self.context_preprocess = context_preprocess
        self.event_shape = tuple(event_shape or self.base.event_shape)
        if self.base.event_shape != self.event_shape:  # it would broadcast to wrong densities
            got = f"{type(self.base).__name__} of {self.base.event_shape}"
            raise ValueError(f"Flow: expected a base of {self.event_shape}, got {got}")
        for part in (transform, preprocess):
            if part is not None and part.event_shape not in (None, self.event_shape):
                got = f"{type(part).__name__} of {part.event_shape}"
                raise ValueError(f"Flow: expected a transform of {self.event_shape}, got {got}")
        self.context_dim = transform.context_dim
        size = getattr(context_preprocess, "size", self.context_dim)
        if context_preprocess is not None and size != self.context_dim:
            raise ValueError(
                f"Flow: expected a context_preprocess of size {self.context_dim}, the transform's "
                f"context, got {size}"
            )
        self._warned: set[str] = set()  # shared by copies with another solver
        self._calls = 0  # that could have warned
        self.spec: dict[str, Any] | None = None  # the call of models.build; saved in checkpoints

    def __repr__(self) -> str:
        kind = repr(self.spec["model"]) if self.spec else f"of a {type(self.transform).__name__}"
        shape = shaped(self.event_shape, self.context_dim)
        lines = [f"{type(self).__name__} {kind}: points of {shape}; {weights_of(self)}"]
        for name in ("base", "transform", "preprocess", "dequantization", "context_preprocess"):
            if (part := getattr(self, name)) is not None:
                lines.append(wrapped(f"{name}: {part}", "    "))
        return "\n".join(lines)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of weights, base samples and contexts."""
        return self.base._like.dtype

    @property
    def device(self) -> torch.device:
        """The device of weights, base samples and contexts."""
        return self.base._like.device

    @property
    def data_dtype(self) -> torch.dtype:
        """The dtype of samples: `dtype`, or that which `preprocess` was fitted to if wider."""
        dtype = self.dtype
        for part in () if self.preprocess is None else transforms_in(self.preprocess):
            dtype = torch.promote_types(getattr(part, "dtype", dtype), dtype)
        limit = widest(self.device)
        return dtype if torch.promote_types(dtype, limit) == limit else self.dtype

    @property
    def field(self) -> VectorField:
        """The vector field of a continuous flow; any other flow has none (AttributeError)."""
        if not isinstance(self.transform, Continuous):
            raise AttributeError  # `__getattr__` says why
        return self.transform.field

    def __getattr__(self, name: str) -> Any:
        if name == "field":  # nn.Module would hide the property's own message
            raise AttributeError(_no_field("Flow.field", self))
        return super().__getattr__(name)

    @torch.no_grad()
    def initialize(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        """Set each `ActNorm` that is not initialized yet from data x, (*batch, *event).

        `fit` calls this with the first rows; no other call sets them.

        Args:
            x: Data, shape (*batch, *event).
            context: Condition, shape (*batch, C) or one that broadcasts to it, or None.
            generator: Source of the dequantization's draw.
        """
        with evaluating(self), initializing(self.transform) as fresh:
            if fresh:
                _, y, context, _ = self._enter(x, context, "Flow.initialize", generator)
                self._without_ladj.inverse(y, context)

    def log_prob(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        divergence: str | Divergence | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Log-density in nats, (*batch, *event) → (*batch,); exact unless asked otherwise.

        A row of x or context that holds NaN has NaN, one of x at infinity has -inf; the others are
        as they would be without it, gradients too.

        Data or contexts a thousand scales from what preprocessing was fitted to are warned of,
        once, where gradients are off: on the CPU in any call, on a GPU, which looking waits for,
        in the 1st, 2nd, 4th, 8th, … call. `fit`, `check` and the scores call this, too.

        An exact divergence by D tangents that will take more than a minute is warned of, once,
        before it starts, with its time and the estimate that avoids it.

        Args:
            x: Data.
            context: Condition, shape (*batch, context_dim) or one that broadcasts to it.
            divergence: An estimator for continuous flows, such as `Hutchinson(probes=8)`; None for
                what the flow was built with, which is exact.
            generator: Source of the dequantization's draw.

        Raises:
            ValueError: A wrong shape, or fewer digits than the flow's; a context missing or not
                expected.
            SolverError: An ODE solve failed.
        """
        estimator = None if divergence is None else DIVERGENCES.build(divergence)
        rows, y, context, outer = self._enter(x, context, "Flow.log_prob", generator)
        self._warn_of_misuse(y, context)
        transform = self.transform
        if estimator is not None:
            transform = reconfigured(transform, divergence=_for_rows(estimator, rows))
        self._warn_of_cost(transform, y)
        if probes_of(estimator) is None:
            z, ladj = by_chunks(transform, transform.inverse, y, context)
        else:  # probes that are given are for all rows at once
            z, ladj = transform.inverse(y, context)
        dtype = torch.promote_types(x.dtype, self.dtype)  # of pixels, the flow's
        log_prob = (self.base.log_prob(z) + ladj + outer).to(dtype)
        return rows.restore(log_prob, rows.log_density)

    def log_prob_and_integral(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        divergence: str | Divergence = "exact",
        integrands: Sequence[Integrand] = (),
        stop: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Integral]:
        """As `log_prob`, with all that the solves of a continuous flow give, in sum.

        Args:
            x: As of `log_prob`.
            context: As of `log_prob`.
            divergence: As of `log_prob`; probes that are given are those of every solve.
            integrands: As of `Continuous.integrate`.
            stop: How far from its end, as a part of [0, 1], each solve stops.
            generator: As of `log_prob`.

        Raises:
            TypeError: The flow solves no ODE.
        """
        count = len(require_odes("Flow.log_prob_and_integral", self))
        solves = [Solve(divergence, integrands, stop)] * count
        rows, log_prob, z, ladj, solved = self._solved(x, context, solves, generator)
        estimates = [each.estimates for each in solved if each.estimates is not None]
        spread = [estimate - estimate.mean(0) for estimate in estimates]
        return rows.restore(log_prob, rows.log_density), Integral(
            rows.restore(z),
            rows.restore(ladj),
            tuple(
                rows.restore(torch.stack(each).sum(0))
                for each in zip(*(each.integrals for each in solved), strict=True)
            ),
            sum(each.nfe for each in solved),
            rows.restore(ladj + torch.stack(spread).sum(0), axis=1) if spread else None,
        )

    def log_prob_with_solves(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        solves: Sequence[Solve],
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, tuple[tuple[Tensor, ...], ...]]:
        """As `log_prob`, with the integrals of each ODE, which is solved in its own way.

        Args:
            x: As of `log_prob`.
            context: As of `log_prob`.
            solves: One for each ODE of the transform, see `cnf.transforms.continuous.solve_each`.
            generator: As of `log_prob`.
        """
        rows, log_prob, _, _, solved = self._solved(x, context, solves, generator)
        return rows.restore(log_prob, rows.log_density), tuple(
            tuple(rows.restore(integral) for integral in each.integrals) for each in solved
        )

    def _solved(
        self,
        x: Tensor,
        context: Tensor | None,
        solves: Sequence[Solve],
        generator: torch.Generator | None,
    ) -> tuple[FiniteRows | AllFinite, Tensor, Tensor, Tensor, tuple[Integral, ...]]:
        """The rows, and of the selected ones log_prob, z, the transform's ladj and each solve."""
        rows, y, context, outer = self._enter(x, context, "Flow.log_prob", generator)
        own = [replace(each, divergence=_for_rows(each.divergence, rows)) for each in solves]
        z, ladj, solved = solve_each(self.transform, y, context, own)
        dtype = torch.promote_types(x.dtype, self.dtype)
        return rows, (self.base.log_prob(z) + ladj + outer).to(dtype), z, ladj, solved

    def sample(
        self,
        sample_shape: Shape = (),
        context: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draws, (*sample_shape, *context batch, *event), without gradients; an int is (int,).

        Args:
            sample_shape: Shape of the draws; an int n is (n,).
            context: Condition, shape (*batch, C), or None.
            generator: Source of the draw; torch's default generator if None.
        """
        with torch.no_grad():
            return self._decoded(*self.draw_base(sample_shape, context, generator, "Flow.sample"))

    def rsample(
        self,
        sample_shape: Shape = (),
        context: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """As `sample`, with gradients to the parameters and the context.

        Args:
            sample_shape: Shape of the draws; an int n is (n,).
            context: Condition, shape (*batch, C), or None.
            generator: Source of the draw; torch's default generator if None.
        """
        return self._decoded(*self.draw_base(sample_shape, context, generator, "Flow.rsample"))

    def sample_and_log_prob(
        self,
        sample_shape: Shape = (),
        context: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Draws and their log-density from one solve, both with gradients.

        Args:
            sample_shape: Shape of the draws; an int n is (n,).
            context: Condition, shape (*batch, C), or None.
            generator: Source of the draw; torch's default generator if None.
        """
        z, context = self.draw_base(sample_shape, context, generator, "Flow.sample_and_log_prob")
        self.expect_density_of_samples("Flow.sample_and_log_prob")
        return self._decoded_and_log_prob(z, context)

    def _decoded_and_log_prob(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        rows, z, context = self._start(z, context)
        y, ladj = by_chunks(self.transform, self.transform, z, context)
        x, outer = self.outside(y)
        return rows.restore(x), rows.restore(self.base.log_prob(z) - (ladj + outer))

    def encode(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Data → base sample z, of the same batch shape; NaN in rows that are not finite.

        Args:
            x: Data, shape (*batch, *event).
            context: Condition, shape (*batch, C) or one that broadcasts to it, or None.
            generator: Source of the dequantization's draw; torch's default generator if None.
        """
        rows, y, context, _ = self._enter(x, context, "Flow.encode", generator)
        z, _ = by_chunks(self.transform, self._without_ladj.inverse, y, context)
        return rows.restore(z)

    def decode(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """Base sample → data; NaN in rows that are not finite.

        Args:
            z: Base samples, shape (*batch, *event).
            context: Condition, shape (*batch, C) or one that broadcasts to it, or None.
        """
        return self._decoded(z, self._context_of("Flow.decode", z, context))

    def decode_and_log_prob(
        self, z: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """As `decode`, with the log-density of the data, shape (*batch,), from one solve.

        Args:
            z: Base samples, shape (*batch, *event).
            context: Condition, shape (*batch, C) or one that broadcasts to it, or None.
        """
        self.expect_density_of_samples("Flow.decode_and_log_prob")
        context = self._context_of("Flow.decode_and_log_prob", z, context)
        return self._decoded_and_log_prob(z, context)

    def expect_density_of_samples(self, who: str) -> None:
        """Raise TypeError for a dequantized flow, whose samples are rounded.

        Args:
            who: Who asks.
        """
        if self.dequantization is not None:
            raise TypeError(
                f"{who}: a dequantized flow has no density of its samples; call sample, then "
                "log_prob for the bound"
            )

    def trajectory(
        self, z: Tensor, times: Tensor | Sequence[float], context: Tensor | None = None
    ) -> Tensor:
        """Where z is at `times`, from 0 to 1 at most, in data space: (times, *batch, *event).

        Args:
            z: Base samples, shape (*batch, *event).
            times: Times, ascending from 0 and at most 1.
            context: Condition, shape (*batch, C) or one that broadcasts to it, or None.
        """
        transform = require_field("Flow.trajectory", self)
        times = expect_times("Flow.trajectory", times)
        rows, z, context = self._start(z, self._context_of("Flow.trajectory", z, context))
        path = transform.trajectory(z, times, context) if len(times) > 1 else z.unsqueeze(0)
        return rows.restore(self.outside(path)[0], axis=1)

    def inside(
        self, x: Tensor, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor | float]:
        """Data as the transform gives them: dequantized, preprocessed, in the flow's dtype.

        Args:
            x: Data, of any floating dtype.
            generator: Source of the dequantization's draw.

        Returns:
            y, of x's shape, and what this adds to the log-density, shape (*batch,), or 0.
        """
        total = 0.0
        if self.dequantization is not None:
            x, total = self.dequantization.encode(x.nan_to_num(0.0, 0.0, 0.0), generator)
        _warn_of_merged("x", x.reshape(-1, *self.event_shape), self.preprocess, self.dtype)
        if self.preprocess is not None:
            x, ladj = self.preprocess.inverse(x)
            total = total + ladj
        return x.to(self.dtype), total

    def outside(self, y: Tensor) -> tuple[Tensor, Tensor | float]:
        """The transform's output in data space, and log|det| of that, shape (*batch,), or 0."""
        return (y, 0.0) if self.preprocess is None else self.preprocess(y.to(self.data_dtype))

    def with_solver(self, solver: Solver | Mapping[str, Any] | str) -> "Flow":
        """The same weights under another solver: few-step sampling, tighter evaluation.

        Args:
            solver: A `Solver`, its arguments, or the name of an adaptive method.
        """
        if not is_continuous(self.transform):
            raise TypeError(
                f"Flow.with_solver: no ODE is solved in a {type(self.transform).__name__}"
            )
        solver = Solver.of(solver)
        flow = self.with_transform(reconfigured(self.transform, solver=solver))
        flow.spec = self._spec_with(solver)
        return flow

    def keep_solver(self, solver: Solver) -> None:
        """Solve every ODE of this flow by another solver from now on; a saved flow keeps it.

        Args:
            solver: The solver.
        """
        for ode in odes_in(self.transform):
            ode.solver, ode.recipe = solver, replace(ode.recipe, solver=None)
        self.spec = self._spec_with(solver)

    def _spec_with(self, solver: Solver) -> dict[str, Any] | None:
        if self.spec is None:
            return None
        return {**self.spec, "options": {**self.spec["options"], "solver": asdict(solver)}}

    def with_transform(self, transform: Transform) -> "Flow":
        """The same base, preprocessing and mode with another transform.

        `cnf.load` cannot build it.
        """
        flow = copy.copy(self)
        flow._modules = {**self._modules, "transform": transform}
        flow.spec = None
        return flow

    def with_dequantization(self, dequantization: Dequantization | None) -> "Flow":
        """The same weights with other noise of discrete data, or none; `cnf.load` cannot build it.

        Args:
            dequantization: The noise.
        """
        flow = copy.copy(self)
        flow._modules = {**self._modules}
        flow.dequantization = dequantization
        flow.spec = None
        return flow

    def distribution(self, context: Tensor | None = None) -> Distribution:
        """This flow as a `torch.distributions.Distribution`, and Pyro's where Pyro is imported.

        Its batch shape is the context's; see `FlowDistribution`.
        """
        self.inner_context("Flow.distribution", context, None)  # raises for one that does not fit
        return flow_distribution(self, context)

    def _decoded(self, z: Tensor, context: Tensor | None) -> Tensor:
        rows, z, context = self._start(z, context)
        y, _ = by_chunks(self.transform, self._without_ladj, z, context)
        x = rows.restore(self.outside(y)[0])
        return x if self.dequantization is None else self.dequantization.decode(x)

    @property
    def _without_ladj(self) -> Transform:
        """The transform, whose ODEs are solved without their divergence."""
        return reconfigured(self.transform, divergence=None)

    def _enter(
        self, x: Tensor, context: Tensor | None, who: str, generator: torch.Generator | None
    ) -> tuple[FiniteRows | AllFinite, Tensor, Tensor | None, Tensor | float]:
        """Data `inside`, checked, their context, and what that adds to the log-density."""
        expect_generator(who, generator)
        if self.dequantization is not None and isinstance(x, Tensor):
            # Pixels are uint8; noise on them would be lost in the few digits of bfloat16.
            x = x.to(torch.promote_types(torch.promote_types(x.dtype, self.dtype), torch.float32))
        expect_event(who, "x", x, self.event_shape)
        self._expect_device(who, "x", x)
        if torch.promote_types(x.dtype, self.dtype) != x.dtype:
            raise ValueError(
                f"{who}: expected x of dtype {self.dtype}, the flow's, or wider, got "
                f"{x.dtype}; convert one of them: x.to({self.dtype}) or flow.to({x.dtype})"
            )
        context = self.inner_context(who, context, x.shape[: x.dim() - len(self.event_shape)])
        y, outer = self.inside(x, generator)
        rows = self._rows([x] if y is x else [x, y], context)
        return rows, rows.select(y), rows.select(context), rows.select(outer)

    def warn_once(self, of: str, text: str) -> None:
        """Warn, if this flow has not warned `of` this before.

        Args:
            of: What it is about.
            text: The warning.
        """
        if of not in self._warned:
            self._warned.add(of)
            warn(text)

    def _warn_of_misuse(self, y: Tensor, context: Tensor | None) -> None:
        """Warn of rows far from all that the flow was fitted to, and of dropout in train mode.

        On a GPU, which it would wait for, only in the 1st, 2nd, 4th, 8th, … call.
        """
        if torch.is_grad_enabled() or type(y) is not Tensor or captured():
            return
        self._calls += 1
        if self.training and "dropout" not in self._warned and _drops_out(self):
            self.warn_once(
                "dropout",
                "Flow.log_prob: the flow is in train mode and holds a Dropout, so that each call "
                "gives another density; call flow.eval() first",
            )
        if y.is_meta or not (y.is_cpu or self._calls.bit_count() == 1):
            return
        parts = (("x", self.preprocess, y), ("context", self.context_preprocess, context))
        for name, part, value in parts:
            if value is None or name in self._warned or not getattr(part, "fitted", False):
                continue
            if (value.abs() > FAR).any():
                scales = value.nan_to_num(0.0).abs().max()
                self.warn_once(
                    name,
                    f"Flow.log_prob: {name} is up to {scales:.3g} scales from the mean of what "
                    "the flow was fitted to: its density there means nothing. Is it in the units "
                    "of the training data?",
                )

    def _warn_of_cost(self, transform: Transform, y: Tensor) -> None:
        """Warn, before it starts, that exact divergences will take more than `LONG`."""
        if math.prod(self.event_shape) < MANY:  # no part of it has more dimensions
            return
        if captured() or "cost" in self._warned or y.is_meta or type(y) is not Tensor:
            return
        rows = y[(..., *[0] * len(self.event_shape))].numel()
        for part in transforms_in(transform):
            if not isinstance(part, Continuous) or not is_exact(part.divergence) or not rows:
                continue
            # The determinant of a step takes all tangents, whatever the trace would.
            field = innermost(part.field) if part.solver.discrete else traced_field(part.field)
            if field is None or math.prod(field.event_shape) < MANY:
                continue
            if part.field not in _SECONDS:
                _SECONDS[part.field] = seconds_of_exact(field, rows) / rows
            each = rows * _SECONDS[part.field]
            known = part.solver.evaluations
            if each * (known or FEW) > LONG:
                self.warn_once("cost", _cost(field, part.solver, rows, each))

    def _start(
        self, z: Tensor, context: Tensor | None
    ) -> tuple[FiniteRows | AllFinite, Tensor, Tensor | None]:
        """The rows of z and context to compute with."""
        rows = self._rows([z], context)
        return rows, rows.select(z), rows.select(context)

    def _rows(self, values: Sequence[Tensor], context: Tensor | None) -> FiniteRows | AllFinite:
        eager = not captured()
        # A GPU would have to be waited for, and a tracer's tensor holds no numbers.
        if eager and type(values[0]) is Tensor and values[0].is_cpu:
            if all_finite(*values, context):
                return AllFinite()
        missing, drop = self.transform.optional_context, eager and is_adaptive(self.transform)
        return FiniteRows(values, len(self.event_shape), context, missing, drop)

    def _expect_device(self, who: str, name: str, value: Tensor) -> None:
        device = self.device
        if value.device != device:
            raise ValueError(
                f"{who}: expected {name} on {device}, the flow's device, got one on "
                f"{value.device}; move one of them: {name}.to({str(device)!r}) or "
                f"flow.to({str(value.device)!r})"
            )

    def _context_of(self, who: str, z: Tensor, context: Tensor | None) -> Tensor | None:
        """The inner context of base samples that a caller gives, which are checked too."""
        expect_event(who, "z", z, self.base.event_shape)
        self._expect_device(who, "z", z)
        if z.dtype != self.dtype:
            raise ValueError(
                f"{who}: expected z of dtype {self.dtype}, the flow's, got {z.dtype}; "
                f"convert one of them: z.to({self.dtype}) or flow.to({z.dtype})"
            )
        return self.inner_context(who, context, z.shape[: z.dim() - len(self.event_shape)])

    def inner_context(
        self, who: str, context: Tensor | None, batch: Sequence[int] | None
    ) -> Tensor | None:
        """The context as the transform and its field take it, which the flow's methods do not.

        It is checked, standardized and cast to the flow's dtype.

        Args:
            who: Who asks, for errors.
            context: Condition, shape (*batch, C) or one that broadcasts to it, or None.
            batch: The batch shape that it is expanded to; as it is if None.

        Raises:
            ValueError: A context is missing, not expected, or does not fit.
        """
        if not self.context_dim:
            if context is not None:
                raise ValueError(
                    f"{who}: this flow is unconditional, got a context; "
                    "build it with context=…, the context's size"
                )
            return None
        if context is None and self.transform.optional_context:
            return None
        given = expect_context(who, context, self.context_dim)
        self._expect_device(who, "the context", given)
        rows = given.reshape(-1, self.context_dim)
        _warn_of_merged("context", rows, self.context_preprocess, self.dtype)
        inner = given if self.context_preprocess is None else self.context_preprocess(given)
        inner = inner.to(self.dtype)
        if batch is None:
            return inner
        try:
            return inner.expand(*batch, self.context_dim)
        except RuntimeError:
            raise ValueError(
                f"{who}: expected a context that broadcasts to {(*batch, self.context_dim)}, "
                f"got {tuple(given.shape)}"
            ) from None

    def draw_base(
        self, sample_shape: Shape, context: Tensor | None, generator: torch.Generator | None,
        who: str = "Flow.draw_base",
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """Base samples as `sample` begins with, and their `inner_context`.

        Args:
            sample_shape: As of `sample`.
            context: As of `sample`.
            generator: As of `sample`.
            who: Who asks, for errors.
        """
        shape = expect_shape(who, sample_shape)
        expect_generator(who, generator)
        context = self.inner_context(who, context, None)
        if context is not None:
            shape = (*shape, *context.shape[:-1])
            context = context.expand(*shape, self.context_dim)
        return self.base.sample(shape, generator).to(self.dtype), context


_SECONDS: WeakKeyDictionary[VectorField, float] = WeakKeyDictionary()  # see `seconds_of_exact`


def _cost(field: VectorField, solver: Solver, rows: int, each: float) -> str:
    known = solver.evaluations
    count = f"{known} evaluations" if known else f"its evaluations, often {FEW} to 200"
    total = each * (known or FEW) / 60
    what = "log-determinant of steps" if solver.discrete else "divergence"
    told = (
        f"Flow.log_prob: the exact {what} of {type(field).__name__} takes "
        f"{math.prod(field.event_shape)} tangents of each of {rows} rows, {each:.3g} s for an "
        f"evaluation: {'' if known else 'at least '}{total:.3g} minutes for {count} by "
        f"{solver.method}. "
    )
    if solver.method == FLOW_MAP:
        estimate = "The head of the flow map estimates it: log_prob(x, divergence='learned')"
        without = "A flow map with divergence_head=True would have learned an estimate of it"
        estimate = estimate if field.learns_divergence else without
        return f"{told}{estimate}; else score fewer rows, or take fewer steps"
    told += (
        "For an estimate at the price of a few, give the "
        "call divergence=Hutchinson(probes=8), as in log_prob(x, divergence=…)"
    )
    return told if solver.discrete else f"{told}; Solver('rk4', steps=8) takes 32"


def _drops_out(module: nn.Module) -> bool:
    return any(isinstance(m, _DropoutNd) and m.training and m.p > 0 for m in module.modules())


def require_field(who: str, flow: Flow, instead: str = "") -> Continuous:
    """The flow's `Continuous`, or a TypeError that says that it has no vector field.

    Args:
        who: What needs it.
        flow: The flow.
        instead: What to do with other flows.
    """
    if not isinstance(flow.transform, Continuous):
        raise TypeError(_no_field(who, flow) + (f"; {instead}" if instead else ""))
    return flow.transform


def require_odes(who: str, flow: Flow) -> list[Continuous]:
    """The ODEs that the flow solves, or a TypeError that says that there is none.

    Args:
        who: What needs one.
        flow: The flow.
    """
    if odes := odes_in(flow.transform):
        return odes
    raise TypeError(
        f"{who}: expected a flow whose transform holds a Continuous, since only these solve an "
        f"ODE, got a {type(flow.transform).__name__} without one"
    )


def _no_field(who: str, flow: Flow) -> str:
    several = len(odes_in(flow.transform))
    held = f" of {several} of them, each with a field of its own" if several else ""
    return (
        f"{who}: expected a flow whose transform is a Continuous, since only these have a vector "
        f"field, got a {type(flow.transform).__name__}{held}"
    )


def _for_rows(divergence: str | Divergence, rows: FiniteRows | AllFinite) -> str | Divergence:
    """The divergence, whose probes, where they are given, are those of the selected rows."""
    probes = probes_of(divergence)
    if probes is None or not rows.dropped:
        return divergence
    return replace(divergence, probe=rows.select(probes, axis=1))  # pyright: ignore


def _warn_of_merged(name: str, rows: Tensor, part: nn.Module | None, dtype: torch.dtype) -> None:
    """Warn of columns with too few digits for what `part` was fitted to.

    Without a part, of those that a cast to the flow's dtype merges.
    """
    if part is not None:
        dtype, columns = rows.dtype, _unresolved(part, rows.dtype)
    else:
        columns = [] if transformed() else collapsing(rows, dtype)
    if columns:
        option = {"x": "preprocess", "context": "context_preprocess"}[name]
        warn(
            f"Flow: {dtype} merges values of {name} in columns {columns}, so that results there "
            f"mean little; give {name} in float64 to a flow that was fitted to it with "
            f"{option}='standardize', or subtract a constant from these columns"
        )


def _unresolved(part: Any, dtype: torch.dtype) -> list[int]:
    """The columns that `part` was fitted to with more digits than `dtype` has, and needs them."""
    found: set[int] = set()
    for inner in transforms_in(part):
        if torch.promote_types(dtype, getattr(inner, "dtype", dtype)) != dtype:
            found.update(getattr(inner, "unresolved", ()))
    return sorted(found)
