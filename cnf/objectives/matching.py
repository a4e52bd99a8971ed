"""Flow matching: a regression of the velocity, no ODE solved."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar
from weakref import WeakSet

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cnf.errors import expect_choice, unedited
from cnf.fields import VectorField
from cnf.fields.predicts import Predicts, WithScore, path_of
from cnf.fields.wrappers import wrapped
from cnf.flow import Flow
from cnf.matching.couplings import COUPLINGS, independent
from cnf.matching.paths import PATHS, Linear, Path, PathSample
from cnf.matching.semidiscrete import Plan
from cnf.matching.times import TIMES
from cnf.objectives.base import (
    OBJECTIVES,
    Batch,
    Loss,
    Objective,
    as_flow,
    expect_rows,
    require_continuous,
    resampled,
    weighted_mean,
)


@OBJECTIVES.register("flow-matching")
@dataclass(frozen=True)
class FlowMatching(Objective):
    """E‖v(t, xt) - ut‖² over times t and coupled pairs (x0, x1); no ODE is solved.

    A field that `Predicts` data, noise or score is regressed on those; a `WithScore` field's head
    is trained beside its velocity.
    Source: Lipman et al. (2023), https://arxiv.org/abs/2210.02747; Tong et al. (2024),
    https://arxiv.org/abs/2302.00482.

    Args:
        path: A name in `PATHS`, a `Path`, or {"name": …, **fields}; None for the field's own, or
            linear.
        coupling: A name in `COUPLINGS`, {"name": …, **options}, or a coupling function.
        times: The law of t: a name in `TIMES`, {"name": …, **fields}, or a function of uniform u.
        weighting: Of a field that predicts something else than the velocity: "target" takes the
            plain squared error of x1 or noise, and of the score σ² times it; "velocity" the error
            of the velocity that follows.
        context_dropout: Part of the rows whose context is left out, for guidance; the model must
            have been built with null_context=True.
    """

    needs_data = True
    lr = 6e-3

    path: Any = None
    coupling: Any = "independent"
    times: Any = "uniform"
    weighting: str = "target"
    context_dropout: float = 0.0
    _made: ClassVar[tuple[Any, Any]]  # coupling, law of t

    def __post_init__(self) -> None:
        # Made once: a step of small nets is short. No field: the settings stay what was given.
        fitted = isinstance(self.coupling, FittedCoupling)
        coupling = self.coupling if fitted else COUPLINGS.build(self.coupling, "FlowMatching")
        object.__setattr__(self, "_made", (coupling, TIMES.build(self.times, "FlowMatching")))
        if self.path is not None:
            path = PATHS.build(self.path, "FlowMatching")
            if not isinstance(self.path, str):
                object.__setattr__(self, "path", path)
        expect_choice("FlowMatching", "weighting", self.weighting, ("target", "velocity"))
        if not 0 <= self.context_dropout < 1:
            raise ValueError(
                f"FlowMatching: expected 0 <= context_dropout < 1, got {self.context_dropout}"
            )

    def begin(
        self,
        module: nn.Module,
        rows: Callable[[int], Batch | None],
        generator: torch.Generator,
    ) -> "FlowMatching":
        """With a coupling that is fitted to the data, the same, fitted."""
        coupling = self._made[0]
        data = rows(coupling.rows) if hasattr(coupling, "fit") else None
        if data is None or data.x0 is not None:
            return self
        flow = as_flow("FlowMatching", module)
        with torch.no_grad():
            data = _inside(flow, resampled(data, generator), generator)
            plan = coupling.fit(
                data.x1, lambda n, g: flow.base.sample((n,), g), _seen(flow, data), generator
            )
        return replace(self, coupling=FittedCoupling(plan, data))

    def prepare(
        self, module: nn.Module, batch: Batch, generator: torch.Generator | None = None
    ) -> Batch:
        flow = as_flow("FlowMatching", module)
        field = require_continuous("FlowMatching", flow).field
        expect_rows("FlowMatching", flow, batch)
        with torch.no_grad():
            if batch.x0 is None:
                batch = self._paired(flow, batch, generator)
            else:
                batch = _inside(flow, batch, generator)
            self._draw(field, batch, generator)
        return batch

    def _paired(self, flow: Flow, batch: Batch, generator: torch.Generator | None) -> Batch:
        coupling = self._made[0]
        plain = getattr(coupling, "func", coupling) is independent
        if not plain:
            # Weights of pairs would weigh the base too: it would no longer be what is sampled.
            batch = resampled(batch, generator)
        if isinstance(coupling, FittedCoupling):
            x0 = flow.base.sample((len(batch.x),), generator)
            drawn = coupling.partners(x0, _seen(flow, batch))
            drawn = drawn if flow.dequantization is None else _inside(flow, drawn, generator)
            return drawn.but(x0=x0, weight=batch.weight)
        batch = _inside(flow, batch, generator)
        x0 = flow.base.sample((len(batch.x),), generator)
        context = batch.context if plain else _seen(flow, batch)
        i, j, weight = coupling(x0, batch.x1, context, generator)
        if j is not None:
            batch = batch.map(lambda rows: rows[j])  # what belongs to a data point follows it
        batch.x0 = x0 if i is None else x0[i]
        batch.weight = _product(batch.weight, weight)
        return batch

    def _draw(self, field: VectorField, batch: Batch, generator: torch.Generator | None) -> None:
        """Times, the path's noise, and whose context is left out."""
        assert batch.x1 is not None
        x1, device = batch.x1, batch.x.device if generator is None else generator.device
        if batch.t is None:
            u = torch.rand(len(x1), generator=generator, device=device, dtype=x1.dtype)
            batch.t = self._made[1](u).to(x1.device)
        if batch.noise is None and self._path(field).noisy:
            z = torch.randn(x1.shape, generator=generator, device=device, dtype=x1.dtype)
            batch.noise = z.to(x1.device)
        if not self.context_dropout:
            return
        if batch.context is None or not field.optional_context:
            raise ValueError(
                "FlowMatching: context_dropout needs a model built with null_context=True, and "
                "data with a context"
            )
        dropped = torch.rand(len(x1), generator=generator, device=device) < self.context_dropout
        batch.context = batch.context.masked_fill(dropped.to(x1.device)[:, None], torch.nan)

    def __call__(
        self, module: nn.Module, batch: Batch, generator: torch.Generator | None = None
    ) -> Loss:
        flow = as_flow("FlowMatching", module)
        field = require_continuous("FlowMatching", flow).field
        path = self._path(field)
        ready = batch.x0 is not None and batch.x1 is not None and batch.t is not None
        if not ready or (path.noisy and batch.noise is None):
            batch = self.prepare(flow, batch, generator)
        assert batch.x0 is not None and batch.x1 is not None and batch.t is not None
        if batch.x0.shape != batch.x1.shape:
            shapes = f"{tuple(batch.x1.shape)}, got {tuple(batch.x0.shape)}"
            raise ValueError(f"FlowMatching: expected x0 of x1's shape {shapes}")
        sample = path.sample(batch.x0, batch.x1, batch.t, batch.noise)
        context = flow.inner_context("FlowMatching", batch.context, batch.t.shape)
        predicted, target = _first_watched(
            field, partial(self._regressed, field, path, sample, batch, context), sample, context
        )
        value = _mean_square(predicted, target, batch.weight)
        metrics = {"fm": value.detach()}
        if isinstance(field, WithScore):
            assert batch.noise is not None
            noise = field.head(sample.t, sample.xt, context)
            score = _mean_square(noise, batch.noise, batch.weight)
            value, metrics = value + score, {**metrics, "score": score.detach()}
        return Loss(value, metrics)

    def _regressed(
        self, field: VectorField, path: Path, sample: PathSample, batch: Batch, context: Any
    ) -> tuple[Tensor, Any]:
        """What is predicted, and what it should be."""
        t, xt, ut = sample
        if not isinstance(field, Predicts) or "velocity" in (self.weighting, field.target):
            return field(t, xt, context), ut
        predicted = field.field(t, xt, context)
        if field.target == "x1":
            return predicted, batch.x1
        at = path.over(t, xt.dim() - t.dim())
        sigma, noise = at.gaussian().sigma, batch.x0
        if path.noisy:  # of both sources together; not (xt - α x1)/σ, which cancels near t = 1
            noise = (at.sigma * batch.x0 + at.gamma * batch.noise) / sigma  # pyright: ignore
        assert noise is not None
        return (predicted, noise) if field.target == "noise" else (sigma * predicted, -noise)

    def _path(self, field: VectorField) -> Path:
        outermost = (WithScore, Predicts) if self.weighting == "target" else WithScore
        inner = (part for part in wrapped(field) if isinstance(part, outermost))
        if (part := next(inner, field)) is not field:
            kind = type(part).__name__
            raise TypeError(
                f"FlowMatching: expected {kind} to be the outermost field, as in "
                f"{kind}(NullContext(net), …), got it inside {type(field).__name__}"
            )
        own = path_of(field)
        if self.path is None:
            return own or Linear()
        path = PATHS.build(self.path, "FlowMatching")
        if own not in (None, path):
            raise ValueError(
                f"FlowMatching: the field was made for {own}, got path={path}; leave it out"
            )
        return path

    def parameters(self, module: nn.Module) -> Iterator[nn.Parameter]:
        """The field's; the base stays as it is."""
        flow = as_flow("FlowMatching", module)
        return require_continuous("FlowMatching", flow).field.parameters()


