"""The root behind the inverses of planar and Sylvester flows, with its derivatives."""

import torch
from torch import Tensor

STEPS = 8  # Newton's, from the start below; six reach float64's last digits


def tanh_root(s: Tensor, k: Tensor) -> Tensor:
    r"""The root u of u + k tanh u = s, where k > -1.

    For u > 0 the left side is concave where k > 0 and convex where k < 0: Newton's method is on
    one side of the root after its first step, and stays there. The start is so close that a fixed
    number of steps is enough, and no test of convergence makes a GPU wait. Two last steps are
    taken with gradients: the first gives the first derivative of the implicit function theorem,
    both together the second derivative.
    """
    with torch.no_grad():
        fixed_s, fixed_k = s.detach(), k.detach()  # no_grad does not stop forward mode
        size = fixed_s.abs()
        start = torch.where(fixed_k < 0, _above(size, fixed_k), _below(size, fixed_k))
        u = start.copysign(fixed_s)
        for _ in range(STEPS):
            u = _newton(u, fixed_s, fixed_k)
    for _ in range(2):
        u = _newton(u, s, k)
    return u


def _newton(u: Tensor, s: Tensor, k: Tensor) -> Tensor:
    tanh = torch.tanh(u)
    return u - (u + k * tanh - s) / (1 + k * (1 - tanh * tanh))


def _above(s: Tensor, k: Tensor) -> Tensor:
    """Near the root, where -1 < k < 0 and s >= 0.

    tanh u is below 1 and u, and, where u is small, below u - u³/6.
    """
    return torch.minimum(torch.minimum(s - k, s / (1 + k)), (6 * s).pow(1 / 3))


def _below(s: Tensor, k: Tensor) -> Tensor:
    """Below the root, where k >= 0 and s >= 0: k tanh u = s - u, and `above` is above u."""
    finfo = torch.finfo(s.dtype)
    ratio = (s / k.clamp(min=finfo.tiny)).clamp(max=1 - finfo.eps)
    above = torch.where(s < k, ratio.atanh(), s - k) + 0.5 * torch.log1p(4 * k) * (s >= k)
    above = torch.minimum(above, s)
    inside = ((s - above) / k.clamp(min=finfo.tiny)).clamp(0, 1 - finfo.eps)
    return torch.maximum(torch.maximum(s / (1 + k), s - k), inside.atanh())
