"""Maximum likelihood, with the penalties that keep a continuous flow easy to solve."""

from collections.abc import Callable, Iterator, Mapping
from copy import copy
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from cnf.dynamics.divergence import DIVERGENCES, Divergence
from cnf.dynamics.regularizers import REGULARIZERS
from cnf.dynamics.solver import Solver
from cnf.errors import expect_positive, warn
from cnf.flow import Flow, require_field
from cnf.objectives.base import OBJECTIVES, Loss, Objective, as_flow, expect_rows
from cnf.objectives.batch import Batch, RowTensors, weighted_mean
from cnf.random import draw
from cnf.transforms.base import transforms_in
from cnf.transforms.continuous import Continuous, Recipe


@dataclass
class LikelihoodRows(RowTensors):
    """Rows whose log-density is computed, and what that needs at random.

    Attributes:
        x: Data, shape (N, *event).
        context: Condition, shape (N, C).
        weight: Weight of each row, shape (N,).
        probe: Hutchinson probes, shape (N, probes, *event).
        stop: Time at which the solve towards the base ends, the same in each row, shape (N,).
    """

    x: Tensor
    context: Tensor | None = None
    weight: Tensor | None = None
    probe: Tensor | None = None
    stop: Tensor | None = None


class _Likelihood(NamedTuple):
    """What a flow's likelihood is computed with."""

    flow: Flow  # under the solver of the loss
    divergence: Divergence
    penalties: Mapping[str, float]


