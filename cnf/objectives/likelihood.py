"""Maximum likelihood, with the penalties that keep a continuous flow easy to solve."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from cnf.dynamics import numerical
from cnf.dynamics.divergence import DIVERGENCES, Divergence, Learned, number_of_probes
from cnf.dynamics.regularizers import REGULARIZERS
from cnf.dynamics.solver import Solver
from cnf.errors import expect_positive, warn
from cnf.flow import Flow, require_odes
from cnf.objectives.barrier import WEIGHT, barrier, discrete_in
from cnf.objectives.base import OBJECTIVES, Loss, Objective, as_flow, as_prepared, expect_rows
from cnf.objectives.batch import Batch, RowTensors, weighted_mean
from cnf.random import draw
from cnf.transforms.continuous import Continuous, Solve, odes_in, under_recipes

DISCRETE_LR, DISCRETE_CLIP = 5e-3, 1.0  # where a solver's steps are the model


@dataclass
class LikelihoodRows(RowTensors):
    """Rows whose log-density is computed, and what that needs at random.

    Attributes:
        x: Data, shape (N, *event).
        context: Condition, shape (N, C).
        weight: Weight of each row, shape (N,).
        probe: Hutchinson probes of each ODE after the other, shape (N, probes, *event). An ODE of
            part of the variables takes the first entries.
        stop: How far from its end each ODE's solve stops, the same in each row, shape (N,), or
            (N, ODEs) where there are several.
        around: Standard normal numbers, from which the points follow at which a barrier holds the
            steps of discrete solvers one to one, shape (N, 2, *event).
    """

    x: Tensor
    context: Tensor | None = None
    weight: Tensor | None = None
    probe: Tensor | None = None
    stop: Tensor | None = None
    around: Tensor | None = None


class _Likelihood(NamedTuple):
    """What a flow's likelihood is computed with.

    Attributes:
        flow: The flow under the solvers of the loss.
        divergences: That of each ODE; of a flow without any, one for its `log_prob`.
        penalties: Weights by name, of each ODE.
    """

    flow: Flow
    divergences: tuple[Divergence, ...]
    penalties: tuple[Mapping[str, float], ...]


@OBJECTIVES.register("maximum-likelihood")
@dataclass(frozen=True)
class MaximumLikelihood(Objective):
    """Mean negative log-likelihood in nats, plus penalties along a continuous flow's paths.

    What is None is as the flow's own `Recipe` says: `ffjord` trains with one Hutchinson probe,
    `rnode` and `otflow` with their penalties. In a flow of several ODEs, such as a multi-scale
    one, each follows its own recipe and has its own probes and end time; penalties are summed.

    Under a solver with discrete=True the likelihood is that of the steps. A barrier then holds
    each step one to one around the data and beyond ("barrier" among the metrics), and rows without
    a density are left out and counted ("folded", their share). `fit` gives the flow such a solver
    for good, as the weights are made for its steps.

    Args:
        divergence: "exact", or an estimator such as "hutchinson" or `Hutchinson(probes=2)`.
        penalties: Weights of regularizers by name, such as {"kinetic": 0.01}; continuous flows
            only.
        solver: A solver for training only, such as a few fixed steps.
        steer: Each step's solve ends at a random time in [0, steer], not at 0, so that the field
            cannot lean on one end time. Source: Ghosh et al. (2020), STEER,
            https://arxiv.org/abs/2006.10711.

    Raises:
        ValueError: A name is not known, a penalty is not above 0, or steer is not in [0, 1);
            in training, the divergence is learned.
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

    @property
    def rowwise(self) -> bool:
        """Not with STEER: all rows of a batch have one end time."""
        return not self.steer

    @property
    def capturable(self) -> bool:
        """Not with STEER: the end time, which the host reads, determines the number of steps."""
        return not self.steer

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
        if any(ode.field.learns_divergence for ode in odes_in(flow.transform)):
            warn(
                "fit: likelihood trains the flow map and not its divergence head, which will no "
                "longer fit: log_prob(x, divergence='learned') then scores the map as it was"
            )
        return begun

    def _resolve(self, module: nn.Module) -> _Likelihood:
        """Found once by `begin`, and anew for any other flow."""
        begun = vars(self).get("_begun", (None, None))
        if begun[0] is module:
            return begun[1]
        flow = as_flow("MaximumLikelihood", module)
        recipes = [ode.recipe for ode in odes_in(flow.transform)]
        penalties = [r.penalties if self.penalties is None else self.penalties for r in recipes]
        if self.penalties or self.steer:
            require_odes("MaximumLikelihood(penalties=…, steer=…)", flow)
        trained = self.as_trained(flow)
        if discrete_in(trained):
            self._expect_whole_and_exact()
        divergences = [
            self.divergence or ("exact" if ode.solver.discrete else recipe.divergence)
            for ode, recipe in zip(odes_in(trained.transform), recipes, strict=True)
        ] or ["exact"]
        built = tuple(DIVERGENCES.build(each) for each in divergences)
        if any(isinstance(each, Learned) for each in built):
            raise ValueError(
                "MaximumLikelihood: expected an exact or unbiased divergence, got 'learned', "
                "which would raise what its head claims and not the density; train the head "
                "by SelfDistillation()"
            )
        return _Likelihood(trained, built, tuple(penalties))

    def _expect_whole_and_exact(self) -> None:
        """Raise unless steps that are the model can be trained with these settings."""
        if self.steer:
            raise ValueError(
                "MaximumLikelihood: expected steer=0 where a solver's steps are the model, whose "
                f"ends are fixed, got steer={self.steer}"
            )
        divergence = DIVERGENCES.build(self.divergence or "exact")
        if number_of_probes(divergence):
            raise ValueError(
                "MaximumLikelihood: expected divergence='exact' where a solver's steps are the "
                f"model, got {type(divergence).__name__}"
            )

    def prepare(
        self, module: nn.Module, batch: Batch, generator: Generator | None = None
    ) -> LikelihoodRows:
        flow, divergences, penalties = self._resolve(module)
        expect_rows("MaximumLikelihood", flow, batch.x)
        drawn = [each.draw(batch.x.to(flow.dtype), generator) for each in divergences]
        probes, stop = [probe for probe in drawn if probe is not None], None
        if self.steer:
            shape = (len(penalties),) if len(penalties) > 1 else ()
            stop = self.steer * draw(torch.rand, shape, generator, like=batch.x)
            stop = stop.expand(len(batch.x), *shape)
        probe = torch.cat(probes).movedim(0, 1) if probes else None
        around = None
        if discrete_in(flow):
            like = batch.x.new_empty(0, dtype=flow.dtype)  # data may be wider
            around = draw(torch.randn, (len(batch.x), 2, *flow.event_shape), generator, like=like)
        return LikelihoodRows(batch.x, batch.context, batch.weight, probe, stop, around)

    def __call__(
        self, module: nn.Module, batch: Batch | LikelihoodRows, generator: Generator | None = None
    ) -> Loss:
        batch = as_prepared(self, module, batch, generator)
        flow, _, penalties = self._resolve(module)
        with numerical.watched():  # rows without a density are counted here, not warned of
            log_prob, costs = self._scores(module, batch, generator)
            if batch.around is None:
                value = nll = weighted_mean(-log_prob, batch.weight)
                logged = {}
            else:
                value, nll, logged = _held(flow, batch, batch.around, log_prob)
        for weights, integrals in zip(penalties, costs, strict=True):
            for name, weight in weights.items():
                cost = weighted_mean(integrals[name], batch.weight)
                value = value + weight * cost
                logged[name] = logged.get(name, 0.0) + cost.detach()
        return Loss(value, {"nll": nll.detach(), **logged})

    def per_row(
        self, module: nn.Module, batch: Batch | LikelihoodRows, generator: Generator | None = None
    ) -> Tensor:
        batch = as_prepared(self, module, batch, generator)
        log_prob, costs = self._scores(module, batch, generator)
        flow, _, penalties = self._resolve(module)
        if batch.around is not None:  # a row without a density has NaN
            held = barrier(flow, batch.x, batch.context, batch.around)
            log_prob = log_prob - WEIGHT * held
        each = zip(penalties, costs, strict=True)
        terms = [weight * found[name] for told, found in each for name, weight in told.items()]
        return sum(terms, -log_prob)

    def _scores(
        self, module: nn.Module, rows: LikelihoodRows, generator: Generator | None
    ) -> tuple[Tensor, list[dict[str, Tensor]]]:
        """Log-density, and each penalty's integral along each ODE, shape (N,)."""
        flow, divergences, penalties = self._resolve(module)
        first, *others = divergences
        if rows.probe is None and rows.stop is None and not any(penalties):
            if all(other == first for other in others):
                log_prob = flow.log_prob(
                    rows.x, rows.context, divergence=first, generator=generator
                )
                return log_prob, [{} for _ in penalties]
        log_prob, integrals = flow.log_prob_with_solves(
            rows.x, rows.context, solves=_solves(rows, divergences, penalties), generator=generator
        )
        found = zip(penalties, integrals, strict=True)
        return log_prob, [dict(zip(names, values, strict=True)) for names, values in found]

    def as_trained(self, flow: Flow) -> Flow:
        if self.solver is not None:
            return flow.with_solver(Solver.of(self.solver))
        if not any(ode.recipe.solver for ode in odes_in(flow.transform)):
            return flow
        return flow.with_transform(under_recipes(flow.transform))

    def settle(self, module: nn.Module) -> nn.Module:
        """Give the flow the discrete solver of the loss for good."""
        if isinstance(self.solver, Solver) and self.solver.discrete and isinstance(module, Flow):
            module.keep_solver(self.solver)
        return module

    def learning_rate(self, module: nn.Module) -> float:
        """The lowest learning rate of the model's recipes, or this objective's.

        Steps of a solver that are the model bear a higher one than an ODE that they approximate.
        """
        flow = as_flow("MaximumLikelihood", module)
        rates = [ode.recipe.lr for ode in odes_in(flow.transform) if ode.recipe.lr]
        return min(rates, default=DISCRETE_LR if self._trains_steps(flow) else self.lr)

    def largest_gradient(self, module: nn.Module) -> float:
        flow = as_flow("MaximumLikelihood", module)
        return DISCRETE_CLIP if self._trains_steps(flow) else self.clip

    def _trains_steps(self, flow: Flow) -> bool:
        """Whether a solver's steps are the model."""
        own = None if self.solver is None else Solver.of(self.solver)
        odes = odes_in(flow.transform)
        return any((own or ode.recipe.solver or ode.solver).discrete for ode in odes)


