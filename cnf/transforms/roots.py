"""Roots behind the inverses of planar flows, Sylvester flows and mixtures, with derivatives."""

from collections.abc import Callable

import torch
from torch import Tensor

STEPS = 8  # of Newton's method; six suffice for full precision in float64


def tanh_root(s: Tensor, k: Tensor) -> Tensor:
    r"""The root u of u + k tanh u = s, where k > -1.

    For u > 0 the left side is concave if k > 0 and convex if k < 0. Therefore Newton's method is
    on one side of the root after its first step, and converges monotonically. The initial guess is
    close enough for a fixed number of steps, so that no test of convergence synchronizes with a
    GPU. Two more steps are taken with gradients: by the implicit function theorem the first one
    has the correct first derivative, and both together the second derivative.
    """
    with torch.no_grad():
        fixed_s, fixed_k = s.detach(), k.detach()  # no_grad has no effect on forward mode
        size = fixed_s.abs()
        start = torch.where(
            fixed_k < 0, _guess_for_negative_k(size, fixed_k), _lower_bound(size, fixed_k)
        )
        u = start.copysign(fixed_s)
        for _ in range(STEPS):
            u = _newton_step(u, fixed_s, fixed_k)
    for _ in range(2):
        u = _newton_step(u, s, k)
    return u


def _newton_step(u: Tensor, s: Tensor, k: Tensor) -> Tensor:
    tanh = torch.tanh(u)
    return u - (u + k * tanh - s) / (1 + k * (1 - tanh * tanh))


def _guess_for_negative_k(s: Tensor, k: Tensor) -> Tensor:
    """An initial guess for -1 < k < 0 and s >= 0.

    It follows from the bounds tanh u <= 1 and tanh u <= u, and from tanh u < u - u³/6 for small u.
    """
    return torch.minimum(torch.minimum(s - k, s / (1 + k)), (6 * s).pow(1 / 3))


def _lower_bound(s: Tensor, k: Tensor) -> Tensor:
    """A lower bound of the root for k, s >= 0, from an upper bound and k tanh u = s - u."""
    finfo = torch.finfo(s.dtype)
    ratio = (s / k.clamp(min=finfo.tiny)).clamp(max=1 - finfo.eps)
    upper = torch.where(s < k, ratio.atanh(), s - k) + 0.5 * torch.log1p(4 * k) * (s >= k)
    upper = torch.minimum(upper, s)
    inside = ((s - upper) / k.clamp(min=finfo.tiny)).clamp(0, 1 - finfo.eps)
    return torch.maximum(torch.maximum(s / (1 + k), s - k), inside.atanh())


def increasing_root(
    function: Callable[[Tensor], tuple[Tensor, Tensor]], target: Tensor, low: Tensor, high: Tensor
) -> tuple[Tensor, Tensor]:
    """The root u of f(u) = target in [low, high], and log f'(u), for an increasing f.

    Halving the interval loses no root, whatever f does in between; Newton's steps finish it, and
    the last, taken with gradients, gives the derivatives of the implicit function theorem.

    Args:
        function: u ↦ f(u) and log f'(u), shape (*).
        target: Values of f, shape (*).
        low: A number below or at each root.
        high: A number above or at each root.
    """
    with torch.no_grad():
        bits = 12 if target.dtype == torch.float32 else 24  # Newton doubles the right digits
        least, most = low.detach().clone(), high.detach().clone()
        for _ in range(bits):
            middle = 0.5 * (least + most)
            below = function(middle)[0] < target
            least, most = torch.where(below, middle, least), torch.where(below, most, middle)
        u = 0.5 * (least + most)
        for _ in range(3):
            value, log_slope = function(u)
            value = u - (value - target) * (-log_slope).exp()
            u = torch.where(value.isfinite(), value, u).clamp(min=least).clamp(max=most)
    value, log_slope = function(u)
    # In a gap of a mixture the slope is next to nothing, and the interval knows better.
    step = (value - target) * (-log_slope.detach()).clamp(max=30).exp()
    u = u - step.clamp(least - most, most - least)
    return u, function(u)[1]