@OBJECTIVES.register("maximum-likelihood")
@dataclass(frozen=True)
class MaximumLikelihood(Objective):
    """Mean negative log-likelihood in nats, plus penalties along a continuous flow's paths.

    What is None is as the flow's own `Recipe` says: `ffjord` trains with one Hutchinson probe,
    `rnode` and `otflow` with their penalties.

    Args:
        divergence: "exact", or an estimator such as "hutchinson" or `Hutchinson(probes=2)`.
        penalties: Weights of regularizers by name, such as {"kinetic": 0.01}; continuous flows
            only.
        solver: A solver for training only, such as a few fixed steps.
        steer: Each step's solve ends at a random time in [0, steer], not at 0, so that the field
            cannot lean on one end time. Source: Ghosh et al. (2020), STEER,
            https://arxiv.org/abs/2006.10711.

    Raises:
        ValueError: A name is not known, a penalty is not above 0, or steer is not in [0, 1).
    """

    needs_data = True
    solves = True

    divergence: Any = None
    penalties: Mapping[str, float] | None = None
    solver: Solver | Mapping[str, Any] | str | None = None
    steer: float = 0.0

    def __post_init__(self) -> None:
        if self.divergence is not None:
            divergence = DIVERGENCES.build(self.divergence, "MaximumLikelihood")
            if isinstance(self.divergence, Mapping):  # from a config file
                object.__setattr__(self, "divergence", divergence)
        if self.solver is not None:
            object.__setattr__(self, "solver", Solver.of(self.solver))
        for name, weight in (self.penalties or {}).items():
            _ = REGULARIZERS[name]
            expect_positive("MaximumLikelihood", **{name: weight})
        if not 0 <= self.steer < 1:
            raise ValueError(f"MaximumLikelihood: expected 0 <= steer < 1, got {self.steer}")

    def begin(
        self, module: nn.Module, rows: Callable[[int], Batch | None], generator: Generator
    ) -> "MaximumLikelihood":
        flow = as_flow("MaximumLikelihood", module)
        if unfit := list(_not_functions(flow)):
            warn(
                f"fit: likelihood solves an ODE whose field must be one function of (t, x) row by "
                f"row, and it holds {'; '.join(unfit)}: the log-densities that it trains are "
                "wrong; take these out, or train by FlowMatching()"
            )
        begun = copy(self)
        object.__setattr__(begun, "_begun", (flow, self._resolve(flow)))
        return begun

    def _resolve(self, module: nn.Module) -> _Likelihood:
        """Found once by `begin`, and anew for any other flow."""
        begun = vars(self).get("_begun", (None, None))
        if begun[0] is module:
            return begun[1]
        flow = as_flow("MaximumLikelihood", module)
        recipe = _recipe(flow)
        penalties = recipe.penalties if self.penalties is None else self.penalties
        if penalties or self.steer:
            require_field("MaximumLikelihood(penalties=…, steer=…)", flow)
        divergence = DIVERGENCES.build(self.divergence or recipe.divergence)
        return _Likelihood(self.as_trained(flow), divergence, penalties)

    def prepare(
        self, module: nn.Module, batch: Batch, generator: Generator | None = None
    ) -> LikelihoodRows:
        flow, divergence, _ = self._resolve(module)
        expect_rows("MaximumLikelihood", flow, batch.x)
        probe, stop = divergence.draw(batch.x.to(flow.dtype), generator), None
        if self.steer:
            stop = self.steer * draw(torch.rand, (), generator, like=batch.x)
            stop = stop.expand(len(batch.x))
        probe = None if probe is None else probe.movedim(0, 1)
        return LikelihoodRows(batch.x, batch.context, batch.weight, probe, stop)

    def __call__(
        self, module: nn.Module, batch: Batch | LikelihoodRows, generator: Generator | None = None
    ) -> Loss:
        if isinstance(batch, Batch):
            batch = self.prepare(module, batch, generator)
        log_prob, integrals = self._scores(module, batch, generator)
        nll = weighted_mean(-log_prob, batch.weight)
        costs = {name: weighted_mean(value, batch.weight) for name, value in integrals.items()}
        value, penalties = nll, self._resolve(module).penalties
        if penalties:
            value = nll + sum(weight * costs[name] for name, weight in penalties.items())
        logged = {name: cost.detach() for name, cost in costs.items()}
        return Loss(value, {"nll": nll.detach(), **logged})

    def per_row(
        self, module: nn.Module, batch: Batch | LikelihoodRows, generator: Generator | None = None
    ) -> Tensor:
        if isinstance(batch, Batch):
            batch = self.prepare(module, batch, generator)
        log_prob, integrals = self._scores(module, batch, generator)
        penalties = self._resolve(module).penalties
        return -log_prob + sum(weight * integrals[name] for name, weight in penalties.items())

    def _scores(
        self, module: nn.Module, rows: LikelihoodRows, generator: Generator | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Log-density and each penalty's integral, shape (N,)."""
        flow, divergence, penalties = self._resolve(module)
        if rows.probe is not None:
            divergence = replace(divergence, probe=rows.probe.movedim(1, 0))  # pyright: ignore
        if not penalties and rows.stop is None:
            log_prob = flow.log_prob(
                rows.x, rows.context, divergence=divergence, generator=generator
            )
            return log_prob, {}
        log_prob, solved = flow.log_prob_and_integral(
            rows.x, rows.context, divergence=divergence, generator=generator,
            integrands=[REGULARIZERS[name] for name in penalties],
            stop=None if rows.stop is None else rows.stop[0].item(),
        )  # fmt: skip
        return log_prob, dict(zip(penalties, solved.integrals, strict=True))

    def as_trained(self, flow: Flow) -> Flow:
        solver = _recipe(flow).solver if self.solver is None else Solver.of(self.solver)
        return flow if solver is None else flow.with_solver(solver)

    def learning_rate(self, module: nn.Module) -> float:
        """The learning rate of the model's recipe, or this objective's."""
        return _recipe(as_flow("MaximumLikelihood", module)).lr or self.lr


def _recipe(flow: Flow) -> Recipe:
    """The recipe of the flow's continuous parts, which must share one."""
    parts = transforms_in(flow.transform)
    first, *others = [p.recipe for p in parts if isinstance(p, Continuous)] or [Recipe()]
    if any(other != first for other in others):
        raise ValueError(
            "MaximumLikelihood: expected the continuous parts of a flow to share a recipe, got "
            f"{first} and others; build each with the same recipe=…"
        )
    return first


def _not_functions(flow: Flow) -> Iterator[str]:
    """Describe each part of a continuous flow's fields that is no function of one row.

    Dropout draws anew at each evaluation; batch normalization mixes the rows of a batch.
    """
    fields = {
        f"{name}.field": part.field
        for name, part in flow.named_modules()
        if isinstance(part, Continuous)
    }
    for where, field in fields.items():
        for name, part in field.named_modules(prefix=where):
            kind = type(part).__name__
            drops = part.dropout if isinstance(part, nn.MultiheadAttention) else 0.0
            drops = part.p if isinstance(part, _DropoutNd) else drops
            if part.training and drops > 0:
                yield f"{name}, a {kind} with p={drops:g}, which differs between evaluations"
            if isinstance(part, _BatchNorm) and (part.training or part.running_mean is None):
                yield f"{name}, a {kind}, which mixes the rows of a batch (LayerNorm does not)"
