"""Elementwise maps whose densities are mixtures: closed from data to base, roots back."""

import math
from abc import abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor

from cnf.precision import widest
from cnf.transforms.elementwise import MAPS, ElementwiseMap, Parameters
from cnf.transforms.roots import increasing_root

LEAST = -7.0  # log-scales: below, a component holds a single value
EDGE = 1e3  # beyond, z goes on with slope 1, where the squares of y could overflow
FAR = -30.0  # where five terms of log Φ's asymptotic series are exact in float64
HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)
EXACT = 40.0  # where log(1 + exp(x)) is x in float64


class _Mixture(ElementwiseMap):
    """z is as far up its own distribution as x is up a mixture of K shifted and scaled copies.

    Args:
        components: K.
    """

    deviation: float  # standard deviation of a copy of scale 1

    def __init__(self, components: int = 8) -> None:
        if components < 1:
            raise ValueError(f"{type(self).__name__}: expected components >= 1, got {components}")
        self.components, self.size = components, 3 * components
        self.narrow = math.log(0.5 + 0.5 / components)

    def __repr__(self) -> str:
        return f"{super().__repr__()} of {self.components} components"

    def parametrize(self, raw: Tensor) -> Parameters:
        """Log-weights, means and log-scales, each (K, *); zeros give nearly the identity."""
        logits, shifts, log_scales = raw.unflatten(0, (3, self.components)).unbind(0)
        start = self._start(raw.device).to(raw).reshape(-1, *[1] * (raw.dim() - 1))
        return (
            F.log_softmax(logits, 0),
            (start + shifts).clamp(-EDGE, EDGE),
            (self.narrow + log_scales).clamp(min=LEAST, max=-LEAST),
        )

    def _start(self, device: torch.device) -> Tensor:
        """Means of copies at quantiles, so narrow that together they are nearly the whole again.

        They are computed where they are used: a copy from the CPU cannot be part of a CUDA graph.
        """
        places = torch.arange(self.components, dtype=widest(device), device=device)
        places = torch.special.ndtri((places + 0.5) / self.components)
        spread = places.std(correction=0).clamp(min=1e-9)
        return places / spread * (self.deviation * math.sqrt(1 - math.exp(2 * self.narrow)))

    def forward(self, z: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        """The root x of the mixture's distribution; between the extremes of its components'."""
        _, means, log_scales = parameters
        edge = torch.full_like(z, EDGE)
        with torch.no_grad():
            low, high = (self._inside(x, *parameters)[0] for x in (-edge, edge))
        inside = z.clamp(low, high)
        each = (means + log_scales.exp() * inside).detach()
        x, log_slope = increasing_root(
            lambda x: self._inside(x, *parameters),
            inside,
            each.amin(0).clamp(-edge, edge),
            each.amax(0).clamp(-edge, edge),
        )
        return x + (z - inside), torch.where(inside == z, -log_slope, 0.0)

    def inverse(self, x: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        inside = x.clamp(-EDGE, EDGE)
        z, log_slope = self._inside(inside, *parameters)
        return z + (x - inside), torch.where(inside == x, log_slope, 0.0)

    def _inside(self, x: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        log_weights, means, log_scales = parameters
        y = (x - means) * (-log_scales).exp()
        sides = self._log_sides(y)
        log_density = (log_weights + self._log_density(y, *sides) - log_scales).logsumexp(0)
        below, above = ((log_weights + side).logsumexp(0) for side in sides)
        z = self._place(below, above)
        return z, log_density - self._log_density(z, below, above)

    @abstractmethod
    def _log_sides(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Log of the probability below y, and of that above."""

    @abstractmethod
    def _log_density(self, y: Tensor, below: Tensor, above: Tensor) -> Tensor:
        """Log-density at y, whose sides are known."""

    @abstractmethod
    def _place(self, below: Tensor, above: Tensor) -> Tensor:
        """The point with these log-probabilities below and above it."""


@MAPS.register("gaussian-mixture")
class MixtureOfGaussians(_Mixture):
    """Φ(z) = Σ w Φ((x - m)/s): with a normal base x is a mixture of Gaussians, given the others.

    Source: Papamakarios et al. (2017), MAF MoG, https://arxiv.org/abs/1705.07057.

    Args:
        components: K.
    """

    deviation = 1.0

    def _log_sides(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return _log_ndtr(y), _log_ndtr(-y)

    def _log_density(self, y: Tensor, below: Tensor, above: Tensor) -> Tensor:
        return -0.5 * y * y - HALF_LOG_2PI

    def _place(self, below: Tensor, above: Tensor) -> Tensor:
        """From the smaller side, which has all digits however far out it is."""
        lower = below < above
        log_share = torch.where(lower, below, above)
        z = _log_ndtri(log_share)
        return torch.where(lower, z, -z)


@MAPS.register("logistic-mixture")
class MixtureOfLogistics(_Mixture):
    """σ(z) = Σ w σ((x - m)/s), with heavier tails and cheaper than `MixtureOfGaussians`.

    Source: Ho et al. (2019), Flow++, https://arxiv.org/abs/1902.00275.

    Args:
        components: K.
    """

    deviation = math.pi / math.sqrt(3)

    def _log_sides(self, y: Tensor) -> tuple[Tensor, Tensor]:
        below = -F.softplus(-y, threshold=EXACT)  # the second derivative of logsigmoid has no vmap
        return below, below - y

    def _log_density(self, y: Tensor, below: Tensor, above: Tensor) -> Tensor:
        return below + above

    def _place(self, below: Tensor, above: Tensor) -> Tensor:
        return below - above


def _log_ndtr(z: Tensor) -> Tensor:
    """The log of Φ(z). Far below 0 torch's derivative of it is a difference of large numbers."""
    below = z.clamp(max=FAR)
    far = -0.5 * below * below - HALF_LOG_2PI - _log_slope_far(below)
    return torch.where(z < FAR, far, torch.special.log_ndtr(z.clamp(min=FAR)))


def _log_slope_far(z: Tensor) -> Tensor:
    """The log of φ(z)/Φ(z), which is the slope of log Φ, for z up to `FAR`."""
    r = z.square().reciprocal()
    return (-z).log() - (-r * (1 - 3 * r * (1 - 5 * r * (1 - 7 * r)))).log1p()


def _log_ndtri(log_share: Tensor) -> Tensor:
    """The z <= 0 with log Φ(z) = log_share, by Newton's method on log Φ, which is concave."""
    with torch.no_grad():
        fixed = log_share.detach()
        near = torch.special.ndtri(fixed.exp().clamp(min=1e-30))
        far = -(-2 * fixed - (-4 * math.pi * fixed).clamp(min=1).log()).clamp(min=0).sqrt()
        z = torch.where(fixed > -50, near, far)
        for _ in range(3):
            z = _newton_of_log_ndtr(z, fixed)
    for _ in range(2):  # with gradients of first and second order
        z = _newton_of_log_ndtr(z, log_share)
    return z


def _newton_of_log_ndtr(z: Tensor, log_share: Tensor) -> Tensor:
    log_ndtr, near = _log_ndtr(z), z.clamp(min=FAR)
    log_slope = -0.5 * near * near - HALF_LOG_2PI - torch.special.log_ndtr(near)
    log_slope = torch.where(z < FAR, _log_slope_far(z.clamp(max=FAR)), log_slope)
    return z - (log_ndtr - log_share) * (-log_slope).exp()
