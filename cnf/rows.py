"""Finite rows of a batch: NaN and infinity in a row do not affect the other rows."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class FiniteRows:
    """The partition of a batch into rows that are finite and rows that are not.

    A row that is not finite would make the gradients of a network NaN, and would shorten the steps
    of an adaptive solver. Therefore `select` replaces it by zeros or drops it before a
    computation, and `restore` inserts its known result afterwards.

    Args:
        values: The same rows before and after a map, each of shape (*batch, *event).
        event_dims: Number of trailing axes that form the event.
        context: Condition, shape (*batch, C), or None.
        missing: Whether NaN in the context stands for a missing value, and is allowed.
        drop: Whether rows that are not finite are dropped, which synchronizes with the device.

    Attributes:
        finite: Mask of the finite rows, shape (*batch,).
        dropped: Whether rows were dropped.
        log_density: Log-density of the other rows: NaN for NaN, -inf for infinity.
    """

    def __init__(
        self,
        values: Sequence[Tensor],
        event_dims: int,
        context: Tensor | None,
        missing: bool = False,
        drop: bool = False,
    ) -> None:
        size, *others = (_size(value, event_dims) for value in values)
        for other in others:
            size = torch.where(size.isfinite(), other, size)
        if context is not None:
            context = context.detach()
            context = torch.where(context.isnan(), 0.0, context) if missing else context
            size = size + (0 * context).sum(-1)  # NaN where it is not finite
        self.finite, self.log_density = size.isfinite(), -size
        self.dropped = drop and not self.finite.all()

    def select(self, value: Any, axis: int = 0) -> Any:
        """The rows to compute with; anything but a tensor is returned unchanged.

        Args:
            value: A tensor with the batch's axes, or a value that all rows share.
            axis: The first axis of the batch.
        """
        if not isinstance(value, Tensor):
            return value
        if self.dropped:
            return value[self._at(axis)]
        return torch.where(self._over(value, axis), value, 0.0)

    def restore(self, value: Tensor, bad: Tensor | float = torch.nan, axis: int = 0) -> Tensor:
        """A value for all rows from that of the selected rows.

        Args:
            value: The value of the selected rows.
            bad: The value of the other rows; a tensor has the shape of the batch.
            axis: The first axis of the batch in `value`.
        """
        bad = bad.to(value.dtype) if isinstance(bad, Tensor) else bad
        if not self.dropped:
            return torch.where(self._over(value, axis), value, bad)
        shape = (*value.shape[:axis], *self.finite.shape, *value.shape[axis + 1 :])
        result = value.new_empty(shape)
        result[...] = bad
        result[self._at(axis)] = value
        return result

    def _at(self, axis: int) -> tuple[Any, ...]:
        return (*[slice(None)] * axis, self.finite)

    def _over(self, value: Tensor, axis: int) -> Tensor:
        """The mask `finite` in a shape that broadcasts with `value`."""
        inner = value.dim() - axis - self.finite.dim()
        return self.finite.reshape([*self.finite.shape, *[1] * inner])


class AllFinite:
    """The counterpart of `FiniteRows` for a batch in which all rows are finite."""

    dropped, log_density = False, 0.0

    def select(self, value: Any, axis: int = 0) -> Any:
        """Return the value; see `FiniteRows.select`.

        Args:
            value: A value.
            axis: Not used.
        """
        return value

    def restore(self, value: Tensor, bad: Tensor | float = torch.nan, axis: int = 0) -> Tensor:
        """Return the value; see `FiniteRows.restore`.

        Args:
            value: A value.
            bad: Not used.
            axis: Not used.
        """
        return value


def all_finite(*values: Tensor | None) -> bool:
    """Whether the sum of each tensor is finite, and so all its numbers; None is skipped."""
    return all(value is None or math.isfinite(value.detach().sum()) for value in values)


def _size(value: Tensor, event_dims: int) -> Tensor:
    """The largest absolute value of each row, NaN for a row with NaN."""
    # 20× faster than linalg.vector_norm(…, inf).
    return value.detach().abs().amax(tuple(range(-event_dims, 0)))