def _held(
    flow: Flow, rows: LikelihoodRows, around: Tensor, log_prob: Tensor
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The loss of rows that have a density with the barrier, their NLL, and what is logged."""
    has_density = ~log_prob.isnan()
    weight = has_density.to(log_prob)
    weight = weight if rows.weight is None else weight * rows.weight
    nll = weighted_mean(-torch.where(has_density, log_prob, 0.0), weight)
    held = barrier(flow, rows.x, rows.context, around)
    folded = 1 - has_density.to(log_prob).mean()
    return nll + WEIGHT * held, nll, {"barrier": held.detach(), "folded": folded}


def _solves(
    rows: LikelihoodRows,
    divergences: Sequence[Divergence],
    penalties: Sequence[Mapping[str, float]],
) -> list[Solve]:
    """How each ODE is solved, with what was drawn for it."""
    counts = [number_of_probes(each) for each in divergences]
    stops = [0.0] * len(penalties) if rows.stop is None else rows.stop[0].reshape(-1).tolist()
    if rows.probe is not None:
        own = rows.probe.movedim(1, 0).split(counts)
        divergences = [
            replace(each, probe=probe) if len(probe) else each  # pyright: ignore
            for each, probe in zip(divergences, own, strict=True)
        ]
    return [
        Solve(divergence, [REGULARIZERS[name] for name in names], stop)
        for divergence, names, stop in zip(divergences, penalties, stops, strict=True)
    ]


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
