"""Flow matching: a regression of the velocity, no ODE solved."""

from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from inspect import signature
from typing import Any, ClassVar, NamedTuple
from weakref import WeakSet

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from cnf.errors import call_without_edits, expect_choice, warn
from cnf.fields import FlowMap, VectorField
from cnf.fields.predicts import Predicts, WithScore, path_of
from cnf.fields.wrappers import wrapped
from cnf.flow import Flow, require_field
from cnf.matching.couplings import (
    COUPLINGS,
    UNCONDITIONAL,
    Pairing,
    context_ignored,
    independent,
)
from cnf.matching.paths import PATHS, Linear, Path, PathSample, check_path
from cnf.matching.semidiscrete import Plan
from cnf.matching.times import TIMES
from cnf.objectives.base import OBJECTIVES, Loss, Objective, as_flow, as_prepared, expect_rows
from cnf.objectives.batch import Batch, RowTensors, resampled, weighted_mean
from cnf.random import draw, stream

FEW = 64  # rows that a path is asked about


@dataclass
class MatchedPairs(RowTensors):
    """Pairs of base samples and data, and where on their paths the field is regressed.

    Attributes:
        x0: Base samples, shape (N, *event).
        x1: Data as the transform gives them, inside preprocessing, shape (N, *event).
        t: Times, shape (N,).
        context: Condition as the field takes it, inside preprocessing, shape (N, C).
        weight: Weight of each pair, shape (N,).
        noise: Of a noisy path, shape (N, *event).
    """

    x0: Tensor
    x1: Tensor
    t: Tensor
    context: Tensor | None = None
    weight: Tensor | None = None
    noise: Tensor | None = None


