"""Autocast: as it is now, for what runs again later; and off, for what needs its own precision."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def current_autocast(value: Tensor) -> torch.autocast:
    """A context with autocast on value's device as it is now."""
    device = value.device.type
    return torch.autocast(
        device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
    )


def no_autocast(value: Tensor) -> AbstractContextManager[object]:
    """A context without autocast on value's device: a product in bfloat16 would be no inverse of
    the other direction's, nor would its log-determinant be that of the map."""
    device = value.device.type
    if not torch.is_autocast_enabled(device):
        return nullcontext()  # a twentieth of the time
    return torch.autocast(device, enabled=False)
