"""Several objectives at once, such as flow matching with a share of likelihood."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Generator, Tensor, nn

from cnf.errors import expect_positive
from cnf.flow import Flow
from cnf.objectives.base import OBJECTIVES, Loss, Objective, as_prepared
from cnf.objectives.batch import Batch, Prepared
from cnf.objectives.likelihood import MaximumLikelihood
from cnf.objectives.matching import FlowMatching


@dataclass
class JointRows:
    """What each term has prepared, and the weight of its loss in the mean over processes."""

    terms: tuple[Prepared, ...]
    shares: tuple[float, ...]

    def shared(self, rank: int, processes: int) -> "tuple[JointRows, float]":
        """One process's rows of each term, whose weights may differ."""
        parts = [term.shared(rank, processes) for term in self.terms]
        shares = (own * share for own, (_, share) in zip(self.shares, parts, strict=True))
        return JointRows(tuple(term for term, _ in parts), tuple(shares)), 1.0

    def map(self, function: Callable[[Tensor], Tensor]) -> "JointRows":
        """The same with `function` applied to each tensor of each term."""
        return JointRows(tuple(term.map(function) for term in self.terms), self.shares)


@OBJECTIVES.register("joint")
@dataclass(frozen=True)
class Joint(Objective):
    """Σ weight·loss over the same data: flow matching + λ·NLL unless told.

    Each term makes its own draws, so that there may be two of one kind.

    >>> Joint(weights=(1.0, 0.01)).terms[1]
    MaximumLikelihood(divergence=None, penalties=None, solver=None, steer=0.0)

    Args:
        terms: Objectives, or {"name": …, **options} for each.
        weights: One for each term, above 0.

    Raises:
        ValueError: There is not one positive weight for each term, or no term.
    """

    terms: tuple[Any, ...] = (FlowMatching(), MaximumLikelihood())
    weights: tuple[float, ...] = (1.0, 0.1)

    def __post_init__(self) -> None:
        if not self.terms or len(self.terms) != len(self.weights):
            raise ValueError(
                f"Joint: expected a weight for each term, got {len(self.terms)} terms and "
                f"weights {tuple(self.weights)}"
            )
        for weight in self.weights:
            expect_positive("Joint", weights=weight)
        object.__setattr__(
            self, "terms", tuple(OBJECTIVES.build(term, "Joint") for term in self.terms)
        )
        object.__setattr__(self, "weights", tuple(self.weights))

    @property
    def needs_data(self) -> bool:
        return any(term.needs_data for term in self.terms)

    @property
    def uses_data(self) -> bool:
        """If any term does."""
        return any(term.uses_data for term in self.terms)

    @property
    def solves(self) -> bool:
        return any(term.solves for term in self.terms)

    @property
    def rowwise(self) -> bool:
        return all(term.rowwise for term in self.terms)

    @property
    def capturable(self) -> bool:
        return all(term.capturable for term in self.terms)

    def as_trained(self, flow: Flow) -> Flow:
        """The flow under the solver of the first term that has one of its own."""
        found = (term.as_trained(flow) for term in self.terms)
        return next((under for under in found if under is not flow), flow)

    def settle(self, module: nn.Module) -> nn.Module:
        """The module as each term settles it."""
        for term in self.terms:
            module = term.settle(module)
        return module

    @property
    def scores_density(self) -> bool:
        """If each term does."""
        return all(term.scores_density for term in self.terms)

    def learning_rate(self, module: nn.Module) -> float:
        """The lowest of the terms' learning rates."""
        return min(term.learning_rate(module) for term in self.terms)

    def largest_gradient(self, module: nn.Module) -> float:
        """The lowest of the terms' norms."""
        return min(term.largest_gradient(module) for term in self.terms)

    def begin(self, module: nn.Module, rows: Any, generator: Generator) -> "Joint":
        return replace(self, terms=tuple(t.begin(module, rows, generator) for t in self.terms))

    def prepare(
        self, module: nn.Module, batch: Batch, generator: Generator | None = None
    ) -> JointRows:
        prepared = tuple(term.prepare(module, batch, generator) for term in self.terms)
        return JointRows(prepared, (1.0,) * len(prepared))

    def __call__(
        self, module: nn.Module, batch: Batch | JointRows, generator: Generator | None = None
    ) -> Loss:
        batch = as_prepared(self, module, batch, generator)
        value, metrics = 0.0, {}
        for k, (term, rows) in enumerate(zip(self.terms, batch.terms, strict=True)):
            loss = term(module, rows, generator)
            value = value + self.weights[k] * batch.shares[k] * loss.value
            for name, metric in loss.metrics.items():
                # A share other than 1 is that of some rows, whose sum is the metric of all.
                shared = batch.shares[k] * metric
                metrics[name if name not in metrics else f"{name}_{k + 1}"] = shared
        assert isinstance(value, Tensor)
        return Loss(value, metrics)

    def per_row(
        self, module: nn.Module, batch: Batch | JointRows, generator: Generator | None = None
    ) -> Tensor:
        """The weighted sum of the terms' losses of row k, shape (N,).

        A coupling, or the weights of rows, may have taken a term's row k from other data.

        Args:
            module: What is trained.
            batch: What `prepare` gave, or a `Batch`, which is prepared first.
            generator: Source of draws.
        """
        batch = as_prepared(self, module, batch, generator)
        parts = zip(self.weights, self.terms, batch.terms, strict=True)
        losses = [w * term.per_row(module, rows, generator) for w, term, rows in parts]
        return torch.stack(losses).sum(0)

    def parameters(self, module: nn.Module) -> Iterator[nn.Parameter]:
        """The parameters that any term trains, each once."""
        found = {id(p): p for term in self.terms for p in term.parameters(module)}
        return iter(found.values())
