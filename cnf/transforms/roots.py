"""Roots of increasing functions, differentiable in what the functions depend on."""

from collections.abc import Callable

import torch
from torch import Tensor

MOST = 100  # iterations; bisection alone would need 60 in float64


def increasing_root(
    function: Callable[[Tensor], tuple[Tensor, Tensor]], low: Tensor, high: Tensor
) -> Tensor:
    """y in [low, high] where each element's function is zero.

    Newton's method, with a bisection wherever it would leave the bracket. A last Newton step is
    taken with gradients, whose derivative is that of the implicit function theorem.

    Args:
        function: y → its value and its slope, which must be positive.
        low: Where the value is not positive.
        high: Where it is not negative.
    """
    with torch.no_grad():
        low, high = low.detach(), high.detach()
        y, tolerance = (low + high) / 2, 4 * torch.finfo(low.dtype).eps
        for _ in range(MOST):
            value, slope = function(y)
            low, high = torch.where(value <= 0, y, low), torch.where(value >= 0, y, high)
            newton, before = y - value / slope, y
            y = torch.where((newton >= low) & (newton <= high), newton, (low + high) / 2)
            if ((y - before).abs() <= tolerance * (1 + y.abs())).all():
                break
    value, slope = function(y)
    return y - value / slope
