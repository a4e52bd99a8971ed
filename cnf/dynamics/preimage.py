"""Preimages under a map near the identity, by iteration, with the gradient of the solution."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from cnf.dynamics.fixed import transformed

NEWTON = 64  # largest D for which Newton's method is taken
NEWTON_ITERATIONS = 200  # at most; of a trained flow's rows 1 % take more than 40
ANDERSON_ITERATIONS = 50  # at most
SMALL = 1024  # rows of which all are taken along, as fewer are not faster
FEW = 3  # dimensions up to which tangents are so cheap that each step computes a Jacobian
QUICK = 0.1  # part of the error that a step leaves, up to which it keeps the Jacobian
SHORTEST = 2**-12  # part of Newton's step, below which a row is given up, as at a fold
HISTORY = 5  # earlier iterates that Anderson's method combines


class SmoothMap(Protocol):
    """A map Φ of points, shape (N, *event), of which each row depends on that row alone."""

    def __call__(self, x: Tensor) -> Tensor: ...

    def with_jacobian(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Φ(x) and the transposed Jacobian [n, j, i] = ∂Φ_i/∂x_j of each row, (N, D, D)."""
        ...

    def of_rows(self, rows: Tensor) -> "SmoothMap":
        """The map of some rows, by their indices."""
        ...


class Found(NamedTuple):
    """Where an iteration ended.

    Attributes:
        x: The iterate with the least error, shape (N, *event).
        error: The largest component of y - Φ(x), in units of 1 + the largest of y, shape (N,).
        jacobian: That of Φ at x, as of `SmoothMap`; None where none was needed.
    """

    x: Tensor
    error: Tensor
    jacobian: Tensor | None


