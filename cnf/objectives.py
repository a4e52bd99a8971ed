"""What is minimised: maximum likelihood, flow matching. Both train the same flow."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cnf.dynamics.divergence import Hutchinson, as_divergence
from cnf.dynamics.regularizers import REGULARIZERS
from cnf.dynamics.solver import Solver, as_solver
from cnf.errors import expect_event, expect_positive
from cnf.flow import Flow
from cnf.matching.couplings import COUPLINGS
from cnf.matching.paths import PATHS, Path
from cnf.registry import Registry
from cnf.transforms.continuous import Continuous

OBJECTIVES = Registry("objective")


@dataclass
class Batch:
    """Rows to train on; every tensor's first axis is the row, so that processes can share it.

    Attributes:
        x: Data, shape (N, *event).
        context: Condition, shape (N, C).
        x0: Base samples paired with x, shape (N, *event).
        x1: x as the transform gives it, inside preprocessing, shape (N, *event).
        weight: Weight of each row, shape (N,).
        t: Times, shape (N,).
        probe: Hutchinson probes, shape (N, probes, *event).
    """

    x: Tensor
    context: Tensor | None = None
    x0: Tensor | None = None
    x1: Tensor | None = None
    weight: Tensor | None = None
    t: Tensor | None = None
    probe: Tensor | None = None

    def map(self, function: Any) -> "Batch":
        """The batch with `function` applied to each tensor that is there."""
        tensors = ((f.name, getattr(self, f.name)) for f in fields(self))
        return Batch(**{name: function(value) for name, value in tensors if value is not None})


class Loss(NamedTuple):
    """A scalar to differentiate, and what training logs."""

    value: Tensor
    metrics: dict[str, Tensor]


class Objective(ABC):
    """A loss for a module on a batch.

    All random draws are made in `prepare`, for the whole batch, so that the same seed gives the
    same numbers however many processes share the rows, and so that it may run ahead of the step.

    Attributes:
        needs_data: Whether a batch without rows makes no sense.
    """

    needs_data = False

    @abstractmethod
    def prepare(
        self, module: nn.Module, batch: Batch, generator: torch.Generator | None = None
    ) -> Batch:
        """The batch with everything random that the loss needs: tensors only, no gradients."""

    @abstractmethod
    def __call__(
        self, module: nn.Module, batch: Batch, generator: torch.Generator | None = None
    ) -> Loss:
        """The loss; a batch that was not prepared is prepared first."""

    def parameters(self, module: nn.Module) -> Iterator[nn.Parameter]:
        """What is trained."""
        return module.parameters()


@OBJECTIVES.register("maximum-likelihood")
@dataclass(frozen=True)
class MaximumLikelihood(Objective):
    """Mean negative log-likelihood in nats, plus penalties along a continuous flow's paths.

    Args:
        divergence: "exact", or an estimator such as "hutchinson" or `Hutchinson(probes=2)`.
        penalties: Weights of regularisers by name, such as {"kinetic": 0.01}; continuous flows
            only.
        solver: A solver for training only, such as a few fixed steps; the flow's own if None.
    """

    needs_data = True

    divergence: Any = "exact"
    penalties: dict[str, float] = field(default_factory=dict)
    solver: Solver | Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        as_divergence(self.divergence)
        if isinstance(self.divergence, Mapping):  # from a config file
            object.__setattr__(self, "divergence", as_divergence(self.divergence))
        if isinstance(self.solver, Mapping):
            object.__setattr__(self, "solver", as_solver(self.solver))
        for name, weight in self.penalties.items():
            _ = REGULARIZERS[name]
            expect_positive("MaximumLikelihood", **{name: weight})

    def prepare(
        self, module: nn.Module, batch: Batch, generator: torch.Generator | None = None
    ) -> Batch:
        divergence = as_divergence(self.divergence)
        if not isinstance(divergence, Hutchinson):
            return batch
        return replace(batch, probe=divergence.draw(batch.x, generator).movedim(0, 1))

    def __call__(
        self, module: nn.Module, batch: Batch, generator: torch.Generator | None = None
    ) -> Loss:
        divergence = as_divergence(self.divergence)
        if isinstance(divergence, Hutchinson):
            if batch.probe is None:
                batch = self.prepare(module, batch, generator)
            assert batch.probe is not None
            divergence = replace(divergence, probe=batch.probe.movedim(1, 0))
        flow = as_flow("MaximumLikelihood", module)
        if self.solver is not None:
            flow = flow.with_solver(as_solver(self.solver))
        if not self.penalties:
            log_prob = flow.log_prob(
                batch.x, batch.context, divergence=divergence, generator=generator
            )
            nll = _mean(-log_prob, batch.weight)
            return Loss(nll, {"nll": nll.detach()})
        return self._penalised(flow, batch, divergence)

    def _penalised(self, flow: Flow, batch: Batch, divergence: Any) -> Loss:
        transform = require_continuous("MaximumLikelihood(penalties=…)", flow)
        context = flow.checked_context("MaximumLikelihood", batch.context, batch.x.shape[:1])
        if flow.dequantisation is not None:
            raise TypeError("MaximumLikelihood: penalties and dequantisation do not go together")
        y, outer = batch.x, 0.0
        if flow.preprocess is not None:
            y, outer = flow.preprocess.inverse(y)
        solved = transform.integrate(
            y, context, towards="base", divergence=divergence,
            integrands=[REGULARIZERS[name] for name in self.penalties],
        )  # fmt: skip
        nll = _mean(-(flow.base.log_prob(solved.value) + solved.ladj + outer), batch.weight)
        means = [_mean(integral, batch.weight) for integral in solved.integrals]
        costs = dict(zip(self.penalties, means, strict=True))
        value = nll + sum(weight * costs[name] for name, weight in self.penalties.items())
        logged = {name: cost.detach() for name, cost in costs.items()}
        return Loss(value, {"nll": nll.detach(), **logged})


@OBJECTIVES.register("flow-matching")
@dataclass(frozen=True)
class FlowMatching(Objective):
    """E‖v(t, xt) - ut‖² over t ~ U(0, 1) and coupled pairs (x0, x1); no ODE is solved.

    Source: Lipman et al. (2023), https://arxiv.org/abs/2210.02747; Tong et al. (2024),
    https://arxiv.org/abs/2302.00482.

    Args:
        path: A name in `PATHS`, a `Path`, or {"name": …, **fields}.
        coupling: A name in `COUPLINGS`, or a coupling function.
    """

    needs_data = True

    path: Any = "linear"
    coupling: Any = "independent"

    def __post_init__(self) -> None:
        path = self._path()
        if not isinstance(self.path, str):
            object.__setattr__(self, "path", path)
        if isinstance(self.coupling, str):
            _ = COUPLINGS[self.coupling]

    def _path(self) -> Path:
        if isinstance(self.path, Path):
            return self.path
        settings = {"name": self.path} if isinstance(self.path, str) else dict(self.path)
        return PATHS[settings.pop("name")](**settings)

    def prepare(
        self, module: nn.Module, batch: Batch, generator: torch.Generator | None = None
    ) -> Batch:
        flow = as_flow("FlowMatching", module)
        require_continuous("FlowMatching", flow)
        expect_event("FlowMatching", "x", batch.x, flow.event_shape)
        x1 = batch.x
        with torch.no_grad():
            if flow.dequantisation is not None:
                x1 = flow.dequantisation.encode(x1, generator)[0]
            if flow.preprocess is not None:
                x1 = flow.preprocess.inverse(x1)[0]
            batch = replace(batch, x1=x1)
            if batch.x0 is None:
                batch = self._paired(flow, batch, x1, generator)
            if batch.t is None:
                device = x1.device if generator is None else generator.device
                t = torch.rand(len(batch.x), generator=generator, device=device, dtype=x1.dtype)
                batch.t = t.to(x1.device)
        return batch

    def _paired(
        self, flow: Flow, batch: Batch, x1: Tensor, generator: torch.Generator | None
    ) -> Batch:
        x0 = flow.base.sample((len(x1),), generator)
        couple = COUPLINGS[self.coupling] if isinstance(self.coupling, str) else self.coupling
        i, j, weight = couple(x0, x1, batch.context, generator)
        if j is not None:
            batch = batch.map(lambda rows: rows[j])  # what belongs to a data point follows it
        batch.x0 = x0 if i is None else x0[i]
        batch.weight = _product(batch.weight, weight)
        return batch

    def __call__(
        self, module: nn.Module, batch: Batch, generator: torch.Generator | None = None
    ) -> Loss:
        flow = as_flow("FlowMatching", module)
        if batch.x0 is None or batch.x1 is None or batch.t is None:
            batch = self.prepare(flow, batch, generator)
        assert batch.x0 is not None and batch.x1 is not None and batch.t is not None
        t, xt, ut = self._path().sample(batch.x0, batch.x1, batch.t)
        context = flow.checked_context("FlowMatching", batch.context, xt.shape[:1])
        error = (flow.field(t, xt, context) - ut).square()
        if batch.weight is None:
            value = error.sum() / len(error)
        else:
            value = _mean(error.flatten(1).sum(1), batch.weight)
        return Loss(value, {"fm": value.detach()})

    def parameters(self, module: nn.Module) -> Iterator[nn.Parameter]:
        """The field's; the base stays as it is."""
        flow = as_flow("FlowMatching", module)
        require_continuous("FlowMatching", flow)
        return flow.field.parameters()


