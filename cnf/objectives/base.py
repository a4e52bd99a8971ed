"""What an objective is: a loss for a module on a batch, its draws made beforehand."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cnf.flow import Flow
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
        noise: Of a noisy path, shape (N, *event).
        probe: Hutchinson probes, shape (N, probes, *event).
        stop: Time at which a solve towards the base ends, the same in each row, shape (N,).
    """

    x: Tensor
    context: Tensor | None = None
    x0: Tensor | None = None
    x1: Tensor | None = None
    weight: Tensor | None = None
    t: Tensor | None = None
    noise: Tensor | None = None
    probe: Tensor | None = None
    stop: Tensor | None = None

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
        lr: Learning rate of Adam where neither the run nor the model has one.
    """

    needs_data = False
    lr = 2e-3

    def begin(
        self, module: nn.Module, rows: Callable[[int], Batch | None], generator: torch.Generator
    ) -> "Objective":
        """The objective that `fit` is to use, once it has seen the data.

        Args:
            module: What is trained, its preprocessing fitted.
            rows: Gives so many rows of the training data, or all that there are; None where an
                objective needs none.
            generator: Source of draws.
        """
        return self

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

    def learning_rate(self, module: nn.Module) -> float:
        """Adam's, where none is given."""
        return self.lr


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


def weighted_mean(values: Tensor, weight: Tensor | None) -> Tensor:
    """Mean of (N,), weighted where there are weights."""
    return values.mean() if weight is None else (weight * values).sum() / weight.sum()
