"""Monotonic rational-quadratic splines as transformers of coupling and autoregressive layers.

Source: Durkan et al. (2019), Neural Spline Flows, https://arxiv.org/abs/1906.04032; on the circle
Rezende et al. (2020), https://arxiv.org/abs/2002.02428.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from cnf.transforms.elementwise import MAPS, ElementwiseMap, Parameters


@MAPS.register("spline")
class RationalQuadratic(ElementwiseMap):
    r"""A monotonic rational-quadratic spline on [-bound, bound], the identity outside.

    Between knots (z_k, x_k) and (z_{k+1}, x_{k+1}) with slopes d_k, d_{k+1}, width w, height h,
    mean slope s = h/w and ξ = (z - z_k)/w,

    .. math:: x = x_k + h\,\frac{s ξ^2 + d_k ξ(1-ξ)}{s + (d_k + d_{k+1} - 2s)\,ξ(1-ξ)}.

    The inverse is the root of a quadratic equation.

    Args:
        bins: Number of bins K, at least 1.
        bound: End of the interval [-bound, bound] of the spline, in units of z.
        least: Smallest width and height of a bin as a fraction of the interval, and smallest
            slope; the largest slope is about 1/least.
    """

    def __init__(self, bins: int = 8, bound: float = 5.0, least: float = 1e-3) -> None:
        self.curve = Curve(bins, bound, least)
        self.size = 3 * bins - 1

    def __repr__(self) -> str:
        return f"spline of {self.curve.bins} bins"

    def parametrize(self, raw: Tensor) -> Parameters:
        """Widths and heights, shape (2, K, *), by a softmax, slopes, (K + 1, *), by a softplus.

        The slopes at the ends are 1.
        """
        bins, ends = self.curve.bins, torch.ones_like(raw[:1])
        sizes, slopes = raw.split([2 * bins, bins - 1])
        return self.curve.sizes(sizes), torch.cat([ends, self.curve.slopes(slopes), ends])

    def forward(self, z: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        return self._apply_inside(self.curve.value, z, parameters)

    def inverse(self, x: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        return self._apply_inside(self.curve.root, x, parameters)

    def _apply_inside(
        self,
        direction: Callable[..., tuple[Tensor, Tensor]],
        value: Tensor,
        parameters: Parameters,
    ) -> tuple[Tensor, Tensor]:
        # Clamped, so that neither the unused branch nor its gradient is NaN outside.
        bound = self.curve.bound
        moved, log_slope = direction(value.clamp(-bound, bound), *parameters)
        inside = value.abs() < bound
        return torch.where(inside, moved, value), torch.where(inside, log_slope, 0.0)


@MAPS.register("circular-spline")
class CircularSpline(ElementwiseMap):
    """A rotation of the circle [-bound, bound), followed by a rational-quadratic spline on it.

    The spline has the same slope at both ends, so that the map of the circle is continuously
    differentiable. Inputs are taken modulo 2·bound, and results are on the circle.

    Args:
        bins: Number of bins K, at least 1.
        bound: Half of the circle's circumference.
        least: Smallest width, height and slope, as for `RationalQuadratic`.
    """

    def __init__(self, bins: int = 8, bound: float = math.pi, least: float = 1e-3) -> None:
        self.curve = Curve(bins, bound, least)
        self.size = 3 * bins + 1

    def __repr__(self) -> str:
        return f"circular spline of {self.curve.bins} bins"

    def parametrize(self, raw: Tensor) -> Parameters:
        """The rotation, shape (*), widths and heights, (2, K, *), and slopes, (K + 1, *)."""
        rotation, sizes, slopes = raw.split([1, 2 * self.curve.bins, self.curve.bins])
        slopes = self.curve.slopes(slopes)
        return rotation.squeeze(0), self.curve.sizes(sizes), torch.cat([slopes, slopes[:1]])

    def forward(self, z: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        rotation, *spline = parameters
        x, log_slope = self.curve.value(self._wrapped(z + rotation), *spline)
        return x.clamp(-self.curve.bound, self.curve.bound), log_slope  # rounding

    def inverse(self, x: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        rotation, *spline = parameters
        z, log_slope = self.curve.root(self._wrapped(x), *spline)
        return self._wrapped(z - rotation), log_slope

    def _wrapped(self, angle: Tensor) -> Tensor:
        bound = self.curve.bound
        return torch.remainder(angle + bound, 2 * bound) - bound


class Curve:
    """A rational-quadratic spline from [-bound, bound] onto itself."""

    def __init__(self, bins: int, bound: float, least: float) -> None:
        if bins < 1 or bound <= 0 or not 0 < least * bins < 1:
            raise ValueError(
                "spline: expected bins >= 1, bound > 0 and 0 < least < 1/bins, got "
                f"{bins}, {bound} and {least}"
            )
        self.bins, self.bound, self.least = bins, bound, least
        self.unit = math.log(math.expm1(1 - least))  # softplus(unit) + least = 1

    def sizes(self, raw: Tensor) -> Tensor:
        whole, least = 2 * self.bound, self.least
        part = torch.softmax(raw.unflatten(0, (2, self.bins)), 1)
        return torch.add(whole * least, part, alpha=whole * (1 - least * self.bins))

    def slopes(self, raw: Tensor) -> Tensor:
        # Clamped, as far from the data a network's outputs have squares that overflow.
        return self.least + F.softplus((raw + self.unit).clamp(max=1 / self.least))

    def value(self, z: Tensor, sizes: Tensor, slopes: Tensor) -> tuple[Tensor, Tensor]:
        (zk, xk), (w, h), d0, d1 = self._bin(z, sizes, slopes, along=0)
        s, xi = h / w, ((z - zk) / w).clamp(0, 1)  # rounding may put it outside of [0, 1]
        part, log_slope = _value_and_log_slope(xi, s, d0, d1)
        return torch.addcmul(xk, h, part), log_slope

    def root(self, x: Tensor, sizes: Tensor, slopes: Tensor) -> tuple[Tensor, Tensor]:
        (zk, xk), (w, h), d0, d1 = self._bin(x, sizes, slopes, along=1)
        s, y = h / w, ((x - xk) / h).clamp(0, 1)
        # The root of the quadratic and its discriminant, in forms without cancellation.
        rest, sy = 1 - y, s * y
        tilt = d0 * rest - d1 * y
        product = 4 * s * sy * rest
        rises = tilt >= 0
        size = torch.where(rises, tilt, -tilt)
        both = size + torch.addcmul(product, size, size).sqrt()
        both = torch.where(rises, both, product / both)  # tilt + √(tilt² + product)
        root = (2 * sy / (both + 2 * sy)).clamp(0, 1)
        return torch.addcmul(zk, w, root), -_value_and_log_slope(root, s, d0, d1)[1]

    def _bin(
        self, value: Tensor, sizes: Tensor, slopes: Tensor, along: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The bin of z (along=0) or x (along=1): its start and size, (2, *), and its slopes."""
        ends = sizes.cumsum(1)
        k = (value + self.bound >= ends[along, :-1]).sum(0, keepdim=True)
        both = k.expand(2, *k.shape)
        size = sizes.gather(1, both).squeeze(1)
        start = ends.gather(1, both).squeeze(1) - size - self.bound
        d0, d1 = slopes.gather(0, torch.cat([k, k + 1])).unbind(0)
        return start, size, d0, d1


def _value_and_log_slope(xi: Tensor, s: Tensor, d0: Tensor, d1: Tensor) -> tuple[Tensor, Tensor]:
    """(x - x_k)/h at ξ, and log dx/dz."""
    rest, square = 1 - xi, xi * xi
    both = xi * rest
    below = torch.addcmul(s, torch.sub(d0 + d1, s, alpha=2), both)
    slope = torch.addcmul(d1 * square, s, both, value=2)
    slope = torch.addcmul(slope, d0, rest * rest)
    ratio = s / below
    return torch.addcmul(s * square, d0, both) / below, (ratio * ratio * slope).log()
