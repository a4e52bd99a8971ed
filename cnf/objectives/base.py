"""What an objective is: a loss for a module on a batch, its draws made beforehand."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cnf.errors import expect_event, expect_weights
from cnf.flow import Flow
from cnf.registry import Registry
from cnf.transforms.continuous import Continuous


@dataclass
class Batch:
    """Rows to train on; every tensor's first axis is the row, so that processes can share it.

    Attributes:
        x: Data, shape (N, *event).
        context: Condition, shape (N, C).
        x0: Base samples paired with x, shape (N, *event).
        x1: x as the transform gives it, inside preprocessing, shape (N, *event).
        weight: Weight of each row, at least 0, shape (N,).
        t: Times, shape (N,).
        noise: Of a noisy path, shape (N, *event).
        probe: Hutchinson probes, shape (N, probes, *event).
        stop: Time at which a solve towards the base ends, the same in each row, shape (N,).

    Raises:
        ValueError: A tensor has another number of rows than x, or a number that each row has one
            of is not of shape (N,); a weight is negative, NaN or infinite, or all are zero.
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

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is None:
                continue
            if not isinstance(value, Tensor):
                kind = type(value).__name__
                raise ValueError(f"Batch: expected {name} to be a torch.Tensor, got {kind}")
            if name in ("weight", "t", "stop"):
                fits, wanted = value.shape == self.x.shape[:1], f"shape ({len(self.x)},)"
            else:
                fits = value.dim() and len(value) == len(self.x)
                wanted = "shape (N, …)" if name == "x" else f"{len(self.x)} rows, as many as x has"
            if not fits:
                raise ValueError(
                    f"Batch: expected {name} of {wanted}, got shape {tuple(value.shape)}"
                )
        if (
            self.weight is not None and self.weight.device.type == "cpu"
        ):  # a GPU would be waited for
            expect_weights("Batch", self.weight)

    def but(self, **tensors: Tensor | None) -> "Batch":
        """The batch with other tensors in place of its own; they are not checked again."""
        batch = copy(self)
        for name, value in tensors.items():
            setattr(batch, name, value)
        return batch

    def map(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        """The batch with `function` applied to each tensor that is there."""
        tensors = vars(self).items()
        return self.but(**{k: function(value) for k, value in tensors if value is not None})


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
        solves: Whether the loss solves a continuous flow's ODE.
        lr: Learning rate of Adam where neither the run nor the model has one.
    """

    needs_data = False
    solves = False
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

    def as_trained(self, flow: Flow) -> Flow:
        """The flow under the solver that the loss is computed with."""
        return flow

    def parameters(self, module: nn.Module) -> Iterator[nn.Parameter]:
        """What is trained."""
        return module.parameters()

    def learning_rate(self, module: nn.Module) -> float:
        """Adam's, where none is given."""
        return self.lr


OBJECTIVES = Registry("objective", Objective)


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


def expect_rows(who: str, flow: Flow, batch: Batch) -> None:
    """Raise unless the rows of the batch are what the flow models: x of shape (N, \\*event)."""
    expect_event(who, "x", batch.x, flow.event_shape)
    if batch.x.dim() != 1 + len(flow.event_shape):
        raise ValueError(
            f"{who}: expected one row for each x, shape {('N', *flow.event_shape)}, got "
            f"{tuple(batch.x.shape)}; flatten what comes before"
        )


def weighted_mean(values: Tensor, weight: Tensor | None) -> Tensor:
    """Mean of (N,), weighted where there are weights; 0 where all of these are 0."""
    if weight is None:
        return values.mean()
    weight = weight.to(values)
    return (weight * values).sum() / weight.sum().clamp(min=torch.finfo(weight.dtype).tiny)


def resampled(batch: Batch, generator: torch.Generator | None = None) -> Batch:
    """As many rows, drawn by their weights: what comes is equally weighted.

    Stratified: one draw from each N-th of the weights, so that equal weights give the rows as they
    are. Where all weights are 0, they stay 0.
    """
    if batch.weight is None:
        return batch
    n, weight = len(batch.x), batch.weight.double()
    device = weight.device if generator is None else generator.device
    within = torch.rand(n, generator=generator, device=device, dtype=torch.float64)
    ends = weight.cumsum(0)
    places = (torch.arange(n, device=weight.device) + within.to(weight.device)) * (ends[-1] / n)
    rows = torch.searchsorted(ends, places, right=True).clamp(max=n - 1)
    drawn = batch.map(lambda value: value[rows])
    return drawn.but(weight=(ends[-1:] > 0).to(batch.x.dtype).expand(n))
