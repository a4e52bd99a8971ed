"""Roots of increasing functions, differentiable in what the functions depend on."""

from collections.abc import Callable

import torch
from torch import Tensor

MOST = 100  # iterations; bisection alone would need 60 in float64


def increasing_root(
    function: Callable[[Tensor], tuple[Tensor, Tensor]], low: Tensor, high: Tensor
) -> Tensor:
    """y in [low, high] where each element's function is zero.

    Newton's method, with a bisection wherever its step is more than half of the last but one,
    so that it cannot go in circles. Two last Newton steps are taken with gradients: the first has
    the first derivative of the implicit function theorem, the second the second, too.

    Args:
        function: y → its value, in units of y, and its slope, which must be positive.
        low: Where the value is not positive.
        high: Where it is not negative.
    """
    with torch.no_grad():
        low, high = low.detach(), high.detach()
        y, last, before = (low + high) / 2, high - low, high - low
        for _ in range(MOST):
            value, slope = function(y)
            small = 4 * torch.finfo(y.dtype).eps * (1 + y.abs())
            low, high = torch.where(value <= 0, y, low), torch.where(value >= 0, y, high)
            newton = (y - value / slope).clamp(low, high)
            found = torch.minimum(value.abs(), (newton - y).abs()) <= small
            if found.all():
                break
            fast = found | (2 * (newton - y).abs() <= before)
            nearer = torch.where(fast, newton, (low + high) / 2)
            y, last, before = nearer, (nearer - y).abs(), last
    for _ in range(2 if torch.is_grad_enabled() else 1):
        value, slope = function(y)
        y = y - value / slope
    return y
