"""What columns of one's own data may hold that a density cannot be learned from."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from cnf.precision import collapsing


def expect_resolved(head: Tensor | None, dtype: torch.dtype, names: Sequence[str] | None) -> None:
    """Raise where a cast of the data to `dtype` would merge the values of a column."""
    if head is None or not head.is_floating_point():
        return
    if merged := collapsing(head, dtype):
        raise ValueError(
            f"fit: {dtype} merges different values of {_named(merged, names)}; build the model "
            "with preprocess='standardise', which works in float64, or subtract a constant from "
            "these columns, or train module.double()"
        )


def _named(columns: Iterable[int], names: Sequence[str] | None) -> str:
    found = [str(k) if names is None else repr(names[k]) for k in columns]
    return f"column{'s' if len(found) > 1 else ''} {', '.join(found)}"
