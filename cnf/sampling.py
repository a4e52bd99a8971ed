"""Sampling from continuous flows: step grids for few evaluations, guidance, SDEs.

A grid is an argument of `Solver`, so that sampling in few steps is
`flow.with_solver(Solver("heun2", grid=edm_grid(8))).sample(1000)`.
"""

import copy
from collections.abc import Callable, Sequence
from itertools import pairwise, product
from typing import Any

import torch
from torch import Tensor

from cnf.dynamics import numerical
from cnf.dynamics.solver import Solver
from cnf.errors import call_without_edits, expect_counts, expect_positive
from cnf.fields import Guided, WithScore, score
from cnf.fields.predicts import path_of
from cnf.fields.wrappers import wrapped
from cnf.flow import Flow, require_field
from cnf.matching.paths import PATHS, Path
from cnf.random import draw

Grid = tuple[float, ...]
MIN_STEP = 1e-5  # shortest step of a learned grid, in units of time


def edm_grid(
    steps: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0
) -> Grid:
    """The noise levels of EDM as times of the linear path, with short steps close to both ends.

    On the linear path the ratio of noise to data is σ = (1 - t)/t, so t = 1/(1 + σ). The first
    time is replaced by 0, and the last is 1.

    Source: Karras et al. (2022), https://arxiv.org/abs/2206.00364, eq. 5.

    Args:
        steps: Number of steps.
        sigma_min: The last noise level above zero.
        sigma_max: The first noise level.
        rho: Exponent, larger for shorter steps at low noise levels.

    Returns:
        The steps + 1 times, increasing from 0 to 1.

    Raises:
        ValueError: A number is not positive, or sigma_min is not below sigma_max.
    """
    expect_counts("edm_grid", steps=steps)
    expect_positive("edm_grid", sigma_min=sigma_min, sigma_max=sigma_max, rho=rho)
    if sigma_min >= sigma_max:
        raise ValueError(
            f"edm_grid: expected sigma_min < sigma_max, got {sigma_min} and {sigma_max}"
        )
    ends = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    parts = [k / max(1, steps - 1) for k in range(1, steps)]
    levels = [(ends[0] + part * (ends[1] - ends[0])) ** rho for part in parts]
    return (0.0, *(1 / (1 + level) for level in levels), 1.0)


@torch.no_grad()
def learned_grid(
    flow: Flow,
    steps: int,
    method: str = "euler",
    context: Tensor | None = None,
    *,
    points: int = 512,
    generator: torch.Generator | None = None,
) -> Grid:
    """Optimize a grid such that samples are close to those of the flow's own solver.

    It minimizes the mean distance between the two samples from the same base points, by pattern
    search from equal steps: the times are moved in turn while the distance decreases, by smaller
    and smaller amounts. It draws on the order of 100 times `points` samples.

    Source: Hooke & Jeeves (1961), https://doi.org/10.1145/321062.321069.

    Args:
        flow: A continuous flow.
        steps: Number of steps.
        method: A one-step method, such as "euler" or "heun2".
        context: Condition, shape (C,) or (points, C).
        points: Number of base samples.
        generator: Source of the base samples.

    Returns:
        The steps + 1 times, increasing from 0 to 1.

    Raises:
        TypeError: The flow is not continuous.
        ValueError: A number is not a whole one of at least 1.
    """
    require_field("learned_grid", flow)
    expect_counts("learned_grid", steps=steps, points=points)
    z = flow.base.sample((points,), generator)
    exact = flow.trajectory(z, (0.0, 1.0), context)[-1]  # without dequantization, which rounds

    def error(grid: Sequence[float]) -> float:
        few = flow.with_solver(Solver(method, grid=tuple(grid)))
        few = few.trajectory(z, (0.0, 1.0), context)[-1]
        return (few - exact).flatten(1).norm(dim=1).mean().item()

    return _searched(error, steps)


@torch.no_grad()
def likeliest_grid(
    flow: Flow,
    x: Tensor,
    steps: int,
    method: str = "rk4",
    explicit: str = "sample",
    context: Tensor | None = None,
) -> Grid:
    """Optimize a grid such that data are likely under the exact density of its steps.

    It maximizes the mean log-density of `Solver(method, grid=…, discrete=True, explicit=…)`, by
    pattern search from equal steps; a grid whose steps fold at fewer of the data is always better.
    It computes on the order of 100 densities of all data.

    With explicit="density" steps that fold count mass more than once, and the grid may gain by
    more of that: ask `cnf.check` whether the steps of the grid that was found are one to one.

    Source: Hooke & Jeeves (1961), https://doi.org/10.1145/321062.321069.

    Args:
        flow: A continuous flow.
        x: Data, shape (N, *event).
        steps: Number of steps.
        method: A one-step method, such as "rk4" or "midpoint".
        explicit: The direction that takes the steps as they are, see `Solver`; with "density" a
            grid takes some ten times less to score.
        context: Condition, shape (C,) or (N, C).

    Returns:
        The steps + 1 times, increasing from 0 to 1.

    Raises:
        TypeError: The flow is not continuous.
        ValueError: The number is not a whole one of at least 1.
    """
    require_field("likeliest_grid", flow)
    expect_counts("likeliest_grid", steps=steps)
    if not len(x):
        raise ValueError("likeliest_grid: expected one row of x or more, got 0")

    def error(grid: Sequence[float]) -> tuple[int, float]:
        few = flow.with_solver(Solver(method, grid=tuple(grid), discrete=True, explicit=explicit))
        with numerical.watched():
            log_prob = few.log_prob(x, context)
        has_density = log_prob[~log_prob.isnan()]
        return len(log_prob) - len(has_density), -has_density.mean().item()

    return _searched(error, steps)


