"""The pinwheel: normal arms under a twist, with the density by change of variables."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from cnf.data.density import Toy, cells, choice, grouped_logsumexp, normal

ARMS, RATE, SCALE = 5, 0.25, 2.0
MEAN, LENGTH, WIDTH = 1.0, 0.3, 0.1  # along an arm: a ~ N(1, .3²); across it: b ~ N(0, .1²)
TURN = 2 * math.pi / ARMS


class Pinwheel(Toy):
    r"""Five normal arms :math:`(a, b) \sim N(1, 0.3^2) \times N(0, 0.1^2)`, twisted and doubled.

    .. math:: x = 2\,(a\cos\varphi + b\sin\varphi,\; -a\sin\varphi + b\cos\varphi), \qquad
              \varphi = 2\pi k/5 + e^a/4, \qquad
              p(x) = \frac15 \sum_{(a, b, k)\,\mapsto\, x} \frac{p(a)\,p(b)}{4\,|1 + e^a b/4|}

    In polar coordinates :math:`x/2 = r(\cos\theta, \sin\theta)` and with
    :math:`\psi = \theta + \varphi`, a preimage is :math:`a = r\cos\psi,\; b = r\sin\psi`. The
    preimages on all arms are the angles at which :math:`h(\psi) = \psi - \theta -
    e^{r\cos\psi}/4` is a multiple of :math:`2\pi/5`. As h has at most two turning points, the
    roots are bracketed on its monotone pieces, and none is missed. The gradient follows from the
    implicit function theorem.

    Beyond radius 10, where the log-density is below -85, the value is that of a point on the axis
    of an arm: the number of preimages, whose densities are negligible, increases without bound.

    Source: the pinwheel of Johnson et al. (2016), https://arxiv.org/abs/1603.06277, with the
    constants of Grathwohl et al. (2019), FFJORD, https://arxiv.org/abs/1810.01367.

    Args:
        name: Name of the density.
    """

    def __init__(self, name: str = "pinwheel") -> None:
        edge = SCALE * (MEAN + 5 * LENGTH)
        side = cells(
            2 * edge, SCALE * WIDTH / 2
        )  # half: the twist shears the arms and makes them thinner
        super().__init__(name, (-edge, -edge), (edge, edge), (side, side))

    def _draw(self, n: int, generator: torch.Generator | None) -> Tensor:
        a = MEAN + LENGTH * normal(n, generator=generator)
        b = WIDTH * normal(n, generator=generator)
        turn = TURN * choice(ARMS, n, generator).double()
        return twist(a, b, turn)

    def _log_density(self, x: Tensor) -> Tensor:
        y = x / SCALE
        r = torch.linalg.vector_norm(y, dim=-1)
        value = log_prior(r, torch.zeros_like(r)) - math.log(SCALE**2 * ARMS)
        near = (r <= 5).nonzero().flatten()
        with torch.no_grad():
            point, a, turn = preimages(y[near])
        y = y[near][point]
        # A Newton step at the root leaves its value and carries the gradient of a(x).
        angle = turn + RATE * a.exp()
        residual = a - rotate(y, angle)[0]
        slope = 1 + RATE * a.exp() * rotate(y, angle)[1]
        a = a - residual / slope.detach()
        b = rotate(y, turn + RATE * a.exp())[1]
        determinant = SCALE**2 * (1 + RATE * a.exp() * b)
        terms = log_prior(a, b) - determinant.abs().log() - math.log(ARMS)
        return value.index_copy(0, near, grouped_logsumexp(terms, point, len(near)))


def twist(a: Tensor, b: Tensor, turn: Tensor) -> Tensor:
    """Map (a, b) on the arm at angle `turn` to a point of the pinwheel, shape (*batch, 2).

    Args:
        a: Coordinate along the arm, shape (*batch,).
        b: Coordinate across the arm, shape (*batch,).
        turn: The arm's angle before the twist, shape (*batch,).
    """
    angle = turn + RATE * a.exp()
    x = a * angle.cos() + b * angle.sin(), b * angle.cos() - a * angle.sin()
    return SCALE * torch.stack(x, -1)


def rotate(y: Tensor, angle: Tensor) -> tuple[Tensor, Tensor]:
    """Coordinates (a, b) of points y, shape (*batch, 2), along and across a direction `angle`."""
    cos, sin = angle.cos(), angle.sin()
    return y[..., 0] * cos - y[..., 1] * sin, y[..., 0] * sin + y[..., 1] * cos


def log_prior(a: Tensor, b: Tensor) -> Tensor:
    """Log-density in nats of an arm before the twist, at coordinates a along and b across it."""
    exponent = ((a - MEAN) / LENGTH).square() + (b / WIDTH).square()
    return -exponent / 2 - math.log(2 * math.pi * LENGTH * WIDTH)


def preimages(y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The row, a and turn of every preimage of the rows of y = x/2, shape (N, 2)."""
    r, theta = torch.linalg.vector_norm(y, dim=-1), torch.atan2(y[:, 1], y[:, 0])
    knots = monotone_pieces(r)  # (N, 4)
    steps = ((knots - theta[:, None] - RATE * (r[:, None] * knots.cos()).exp()) / TURN).floor()
    first = torch.minimum(steps[:, :-1], steps[:, 1:]).flatten()
    count = (
        (steps[:, 1:] - steps[:, :-1]).abs().long().flatten()
    )  # multiples of 2π/5 inside each piece
    piece = torch.arange(len(count), device=y.device).repeat_interleave(count)
    within = torch.arange(len(piece), device=y.device) - (count.cumsum(0) - count)[piece]
    level, point = TURN * (first[piece] + 1 + within), piece // (knots.shape[-1] - 1)
    target, radius = level + theta[point], r[point]

    def gap(psi: Tensor) -> Tensor:
        return psi - RATE * (radius * psi.cos()).exp() - target

    psi = bisect(gap, knots[:, :-1].flatten()[piece], knots[:, 1:].flatten()[piece])
    return point, radius * psi.cos(), level


def monotone_pieces(r: Tensor) -> Tensor:
    r"""Ends, shape (N, 4), of the intervals of [-π, π] on which h increases, decreases, increases.

    The slope of h is zero where :math:`q(\tau) = r\sin\tau\,e^{r\cos\tau} = 4`, for
    :math:`\tau = -\psi > 0`; q increases to its maximum and decreases. If the maximum is below 4
    there is no turning point, and the middle interval is empty.
    """
    top = torch.acos(2 * r / (1 + (1 + 4 * r.square()).sqrt()))

    def excess(tau: Tensor) -> Tensor:
        return r * tau.sin() * (r * tau.cos()).exp() - 1 / RATE

    turns = excess(top) > 0
    early = bisect(excess, torch.where(turns, 0.0, top), top)
    late = bisect(excess, top, torch.where(turns, math.pi, top))
    ends = torch.full_like(r, math.pi)
    return torch.stack([-ends, -late, -early, ends], -1)


def bisect(f: Callable[[Tensor], Tensor], low: Tensor, high: Tensor) -> Tensor:
    """The root of f, monotone on each bracket, by bisection down to the precision of float64.

    Args:
        f: Function of a tensor, elementwise.
        low: Lower ends of the brackets, shape (N,).
        high: Upper ends, shape (N,).
    """
    side = f(low) > 0
    for _ in range(54):
        middle = (low + high) / 2
        stays = (f(middle) > 0) == side
        low, high = torch.where(stays, middle, low), torch.where(stays, high, middle)
    return (low + high) / 2