def build(name: str, **options: Any) -> Objective:
    """Build a named objective.

    >>> build("maximum-likelihood", divergence="hutchinson").divergence
    'hutchinson'

    Args:
        name: A name in `OBJECTIVES`.
        options: Its fields.
    Raises:
        ValueError: An unknown name, or an option that the objective does not have.
    """
    kind = OBJECTIVES[name]
    known = [field.name for field in fields(kind)]
    for option in options:
        if option not in known:
            raise ValueError(f"{name}: unknown option {option!r}; known: {', '.join(known)}")
    return kind(**options)


def as_flow(who: str, module: nn.Module) -> Flow:
    """The module, which must be a `Flow`."""
    if not isinstance(module, Flow):
        raise TypeError(f"{who}: expected a cnf.Flow, got {type(module).__name__}")
    return module


def require_continuous(who: str, flow: Flow) -> Continuous:
    """The flow's `Continuous`, or a TypeError that says what is needed."""
    if not isinstance(flow.transform, Continuous):
        raise TypeError(
            f"{who}: expected a flow whose transform is a Continuous (it has a vector field), got "
            f"a {type(flow.transform).__name__}; train this flow with MaximumLikelihood()"
        )
    return flow.transform


def _mean(values: Tensor, weight: Tensor | None) -> Tensor:
    return values.mean() if weight is None else (weight * values).sum() / weight.sum()


def _product(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return a * b