def _searched(error: Callable[[Sequence[float]], Any], steps: int) -> Grid:
    """The grid of least error that pattern search finds from equal steps."""
    grid = [k / steps for k in range(steps + 1)]
    least, reach = error(grid), 0.5 / steps
    while steps > 1 and reach > 0.02 / steps:
        before = least
        for k, shift in product(range(1, steps), (reach, -reach)):
            trial = [*grid[:k], grid[k] + shift, *grid[k + 1 :]]
            if not grid[k - 1] + MIN_STEP < trial[k] < grid[k + 1] - MIN_STEP:
                continue
            found = error(trial)
            if found < least:
                grid, least = trial, found
        if least == before:
            reach /= 2
    return tuple(grid)


def guided(flow: Flow, weight: float, interval: tuple[float, float] = (0.0, 1.0)) -> Flow:
    """A flow with the same weights under classifier-free guidance; see `Guided`.

    Its samples and its density are those of the guided field.

    Args:
        flow: A continuous flow built with null_context=True.
        weight: Guidance weight; 1 is the conditional flow itself.
        interval: Times at which guidance is applied.

    Raises:
        TypeError: The flow is not continuous.
        ValueError: It was built without null_context=True, or the interval is not in [0, 1].
    """
    transform = copy.copy(require_field("guided", flow))
    field = Guided(transform.field, weight, interval)
    transform._modules = {**transform._modules, "field": field}
    return flow.with_transform(transform)


@torch.no_grad()
def sde(
    flow: Flow,
    sample_shape: int | Sequence[int] = (),
    context: Tensor | None = None,
    *,
    path: Any = "linear",
    steps: int = 100,
    noise: float = 1.0,
    diffusion: Callable[[Tensor], Tensor] | None = None,
    grid: Grid | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Sample from the SDE dx = (v + ½g²·∇log p_t) dt + g dW by the Euler-Maruyama method.

    For every g its marginals are those of the flow's ODE. The noise corrects errors of the
    velocity that the ODE would accumulate. The score is that of the field's own head, if there is
    one. Otherwise it is computed from the velocity, which requires a standard normal base and an
    independent coupling in training.

    Source: Song et al. (2021), https://arxiv.org/abs/2011.13456; Albergo et al. (2023),
    https://arxiv.org/abs/2303.08797.

    Args:
        flow: A continuous flow trained by flow matching.
        sample_shape: Shape of the batch of samples, as in `Flow.sample`.
        context: Condition, shape (C,) or one that broadcasts to (*sample_shape, C).
        path: The path of the training, unless the field has one.
        steps: Number of equal steps, unless a grid is given.
        noise: Scale of g² = 2·noise·σ_t, for which the drift is bounded; 0 is the ODE. It is
            ignored if `diffusion` is given.
        diffusion: g as a function of t.
        grid: Times of the steps, increasing from 0 to 1.
        generator: Source of all draws.

    Returns:
        Samples in data space, shape (*sample_shape, *event).

    Raises:
        TypeError: The flow is not continuous.
        ValueError: The noise is negative, or the grid does not increase from 0 to 1.
    """
    field = require_field("sde", flow).field
    path = path_of(field) or PATHS.build(path)
    head = any(isinstance(part, WithScore) for part in wrapped(field))
    if noise < 0:
        raise ValueError(f"sde: expected noise >= 0, got {noise}")
    expect_counts("sde", steps=steps)
    x, context = flow.draw_base(sample_shape, context, generator, "sde")
    times = tuple(k / steps for k in range(steps + 1)) if grid is None else tuple(grid)
    if times[:1] != (0,) or times[-1] != 1 or not all(a < b for a, b in pairwise(times)):
        raise ValueError(f"sde: expected a grid ascending from 0 to 1, got {times}")
    for start, stop in pairwise(times):
        t, h = x.new_tensor(start), stop - start
        g = _default_diffusion(head, path, t, noise) if diffusion is None else diffusion(t)

        def drift(t: Tensor = t, x: Tensor = x, g: Any = g) -> Tensor:
            return field(t, x, context) + 0.5 * g**2 * score(field, t, x, context, path)

        dw = draw(torch.randn, x.shape, generator, like=x)
        x = x + h * call_without_edits(field, drift, t=t, x=x, context=context) + h**0.5 * g * dw
    x, _ = flow.outside(x)
    return x if flow.dequantization is None else flow.dequantization.decode(x)


def _default_diffusion(head: bool, path: Path, t: Tensor, noise: float) -> Tensor:
    """The default g, for which ½g² times the score is bounded."""
    at = path.schedule(path.clipped(t))
    sigma = at.gamma if head else at.gaussian().sigma
    return (2 * noise * torch.as_tensor(sigma)).sqrt()


__all__ = ["Grid", "Solver", "edm_grid", "guided", "learned_grid", "likeliest_grid", "sde"]
