"""Autocast: as it is now, for what runs again later; and off, for what needs its own precision."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P, R = ParamSpec("P"), TypeVar("R")


def current_autocast(value: Tensor) -> torch.autocast:
    """A context with autocast on value's device as it is now."""
    device = value.device.type
    return torch.autocast(
        device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
    )


def with_current_autocast(function: Callable[P, R], value: Tensor) -> Callable[P, R]:
    """The function, under autocast as it is now whenever it is called: a backward pass that calls
    it would else evaluate in another precision than the forward pass did."""
    if not torch.is_autocast_enabled(value.device.type):
        return function
    autocast = current_autocast(value)

    @wraps(function)
    def within(*args: P.args, **kwargs: P.kwargs) -> R:
        with autocast:
            return function(*args, **kwargs)

    return within


def no_autocast(value: Tensor) -> AbstractContextManager[object]:
    """A context without autocast on value's device: a product in bfloat16 would be no inverse of
    the other direction's, nor would its log-determinant be that of the map."""
    device = value.device.type
    if not torch.is_autocast_enabled(device):
        return nullcontext()  # a twentieth of the time
    return torch.autocast(device, enabled=False)