class _Regression(NamedTuple):
    """What a flow's field is regressed with."""

    flow: Flow
    field: VectorField
    path: Path


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

    Raises:
        ValueError: A name is not known, or context_dropout is not in [0, 1).
    """

    needs_data = True
    capturable = True
    lr = 6e-3

    path: Any = None
    coupling: Any = "independent"
    times: Any = "uniform"
    weighting: str = "target"
    context_dropout: float = 0.0
    _built: ClassVar[tuple[Any, Any]]  # coupling, law of t

    def __post_init__(self) -> None:
        # Made once: a step of small nets is short. No field: the settings stay what was given.
        fitted = isinstance(self.coupling, FittedCoupling)
        coupling = self.coupling if fitted else COUPLINGS.build(self.coupling, "FlowMatching")
        _expect_coupling(coupling)
        object.__setattr__(self, "_built", (coupling, TIMES.build(self.times, "FlowMatching")))
        if self.path is not None:
            path = PATHS.build(self.path, "FlowMatching")
            if not isinstance(self.path, str):
                object.__setattr__(self, "path", path)
        expect_choice("FlowMatching", "weighting", self.weighting, ("target", "velocity"))
        if not 0 <= self.context_dropout < 1:
            raise ValueError(
                f"FlowMatching: expected 0 <= context_dropout < 1, got {self.context_dropout}"
            )

    @property
    def rowwise(self) -> bool:
        """Not where a coupling pairs rows of the batch, or draws them by their weights."""
        coupling = self._built[0]
        if isinstance(coupling, FittedCoupling):
            return not coupling.weighted
        return _is_independent(coupling)

    def begin(
        self, module: nn.Module, rows: Callable[[int], Batch | None], generator: Generator
    ) -> "FlowMatching":
        """This objective, its coupling fitted to the data if it is one that can be."""
        field = self._resolve(module).field
        if any(isinstance(part, FlowMap) for part in wrapped(field)):
            warn(
                "fit: flow matching trains a flow map's velocity at one time, and neither its "
                "steps nor its head: sample with Solver('dopri5'), or train it by "
                "SelfDistillation()"
            )
        return self.fitted(module, rows, generator)

    def fitted(
        self, module: nn.Module, rows: Callable[[int], Batch | None], generator: Generator
    ) -> "FlowMatching":
        """As `begin`, for whatever trains on the same pairs.

        Args:
            module: As of `begin`.
            rows: As of `begin`.
            generator: As of `begin`.
        """
        flow, coupling, begun = as_flow("FlowMatching", module), self._built[0], copy(self)
        data = rows(coupling.rows) if hasattr(coupling, "fit") else None
        if data is not None and data.x0 is None:
            total = getattr(rows, "total", None)
            if total is not None and len(data.x) < total:
                warn(
                    f"fit: the coupling pairs with {len(data.x)} of the {total} rows, and trains "
                    'on these only; give it more: {"name": …, "rows": …}'
                )
            with torch.no_grad():
                data = resampled(data, generator)
                x1 = flow.inside(data.x, generator)[0]
                context = flow.inner_context("FlowMatching", data.context, x1.shape[:1])
                plan = coupling.fit(x1, lambda n, g: flow.base.sample((n,), g), context, generator)
            fitted = FittedCoupling(plan, data.x, x1, context, data.weight is not None)
            begun = replace(self, coupling=fitted)
        resolved = self._resolve(flow)
        check_path(resolved.path, flow.device)
        self._expect_ends(resolved, rows)
        object.__setattr__(begun, "_begun", resolved)
        return begun

    def _expect_ends(self, found: _Regression, rows: Callable[[int], Batch | None]) -> None:
        """Raise ValueError where the path cannot lead from the base to the data, on its field."""
        if found.path.affine:
            return
        who, flow = "FlowMatching", found.flow
        found.path.expect_end(
            who, "base samples", flow.base.sample((FEW,), stream(0, "ends of a path"))
        )
        data = rows(FEW)
        if data is not None:
            found.path.expect_end(who, "data", flow.inside(data.x)[0])
        if path_of(found.field) is None:  # it would leave the sphere, or not be periodic
            raise ValueError(
                f"{who}: expected a field that is made for {found.path}, got {found.field}; build "
                "the flow by cnf.models.sphere() or cnf.models.torus(), or take another path"
            )

    def _resolve(self, module: nn.Module) -> _Regression:
        """Found once by `begin`, and anew for any other flow."""
        begun = vars(self).get("_begun")
        if begun is not None and begun.flow is module:
            return begun
        flow = as_flow("FlowMatching", module)
        field = require_field("FlowMatching", flow, _INSTEAD).field
        return _Regression(flow, field, self._path(field))

    def prepare(
        self, module: nn.Module, batch: Batch, generator: Generator | None = None
    ) -> MatchedPairs:
        """Pairs, times, the path's noise, and whose context is left out.

        Args:
            module: A flow with a vector field.
            batch: Data; with x0, the pairs are given.
            generator: Source of draws.

        Raises:
            ValueError: x, x0 or the context is not what the flow takes.
        """
        flow, field, path = self._resolve(module)
        expect_rows("FlowMatching", flow, batch.x)
        x0, x1, context, weight = self._paired(flow, batch, generator)
        with torch.no_grad():
            t = self._built[1](draw(torch.rand, x1.shape[:1], generator, like=x1))
            noise = draw(torch.randn, x1.shape, generator, like=x1) if path.noisy else None
        if self.context_dropout:
            if context is None or not field.optional_context:
                raise ValueError(
                    "FlowMatching: context_dropout needs a model built with null_context=True, "
                    "and data with a context"
                )
            dropped = draw(torch.rand, x1.shape[:1], generator, like=x1)
            dropped = (dropped < self.context_dropout).to(x1.device)
            context = context.masked_fill(dropped[:, None], torch.nan)
        return MatchedPairs(x0, x1, t, context, weight, noise)

    def _paired(
        self, flow: Flow, batch: Batch, generator: Generator | None
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """x0, x1, the context as the field takes it, and the weight of each pair.

        The context keeps its gradient, as it may come from a net that is trained.
        """
        coupling = self._built[0]
        pairs = batch.x0 is None and not _is_independent(coupling)
        if pairs:
            # Weights of pairs would weigh the base too: it would no longer be what is sampled.
            batch = resampled(batch, generator)
        rows = batch.x.shape[:1]
        context = flow.inner_context("FlowMatching", batch.context, rows)
        if pairs and isinstance(coupling, FittedCoupling):
            with torch.no_grad():
                x0 = flow.base.sample(rows, generator)
                return x0, *coupling.partners(flow, x0, context, generator), batch.weight
        with torch.no_grad():
            x1 = flow.inside(batch.x, generator)[0]
            x0 = flow.base.sample(rows, generator) if batch.x0 is None else batch.x0
        if x0.shape != x1.shape:
            shapes = f"{tuple(x1.shape)}, got {tuple(x0.shape)}"
            raise ValueError(f"FlowMatching: expected x0 of x1's shape {shapes}")
        if not pairs:
            return x0, x1, context, batch.weight
        with torch.no_grad():
            i, j, weight = self._pairing(flow, x0, x1, context, generator)
        x0 = x0 if i is None else x0[i]
        if j is not None:  # what belongs to a data point follows it
            x1, context = x1[j], None if context is None else context[j]
            batch = batch.but(weight=None if batch.weight is None else batch.weight[j])
        return x0, x1, context, _product(batch.weight, weight)

    def _pairing(
        self,
        flow: Flow,
        x0: Tensor,
        x1: Tensor,
        context: Tensor | None,
        generator: Generator | None,
    ) -> Pairing:
        coupling = self._built[0]
        if context is not None and getattr(coupling, "func", coupling) in UNCONDITIONAL:
            flow.warn_once("coupling", context_ignored(COUPLINGS.name_of(coupling) or "coupling"))
            context = None
        pairing = coupling(x0, x1, context, generator)
        if not isinstance(pairing, Pairing):
            raise TypeError(
                f"FlowMatching: expected the coupling {_name(coupling)} to return a "
                f"cnf.matching.Pairing(i, j, weight), got a {type(pairing).__name__}"
            )
        return pairing

    def __call__(
        self, module: nn.Module, batch: Batch | MatchedPairs, generator: Generator | None = None
    ) -> Loss:
        batch = as_prepared(self, module, batch, generator)
        found = self._regressed(module, batch)
        value = _mean_square(*found[0], batch.weight)
        metrics = {"fm": value.detach()}
        if len(found) > 1:
            score = _mean_square(*found[1], batch.weight)
            value, metrics = value + score, {**metrics, "score": score.detach()}
        return Loss(value, metrics)

    def per_row(
        self, module: nn.Module, batch: Batch | MatchedPairs, generator: Generator | None = None
    ) -> Tensor:
        batch = as_prepared(self, module, batch, generator)
        return torch.stack([_squares(*both) for both in self._regressed(module, batch)]).sum(0)

    def _regressed(self, module: nn.Module, pairs: MatchedPairs) -> list[tuple[Tensor, Tensor]]:
        """Predictions and their targets: of the velocity, and of a score head's noise."""
        _, field, path = self._resolve(module)
        sample = path.sample(pairs.x0, pairs.x1, pairs.t, pairs.noise)
        call = partial(self._predicted, field, path, sample, pairs)
        if torch.compiler.is_compiling() or field in _WATCHED:
            found = [call()]
        else:
            found = [
                call_without_edits(field, call, t=sample.t, x=sample.xt, context=pairs.context)
            ]
            _WATCHED.add(field)
        if isinstance(field, WithScore):
            assert pairs.noise is not None
            found.append((field.head(sample.t, sample.xt, pairs.context), pairs.noise))
        return found

    def _predicted(
        self, field: VectorField, path: Path, sample: PathSample, pairs: MatchedPairs
    ) -> tuple[Tensor, Tensor]:
        """The velocity, or what the field predicts in its place, and its target."""
        t, xt, ut = sample
        if not isinstance(field, Predicts) or "velocity" in (self.weighting, field.target):
            return field(t, xt, pairs.context), ut
        predicted = field.field(t, xt, pairs.context)
        if field.target == "x1":
            return predicted, pairs.x1
        at = path.over(t, xt.dim() - t.dim())
        sigma, noise = at.gaussian().sigma, pairs.x0
        if path.noisy:  # of both sources together; not (xt - α x1)/σ, which cancels near t = 1
            noise = (at.sigma * pairs.x0 + at.gamma * pairs.noise) / sigma  # pyright: ignore
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
        """The field's parameters; the base stays as it is."""
        flow = as_flow("FlowMatching", module)
        return require_field("FlowMatching", flow, _INSTEAD).field.parameters()


