"""Several objectives at once, such as flow matching with a share of likelihood."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from cnf.errors import expect_positive
from cnf.flow import Flow
from cnf.objectives.base import OBJECTIVES, Batch, Loss, Objective
from cnf.objectives.likelihood import MaximumLikelihood
from cnf.objectives.matching import FlowMatching


@OBJECTIVES.register("joint")
@dataclass(frozen=True)
class Joint(Objective):
    """Σ weight·loss over the same rows: flow matching + λ·NLL unless told.

    >>> Joint(weights=(1.0, 0.01)).terms[1]
    MaximumLikelihood(divergence=None, penalties=None, solver=None, steer=0.0)

    Args:
        terms: Objectives of different kinds, or {"name": …, **options} for each.
        weights: One for each term.
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
        kinds = [type(term).__name__ for term in self.terms]
        if len(set(kinds)) < len(kinds):
            raise ValueError(
                "Joint: expected terms of different kinds, since those of one kind would share "
                f"their times, pairs and probes, got {', '.join(kinds)}"
            )
        object.__setattr__(self, "weights", tuple(self.weights))

    @property
    def needs_data(self) -> bool:
        return any(term.needs_data for term in self.terms)

    @property
    def solves(self) -> bool:
        return any(term.solves for term in self.terms)

    def as_trained(self, flow: Flow) -> Flow:
        """Under the solver of the first term that has one of its own."""
        found = (term.as_trained(flow) for term in self.terms)
        return next((under for under in found if under is not flow), flow)

    def learning_rate(self, module: nn.Module) -> float:
        """The lowest of the terms'."""
        return min(term.learning_rate(module) for term in self.terms)

    def begin(self, module: nn.Module, rows: Any, generator: torch.Generator) -> "Joint":
        return replace(self, terms=tuple(t.begin(module, rows, generator) for t in self.terms))

    def prepare(
        self, module: nn.Module, batch: Batch, generator: torch.Generator | None = None
    ) -> Batch:
        for term in self.terms:
            batch = term.prepare(module, batch, generator)
        return batch

    def __call__(
        self, module: nn.Module, batch: Batch, generator: torch.Generator | None = None
    ) -> Loss:
        losses = [term(module, batch, generator) for term in self.terms]
        value = sum(weight * loss.value for weight, loss in zip(self.weights, losses, strict=True))
        return Loss(value, {k: v for loss in losses for k, v in loss.metrics.items()})  # pyright: ignore

    def parameters(self, module: nn.Module) -> Iterator[nn.Parameter]:
        """What any term trains, once."""
        found = {id(p): p for term in self.terms for p in term.parameters(module)}
        return iter(found.values())
