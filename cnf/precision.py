"""Numerical precision: autocast, the widest dtype of a device, and what a cast would lose."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")

COARSE = 0.01  # of a column's spread: a larger rounding error changes the density


def current_autocast(value: Tensor) -> torch.autocast:
    """A context manager that restores the current autocast of value's device."""
    device = value.device.type
    return torch.autocast(
        device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
    )


def with_current_autocast(function: Callable[P, R], value: Tensor) -> Callable[P, R]:
    """Wrap a function such that later calls run under the current autocast.

    Otherwise a backward pass that calls it would compute in another precision than the forward
    pass did.

    Args:
        function: The function.
        value: A tensor on the device whose autocast is meant.
    """
    if not torch.is_autocast_enabled(value.device.type):
        return function
    autocast = current_autocast(value)

    @wraps(function)
    def within(*args: P.args, **kwargs: P.kwargs) -> R:
        with autocast:
            return function(*args, **kwargs)

    return within


def no_autocast(value: Tensor) -> AbstractContextManager[object]:
    """A context manager without autocast on value's device, for invertible maps.

    Rounding in bfloat16 breaks invertibility, and the log-determinant would not be that of the map
    that is computed.
    """
    device = value.device.type
    if not torch.is_autocast_enabled(device):
        return nullcontext()  # 20× faster
    return torch.autocast(device, enabled=False)


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Inside, products and convolutions of float32 on a CUDA device are in TF32, or none is.

    TF32 keeps 10 bits of each factor's mantissa. PyTorch takes it for convolutions unless told,
    and not for matrix products.

    Args:
        allowed: Whether they are.
    """
    cudnn, products = torch.backends.cudnn, torch.get_float32_matmul_precision()
    convolutions = cudnn.flags(
        enabled=cudnn.enabled, benchmark=cudnn.benchmark, deterministic=cudnn.deterministic,
        benchmark_limit=cudnn.benchmark_limit or 0, allow_tf32=allowed,
    )  # fmt: skip
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    try:
        with convolutions:
            yield
    finally:
        torch.set_float32_matmul_precision(products)


def widest(device: torch.device) -> torch.dtype:
    """The floating dtype with the highest precision on a device."""
    return torch.float32 if device.type == "mps" else torch.float64


def collapsing(x: Tensor, dtype: torch.dtype) -> list[int]:
    """Indices of the columns of x whose values a cast to `dtype` would merge.

    These are the columns with an RMS rounding error above `COARSE` of the interquartile range (or
    of the standard deviation, if the quartiles are equal), over at most 10,000 rows.

    Args:
        x: Data, shape (N, *event).
        dtype: A floating dtype.

    >>> seconds = 1.7e9 + torch.arange(100, dtype=torch.float64)
    >>> collapsing(torch.stack([seconds, seconds - seconds[0]], 1), torch.float32)
    [0]
    """
    if torch.promote_types(x.dtype, dtype) == dtype:
        return []
    rows = x[:: max(1, len(x) // 10_000)].flatten(1)
    rows = rows[rows.isfinite().all(1)]
    if len(rows) < 2:
        return []
    error = (rows - rows.to(dtype)).square().mean(0).sqrt()
    low, high = (rows.kthvalue(max(1, round(q * len(rows))), 0).values for q in (0.25, 0.75))
    spread = torch.where(high > low, high - low, rows.std(0, correction=0))
    return (error > COARSE * spread).logical_and(spread > 0).nonzero().flatten().tolist()