@dataclass(frozen=True)
class FittedCoupling:
    """A coupling fitted to a data set, in whose rows base samples find partners."""

    plan: Plan
    x: Tensor
    x1: Tensor  # inside preprocessing
    context: Tensor | None
    weighted: bool  # whether the data have weights, by which the rows of a batch are drawn

    def partners(
        self, flow: Flow, x0: Tensor, context: Tensor | None, generator: Generator | None
    ) -> tuple[Tensor, Tensor | None]:
        """The x1 that belongs to each x0, of those with its context, and that context."""
        j = self.plan(x0, self.x1, context, generator).j
        dequantized = flow.dequantization is not None  # anew each time
        x1 = flow.inside(self.x[j], generator)[0] if dequantized else self.x1[j]
        return x1, None if self.context is None else self.context[j]


def _expect_coupling(coupling: Any) -> None:
    """Raise TypeError unless it can be called as a coupling is."""
    if isinstance(coupling, FittedCoupling) or hasattr(coupling, "fit"):
        return
    try:
        signature(coupling).bind(None, None, None, None)
    except TypeError:
        raise TypeError(
            f"FlowMatching: expected a coupling that takes (x0, x1, context, generator), got "
            f"{_name(coupling)}{signature(coupling)}"
        ) from None
    except ValueError:  # some callables have no signature
        return


def _is_independent(coupling: Any) -> bool:
    return getattr(coupling, "func", coupling) is independent


def _name(function: Any) -> str:
    return getattr(function, "__name__", type(function).__name__)


_WATCHED: WeakSet[VectorField] = WeakSet()  # fields that were seen to leave their inputs alone
_INSTEAD = (
    "train this flow with MaximumLikelihood(), or, if it has several ODEs, MultiscaleMatching()"
)


def _squares(predicted: Tensor, target: Tensor) -> Tensor:
    return (predicted - target).square().flatten(1).sum(1)


def _mean_square(predicted: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
    """Mean over the rows of the error's squared length."""
    if weight is None:
        return F.mse_loss(predicted, target, reduction="sum") / len(predicted)
    return weighted_mean(_squares(predicted, target), weight)


def _product(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return a * b