@dataclass(frozen=True)
class FittedCoupling:
    """A coupling fitted to a data set, in whose rows base samples find partners."""

    plan: Plan
    rows: Batch

    def partners(self, x0: Tensor, context: Tensor | None) -> Batch:
        """The row that belongs to each x0, of those with its context."""
        assert self.rows.x1 is not None
        j = self.plan(x0, self.rows.x1, context).j
        return self.rows.map(lambda rows: rows[j])


_WATCHED: WeakSet[VectorField] = WeakSet()  # fields that were seen to leave their inputs alone


def _first_watched(
    field: VectorField,
    call: Callable[[], tuple[Tensor, Any]],
    sample: PathSample,
    context: Tensor | None,
) -> tuple[Tensor, Any]:
    """`call()`, which the first time raises where the field edits its inputs in place."""
    if torch.compiler.is_compiling() or field in _WATCHED:
        return call()
    found = unedited(field, call, t=sample.t, x=sample.xt, context=context)
    _WATCHED.add(field)
    return found


def _inside(flow: Flow, batch: Batch, generator: torch.Generator | None) -> Batch:
    """The batch with x1: x as the transform gives it."""
    return batch.but(x1=flow.inside(batch.x, generator)[0])


def _seen(flow: Flow, batch: Batch) -> Tensor | None:
    """The contexts as the field sees them, and so the coupling: distances between them count."""
    if batch.context is None:
        return None
    return flow.inner_context("FlowMatching", batch.context, batch.context.shape[:1])


def _mean_square(predicted: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
    """Mean over the rows of the error's squared length."""
    if weight is None:
        return F.mse_loss(predicted, target, reduction="sum") / len(predicted)
    return weighted_mean((predicted - target).square().flatten(1).sum(1), weight)


def _product(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return a * b
