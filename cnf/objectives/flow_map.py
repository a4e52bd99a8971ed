"""Flow maps: average velocities trained from pairs, for samples in one to four evaluations."""

from abc import abstractmethod
from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor, nn

from cnf.dynamics.divergence import Hutchinson
from cnf.dynamics.preimage import per_row
from cnf.errors import expect_not_negative
from cnf.fields import VectorField
from cnf.fields.base import tangent_products
from cnf.flow import require_field
from cnf.matching.paths import Linear, PathSample
from cnf.objectives.base import OBJECTIVES, Loss, Objective, as_flow, as_prepared
from cnf.objectives.batch import Batch, weighted_mean
from cnf.objectives.matching import FlowMatching, MatchedPairs
from cnf.random import draw

FLOOR = 1e-3  # of the error, in the weights of rows
_PROBES = Hutchinson()


@dataclass
class TimedPairs(MatchedPairs):
    """Pairs, as of flow matching, and the times until which their average velocity is regressed.

    Attributes:
        x0: Base samples, shape (N, *event).
        x1: Data as the transform gives them, inside preprocessing, shape (N, *event).
        t: Times, shape (N,).
        context: Condition as the field takes it, inside preprocessing, shape (N, C).
        weight: Weight of each pair, shape (N,).
        noise: Of a noisy path; None here.
        s: Times on either side of t, or t itself, shape (N,).
        r: Times from t to s, at which the divergence is regressed, shape (N,); None without a
            head.
        probe: Of the divergence there, shape (N, *event); None without a head.
    """

    s: Tensor | None = None
    r: Tensor | None = None
    probe: Tensor | None = None


@dataclass(frozen=True)
class FlowMapObjective(Objective):
    """E w‖u(t, s, xt) - target‖² over pairs (x0, x1) and times t and s in [0, 1], in any order.

    Points xt are on the straight paths between the pairs. Where s = t the target is the velocity
    of the pair, as in flow matching. Elsewhere it is made of the map itself, without its gradient:
    how, the subclasses say.

    The head of a map that has one is regressed on ∇·v(r, x_r) at times r that are uniform between
    t and s, whose mean is the average divergence (both are divided by the number of entries). Two
    midpoint steps of the velocity lead to x_r, the divergence is Hutchinson's estimate by one
    probe, and neither has a gradient. Ai et al. (2026), https://arxiv.org/abs/2512.02636, whose
    head this is, distil it from itself, as their map.

    Metrics: "fm", the squared error where s = t; "map", that of all rows; "divergence_error", the
    squared error of the head, for each entry.

    Args:
        coupling: As of `FlowMatching`.
        instant: Part of the rows where s = t, in (0, 1).
        power: Rows have the weight 1 / (error + 0.001)^power, held constant, so that large errors
            count less; 0 for none.

    Raises:
        ValueError: A number is out of its range, or the coupling is not known.
    """

    needs_data = True
    capturable = True
    scores_density = False  # steps of a map that still learns fold, so that rows have none
    lr = 6e-3
    clip = 1.0

    coupling: Any = "independent"
    instant: float = 0.5
    power: float = 0.0
    _matching: ClassVar[FlowMatching]

    def __post_init__(self) -> None:
        who = type(self).__name__
        if not 0 < self.instant < 1:
            raise ValueError(f"{who}: expected 0 < instant < 1, got {self.instant}")
        expect_not_negative(who, power=self.power)
        object.__setattr__(self, "_matching", FlowMatching(coupling=self.coupling))

    @property
    def rowwise(self) -> bool:
        """As flow matching with the same coupling."""
        return self._matching.rowwise

    def begin(
        self, module: nn.Module, rows: Callable[[int], Batch | None], generator: Generator
    ) -> "FlowMapObjective":
        """This objective, its coupling fitted to the data if it is one that can be."""
        self._field(module).until(1.0)
        begun = copy(self)
        object.__setattr__(begun, "_matching", self._matching.fitted(module, rows, generator))
        return begun

    def prepare(
        self, module: nn.Module, batch: Batch, generator: Generator | None = None
    ) -> TimedPairs:
        pairs = self._matching.prepare(module, batch, generator)
        t = pairs.t
        s, instant = (draw(torch.rand, t.shape, generator, like=t) for _ in range(2))
        rows = TimedPairs(**vars(pairs), s=torch.where(instant < self.instant, t, s))
        if not self._field(module).learns_divergence:
            return rows
        assert rows.s is not None
        r = t + (rows.s - t) * draw(torch.rand, t.shape, generator, like=t)
        return rows.but(r=r, probe=_PROBES.draw(pairs.x1, generator)[0])

    def __call__(
        self, module: nn.Module, batch: Batch | TimedPairs, generator: Generator | None = None
    ) -> Loss:
        rows = as_prepared(self, module, batch, generator)
        errors = self._errors(module, rows)
        value = weighted_mean(self._weighted(errors), rows.weight)
        assert rows.s is not None
        instant = (rows.s == rows.t).to(value)
        weight = instant if rows.weight is None else instant * rows.weight
        own = {name: weighted_mean(each.detach(), rows.weight) for name, each in errors.items()}
        return Loss(value, {"fm": weighted_mean(errors["map"].detach(), weight), **own})

    def per_row(
        self, module: nn.Module, batch: Batch | TimedPairs, generator: Generator | None = None
    ) -> Tensor:
        return self._weighted(self._errors(module, as_prepared(self, module, batch, generator)))

    def _weighted(self, errors: dict[str, Tensor]) -> Tensor:
        """The loss of each row, shape (N,)."""
        terms = [each * (each.detach() + FLOOR) ** -self.power for each in errors.values()]
        return torch.stack(terms).sum(0)

    def _errors(self, module: nn.Module, rows: TimedPairs) -> dict[str, Tensor]:
        """The squared error of each row, of the map and of its head, if there is one: (N,)."""
        assert rows.s is not None
        field = self._field(module)
        sample = Linear().sample(rows.x0, rows.x1, rows.t)
        with torch.no_grad():
            target = self._target(field, sample, rows.s, rows.context)
        until = field.until(rows.s)
        found = until(sample.t, sample.xt, rows.context)
        errors = {"map": (found - target).square().flatten(1).sum(1)}
        if rows.probe is None:
            return errors
        context = None if rows.context is None else rows.context.detach()
        with torch.no_grad():
            divergence = _divergence(field, sample, rows)
        found = until.average_divergence(sample.t, sample.xt, context)
        size = sample.xt[0].numel()  # of its mean entry: a sum's would rule the clipped gradient
        return {**errors, "divergence_error": ((found - divergence) / size).square()}

    @abstractmethod
    def _target(
        self, field: VectorField, sample: PathSample, s: Tensor, context: Tensor | None
    ) -> Tensor:
        """What u(t, s, xt) is regressed on, of xt's shape."""

    def _field(self, module: nn.Module) -> VectorField:
        who = type(self).__name__
        return require_field(who, as_flow(who, module), "train it with MaximumLikelihood()").field

    def parameters(self, module: nn.Module) -> Iterator[nn.Parameter]:
        """The field's parameters; the base stays as it is."""
        return self._field(module).parameters()


