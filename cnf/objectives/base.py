"""What an objective is: a loss for a module on a batch, its draws made beforehand."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

from torch import Generator, Tensor, nn

from cnf.errors import expect_event
from cnf.flow import Flow
from cnf.objectives.batch import Batch, Prepared
from cnf.registry import Registry

P = TypeVar("P")


class Loss(NamedTuple):
    """A scalar to differentiate, and what training logs."""

    value: Tensor
    metrics: dict[str, Tensor]


class Objective(ABC):
    """A loss for a module on a batch.

    All random draws are made in `prepare`, so that the same seed gives the same numbers however
    many processes share the rows, and so that it may run ahead of the step.

    Attributes:
        needs_data: Whether a batch without rows makes no sense.
        uses_data: Whether the loss depends on x, and not on the contexts alone.
        solves: Whether the loss solves a continuous flow's ODE.
        rowwise: Whether row k of what `prepare` gives comes from row k of the batch alone, and has
            its weight. A process then prepares only parts of a large batch, those with its rows;
            else each process prepares the whole batch.
        capturable: Whether each step computes the same of its rows and the weights alone, so that
            a GPU may replay it: no number is read, no counter kept, nothing drawn by Python.
        scores_density: Whether held-out rows are scored by their NLL where a flow has a density,
            and not by the loss.
        lr: Learning rate of Adam where neither the run nor the model has one.
        clip: Largest norm of the gradient where the run has none.
    """

    needs_data = False
    uses_data = True
    solves = False
    rowwise = False
    capturable = False
    scores_density = True
    lr = 2e-3
    clip = 10.0

    def settle(self, module: nn.Module) -> nn.Module:
        """The module, in which what belongs to the objective for good is changed before training.

        Args:
            module: What is trained.
        """
        return module

    def begin(
        self, module: nn.Module, rows: Callable[[int], Batch | None], generator: Generator
    ) -> "Objective":
        """The objective that `fit` is to use, once it has seen the module and the data.

        Args:
            module: What is trained, its preprocessing fitted; it keeps its parts until the end.
            rows: Gives so many rows of the training data, or all that there are; None where an
                objective needs none.
            generator: Source of draws.
        """
        return self

    def prepare(
        self, module: nn.Module, batch: Batch, generator: Generator | None = None
    ) -> Prepared:
        """The batch with everything random that the loss needs: tensors only.

        Only a context keeps its gradient, as it may come from a net that is trained with the flow.
        A loss that draws nothing takes the batch as it is.

        Args:
            module: What is trained.
            batch: Rows as data give them; of a rowwise objective those of a part of the batch.
            generator: Source of draws.
        """
        return batch

    @abstractmethod
    def __call__(self, module: nn.Module, batch: Any, generator: Generator | None = None) -> Loss:
        """The loss of what `prepare` gave; a `Batch` that was not prepared is prepared first."""

    def per_row(self, module: nn.Module, batch: Any, generator: Generator | None = None) -> Tensor:
        """The loss of each row, shape (N,), for a loop of one's own.

        Its mean, weighted by the weights of what `prepare` gave, is the loss.

        Args:
            module: What is trained.
            batch: What `prepare` gave, or a `Batch`, which is prepared first.
            generator: Source of draws.

        Raises:
            TypeError: The objective is no mean over rows.
        """
        raise TypeError(f"{type(self).__name__} has no loss of each row; call it for the whole")

    def as_trained(self, flow: Flow) -> Flow:
        """The flow under the solver that the loss is computed with."""
        return flow

    def parameters(self, module: nn.Module) -> Iterator[nn.Parameter]:
        """The parameters that are trained."""
        return module.parameters()

    def learning_rate(self, module: nn.Module) -> float:
        """Adam's learning rate, where none is given."""
        return self.lr

    def largest_gradient(self, module: nn.Module) -> float:
        """The norm to which a gradient is clipped, where none is given."""
        return self.clip


OBJECTIVES = Registry("objective", Objective)


def as_flow(who: str, module: nn.Module) -> Flow:
    """The module, which must be a `Flow`."""
    if not isinstance(module, Flow):
        raise TypeError(f"{who}: expected a cnf.Flow, got {type(module).__name__}")
    return module


def expect_rows(who: str, flow: Flow, x: Tensor) -> None:
    r"""Raise unless x is what the flow models, one for each row: shape (N, \*event)."""
    expect_event(who, "x", x, flow.event_shape)
    if x.dim() != 1 + len(flow.event_shape):
        raise ValueError(
            f"{who}: expected one row for each x, shape {('N', *flow.event_shape)}, got "
            f"{tuple(x.shape)}; flatten what comes before"
        )


def as_prepared(
    objective: Objective, module: nn.Module, batch: Batch | P, generator: Generator | None
) -> P:
    """What an objective's `prepare` gives of a `Batch`; what it gave already, as it is.

    Args:
        objective: The objective.
        module: What is trained.
        batch: A `Batch`, or what `prepare` gave.
        generator: Source of draws.

    Raises:
        TypeError: It is neither.
    """
    if isinstance(batch, Batch):
        rows: Any = objective.prepare(module, batch, generator)
        return rows
    if not hasattr(batch, "shared"):
        raise TypeError(
            f"{type(objective).__name__}: expected a cnf.Batch, or what prepare gave, got a "
            f"{type(batch).__name__}; write cnf.Batch(x, context)"
        )
    return batch