def preimage(
    function: SmoothMap, y: Tensor, start: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The x with Φ(x) = y, shape (N, *event), whether none was found, (N,), and Φ's Jacobian.

    By Newton's method up to `NEWTON` dimensions, by Anderson's above, which needs no Jacobian.
    Where none was found, x is the best iterate, without a gradient. x is differentiable once in y
    and in all that Φ depends on, and twice under `torch.func`. Without gradients, the Jacobian may
    be one that was evaluated near x.

    Args:
        function: Φ.
        y: Points, shape (N, *event).
        start: Where the iteration begins, of y's shape.
    """
    with torch.no_grad():
        newton = y.flatten(1).shape[1] <= NEWTON
        x, error, jacobian = (_newton if newton else _anderson)(function, y, start)
        missed = ~(error <= torch.finfo(y.dtype).eps ** 0.75)
    left = y - function(x) if torch.is_grad_enabled() else y
    if not torch.is_grad_enabled() or not left.requires_grad:
        return x, missed, jacobian
    if jacobian is not None:  # by the derivative of a further iteration
        with torch.no_grad():
            _, jacobian = function.with_jacobian(x)
            lost = missed | ~_solved(jacobian, torch.ones_like(y)).flatten(1).isfinite().all(1)
            eye = torch.eye(jacobian.shape[-1], dtype=y.dtype, device=y.device)
            regular = torch.where(lost[:, None, None], eye, jacobian)
        found = x + _solved(regular, torch.where(per_row(lost, y), 0.0, left))
        if not transformed():
            return _Once.apply(found), missed, jacobian
        left = torch.where(per_row(lost, y), 0.0, y - function(found))
        return found + _solved(regular, left), missed, jacobian  # the second derivative, too
    return _ImplicitGradient.apply(x, left, function), missed, None  # pyright: ignore


def _newton(function: SmoothMap, y: Tensor, x: Tensor) -> Found:
    """Newton's method in each row, with shorter steps where the error would grow.

    In more than `FEW` dimensions a row keeps its Jacobian as long as each step leaves at most
    `QUICK` of its error: near a solution an evaluation then costs no tangents.
    """
    eps, few = torch.finfo(y.dtype).eps, y.flatten(1).shape[1] <= FEW
    x = x.clone()
    value, jacobian = function.with_jacobian(x)
    left = y - value
    error, length = _error(left, y), y.new_ones(len(y))
    settled = torch.zeros_like(error, dtype=torch.bool)
    fresh = ~settled  # whether the Jacobian is that at x
    for _ in range(NEWTON_ITERATIONS):
        rows, among = _rows_of((error > 4 * eps) & ~settled, function)
        if not len(rows):
            break
        trial = x[rows] + per_row(length[rows], y) * _solved(jacobian[rows], left[rows])
        value, slopes = among.with_jacobian(trial) if few else (among(trial), jacobian)
        misses = y[rows] - value
        errors = _error(misses, y[rows])
        better, quick = errors < error[rows], errors <= QUICK * error[rows]
        shorter = torch.where(fresh[rows], length[rows] / 4, 1.0)
        length[rows] = torch.where(better, (2 * length[rows]).clamp(max=1), shorter)
        x[rows] = torch.where(per_row(better, y), trial, x[rows])
        left[rows] = torch.where(per_row(better, y), misses, left[rows])
        if few:
            jacobian[rows] = torch.where(better[:, None, None], slopes, jacobian[rows])
        error[rows] = torch.where(better, errors, error[rows])
        rounding, stuck = error[rows] <= eps**0.75, length[rows] < SHORTEST
        settled[rows] = ~quick & (rounding | stuck)
        fresh[rows] &= ~better | few
        slow = torch.zeros_like(settled).index_fill(0, rows[~quick], True)
        stale, among = _rows_of(slow & ~fresh & ~settled & (error > 4 * eps), function)
        if len(stale):
            jacobian[stale], fresh[stale] = among.with_jacobian(x[stale])[1], True
    return Found(x, error, jacobian)


def _rows_of(wanted: Tensor, function: SmoothMap) -> tuple[Tensor, SmoothMap]:
    """The rows that are wanted, and the map of them; all rows where most are wanted, or all few.

    A map of all rows may be compiled, which one of any other number of rows is not.
    """
    rows = wanted.nonzero().squeeze(-1)
    if not len(rows) or 2 * len(rows) <= len(wanted) > SMALL:
        return rows, function.of_rows(rows)
    return torch.arange(len(wanted), device=wanted.device), function


def _anderson(function: Callable[[Tensor], Tensor], y: Tensor, x: Tensor) -> Found:
    """The fixed point of x → x + y - Φ(x), by Anderson's method in each row.

    Source: Walker & Ni (2011), https://doi.org/10.1137/10078356X.
    """
    enough = 4 * torch.finfo(y.dtype).eps
    best, least = x, y.new_full((len(y),), math.inf)
    points: list[Tensor] = []
    moves: list[Tensor] = []
    for _ in range(ANDERSON_ITERATIONS):
        move = y - function(x)
        error = _error(move, y)
        better = error < least
        best, least = torch.where(per_row(better, y), x, best), torch.where(better, error, least)
        if not (least > enough).any():
            break
        points, moves = [*points[-HISTORY:], x], [*moves[-HISTORY:], move]
        x = _mixed(points, moves)
    return Found(best, least, None)


def _mixed(points: Sequence[Tensor], moves: Sequence[Tensor]) -> Tensor:
    """The next iterate: a step from that combination of the last points whose move is least."""
    x, move = points[-1], moves[-1]
    if len(points) == 1:
        return x + move
    shifts, changes = (  # (N, D, m)
        torch.stack([(b - a).flatten(1) for a, b in pairwise(values)], -1)
        for values in (points, moves)
    )
    gram = changes.mT @ changes
    ridge = torch.finfo(x.dtype).eps * gram.diagonal(dim1=1, dim2=2)
    tiny = torch.finfo(x.dtype).tiny
    weights, _ = torch.linalg.solve_ex(
        gram + torch.diag_embed(ridge + tiny), changes.mT @ move.flatten(1).unsqueeze(-1)
    )
    return x + move - ((shifts + changes) @ weights).reshape(x.shape)


def _refuse_second_derivatives() -> None:
    if torch.is_grad_enabled():  # in a backward pass: it is to have a graph
        raise RuntimeError(
            "Continuous: the direction that inverts the steps of a discrete solver is "
            "differentiable once, and create_graph=True asks for more; take the other explicit=…, "
            "or torch.func.hessian, in up to 64 dimensions"
        )


class _Once(torch.autograd.Function):
    """The identity, whose derivative has none."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        _refuse_second_derivatives()
        return cotangent


class _ImplicitGradient(torch.autograd.Function):
    """x, whose derivative in y - Φ(x) is the inverse Jacobian, by fixed points of products.

    A row whose fixed point is not found has a gradient of NaN.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, left: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.function = function
        return x.clone()

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[None, Tensor, None]:
        _refuse_second_derivatives()
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            value = ctx.function(x)

        def pulled(g: Tensor) -> Tensor:
            return torch.autograd.grad(value, x, g, retain_graph=True)[0]

        found = _anderson(pulled, cotangent, cotangent)
        missed = ~(found.error <= torch.finfo(x.dtype).eps ** 0.5)
        return None, found.x.masked_fill(per_row(missed, x), math.nan), None


def _solved(jacobian: Tensor, right: Tensor) -> Tensor:
    """The δ of which the Jacobian makes `right`, shape (N, *event)."""
    flat = right.flatten(1)
    if flat.shape[1] == 1:
        return right / jacobian.reshape(right.shape)
    if flat.shape[1] == 2:  # ten times as fast as a solver of many small systems
        (a, c), (b, d) = (column.unbind(-1) for column in jacobian.unbind(1))
        u, v = flat.unbind(-1)
        found = torch.stack([d * u - b * v, a * v - c * u], -1) / (a * d - b * c).unsqueeze(-1)
    else:
        found = torch.linalg.solve_ex(jacobian.mT, flat.unsqueeze(-1))[0]
    return found.reshape(right.shape)


def _error(left: Tensor, y: Tensor) -> Tensor:
    return left.flatten(1).abs().amax(1) / (1 + y.flatten(1).abs().amax(1))


def per_row(values: Tensor, like: Tensor) -> Tensor:
    """Values of each row, in a shape that broadcasts over the event of `like`."""
    return values.reshape(-1, *[1] * (like.dim() - 1))