def _divergence(field: VectorField, sample: PathSample, rows: TimedPairs) -> Tensor:
    """The estimate of ∇·v(r, x_r) by the rows' probe, shape (N,).

    The map itself would lead there in one step; while it learns, that is too far from the path.
    """
    assert rows.r is not None and rows.probe is not None
    t, x, _ = sample
    half = 0.25 * (rows.r - t)  # of each of two steps
    for _ in range(2):
        middle = x + per_row(half, x) * field(t, x, rows.context)
        x = x + per_row(2 * half, x) * field(t + half, middle, rows.context)
        t = t + 2 * half
    _, products = tangent_products(field, rows.r, x, rows.context, rows.probe[None])
    return (products[0] * rows.probe).flatten(1).sum(1)


@OBJECTIVES.register("mean-flow")
@dataclass(frozen=True)
class MeanFlow(FlowMapObjective):
    r"""Average velocities by their derivative along the path: :math:`u = v + (s - t)\,du/dt`.

    The derivative is one product in forward mode.
    Source: Geng et al. (2025), Mean Flows, https://arxiv.org/abs/2505.13447.

    Args:
        coupling: As of `FlowMatching`.
        instant: Part of the rows where s = t, in (0, 1).
        power: Rows have the weight 1 / (error + 0.001)^power, held constant; 0 for none.

    Raises:
        ValueError: A number is out of its range, or the coupling is not known.
    """

    def _target(
        self, field: VectorField, sample: PathSample, s: Tensor, context: Tensor | None
    ) -> Tensor:
        t, xt, ut = sample
        until = field.until(s)
        slope = torch.func.jvp(
            lambda t, x: until(t, x, context), (t, xt), (torch.ones_like(t), ut)
        )[1]
        return ut + per_row(s - t, xt) * slope


@OBJECTIVES.register("shortcut")
@dataclass(frozen=True)
class Shortcut(FlowMapObjective):
    """Average velocities by those of two halves: a step is as far as two of half its length.

    Source: Frans et al. (2025), https://arxiv.org/abs/2410.12557; the semigroup property of flow
    maps, Boffi et al. (2025), https://arxiv.org/abs/2505.18825.

    Args:
        coupling: As of `FlowMatching`.
        instant: Part of the rows where s = t, in (0, 1).
        power: Rows have the weight 1 / (error + 0.001)^power, held constant; 0 for none.

    Raises:
        ValueError: A number is out of its range, or the coupling is not known.
    """

    def _target(
        self, field: VectorField, sample: PathSample, s: Tensor, context: Tensor | None
    ) -> Tensor:
        t, xt, ut = sample
        middle = 0.5 * (t + s)
        first = field.until(middle)(t, xt, context)
        between = xt + per_row(middle - t, xt) * first
        second = field.until(s)(middle, between, context)
        return torch.where(per_row(s == t, xt), ut, 0.5 * (first + second))


@OBJECTIVES.register("self-distillation")
@dataclass(frozen=True)
class SelfDistillation(FlowMapObjective):
    r"""Average velocities by where they lead: the end of a step moves with the velocity there.

    For the end x_s = x_t + (s - t) u that is :math:`u = v(s, x_s) - (s - t)\,du/ds`. The
    derivative is one product in forward mode. As the target does not vary with the pair, it
    learns in fewer steps than `MeanFlow`.
    Source: Boffi et al. (2024), https://arxiv.org/abs/2406.07507, the Lagrangian loss; Boffi et
    al. (2025), https://arxiv.org/abs/2505.18825.

    Args:
        coupling: As of `FlowMatching`.
        instant: Part of the rows where s = t, in (0, 1).
        power: Rows have the weight 1 / (error + 0.001)^power, held constant; 0 for none.

    Raises:
        ValueError: A number is out of its range, or the coupling is not known.
    """

    def _target(
        self, field: VectorField, sample: PathSample, s: Tensor, context: Tensor | None
    ) -> Tensor:
        t, xt, ut = sample
        average, slope, *_ = torch.func.jvp(
            lambda s: field.until(s)(t, xt, context), (s,), (torch.ones_like(s),)
        )
        length = per_row(s - t, xt)
        velocity = field(s, xt + length * average, context)
        return torch.where(length == 0, ut, velocity - length * slope)
