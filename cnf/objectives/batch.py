"""Rows to train on, and what else an objective prepares of them."""

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from typing import Protocol, Self

import torch
from torch import Generator, Tensor

from cnf.errors import expect_weights
from cnf.precision import widest
from cnf.random import draw


class Prepared(Protocol):
    """What `Objective.prepare` gives: rows that processes can share."""

    def shared(self, rank: int, processes: int) -> tuple[Self, float]:
        """See `RowTensors.shared`."""
        ...

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """See `RowTensors.map`."""
        ...


def rows_of(size: int, part: int, parts: int) -> range:
    """The rows of one of some parts of a batch, which differ by one row at most.

    Args:
        size: Rows of the batch.
        part: The number of the part, from 0.
        parts: How many there are.

    Raises:
        ValueError: A part would have no row.
    """
    if size < parts:
        raise ValueError(
            f"fit: expected batches of at least {parts} rows, one for each process or "
            f"part of accumulate, got one of {size}; make larger ones: batch_size=256"
        )
    return range(part * size // parts, (part + 1) * size // parts)


def tensors_of(rows: Prepared) -> list[Tensor]:
    """The tensors of prepared rows, in the order of their `map`.

    Args:
        rows: What an objective prepared.
    """
    found: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    rows.map(keep)
    return found


class RowTensors:
    """A dataclass of tensors, or None, whose first axis is the row.

    The first field is always a tensor; `weight` is that of each row, shape (N,).
    """

    weight: Tensor | None

    def but(self, **tensors: Tensor | None) -> Self:
        """The same with other tensors in place of its own; they are not checked."""
        rows = copy(self)
        vars(rows).update(tensors)
        return rows

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """The same with `function` applied to each tensor that is there."""
        tensors = vars(self).items()
        return self.but(**{k: function(value) for k, value in tensors if value is not None})

    def shared(self, rank: int, processes: int) -> tuple[Self, float]:
        """One process's rows, and the weight of their loss in the mean over the processes.

        A loss is divided by the number of its own rows, or the sum of their weights, so that the
        mean over processes must count each by these.

        Raises:
            ValueError: A process would have no row.
        """
        if processes == 1:
            return self, 1.0
        size = len(next(iter(vars(self).values())))
        rows = rows_of(size, rank, processes)
        own = self.map(lambda value: value[rows.start : rows.stop])
        if own.weight is None or self.weight is None:
            return own, len(rows) * processes / size
        exact = widest(self.weight.device)  # in float32, parts would not quite make the whole
        whole = self.weight.sum(dtype=exact)
        part = own.weight.sum(dtype=exact)
        return own, (part * processes / whole).item() if whole > 0 else 1.0


@dataclass
class Batch(RowTensors):
    """Rows to train on, as data give them.

    Attributes:
        x: Data, shape (N, *event).
        context: Condition, shape (N, C).
        x0: Base samples paired with x, shape (N, *event).
        weight: Weight of each row, at least 0, shape (N,).

    Raises:
        ValueError: A tensor has another number of rows than x, or the weights are not of shape
            (N,); a weight is negative, NaN or infinite, or all are zero.
    """

    x: Tensor
    context: Tensor | None = None
    x0: Tensor | None = None
    weight: Tensor | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is None:
                continue
            if not isinstance(value, Tensor):
                kind = type(value).__name__
                raise ValueError(f"Batch: expected {name} to be a torch.Tensor, got {kind}")
            if name == "weight":
                fits, wanted = value.shape == self.x.shape[:1], f"shape ({len(self.x)},)"
            else:
                fits = value.dim() and len(value) == len(self.x)
                wanted = "shape (N, …)" if name == "x" else f"{len(self.x)} rows, as many as x has"
            if not fits:
                raise ValueError(
                    f"Batch: expected {name} of {wanted}, got shape {tuple(value.shape)}"
                )
        if self.weight is not None and self.weight.is_cpu:  # a GPU would be waited for
            expect_weights("Batch", self.weight)


@dataclass(frozen=True)
class TrainingRows:
    """The rows that an objective may ask for before training.

    Args:
        read: Gives the first n, or all that there are; None where there are none.
        total: How many there are; None where that is not known, or each step draws others.
    """

    read: Callable[[int], Batch | None]
    total: int | None = None

    def __call__(self, n: int) -> Batch | None:
        """The first n rows."""
        return self.read(n)


def weighted_mean(values: Tensor, weight: Tensor | None) -> Tensor:
    """Mean of (N,), weighted where there are weights; 0 where all of these are 0."""
    if weight is None:
        return values.mean()
    weight = weight.to(values)
    return (weight * values).sum() / weight.sum().clamp(min=torch.finfo(weight.dtype).tiny)


def resampled(batch: Batch, generator: Generator | None = None) -> Batch:
    """As many rows, drawn by their weights: what comes is equally weighted.

    Stratified: one draw from each N-th of the weights, so that equal weights give the rows as they
    are. Where all weights are 0, they stay 0.
    """
    if batch.weight is None:
        return batch
    n, weight = len(batch.x), batch.weight.double()
    within = draw(torch.rand, (n,), generator, like=weight)
    ends = weight.cumsum(0)
    places = (torch.arange(n, device=weight.device) + within) * (ends[-1] / n)
    rows = torch.searchsorted(ends, places, right=True).clamp(max=n - 1)
    drawn = batch.map(lambda value: value[rows])
    return drawn.but(weight=(ends[-1:] > 0).to(batch.x.dtype).expand(n))
