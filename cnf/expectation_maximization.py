"""Mixtures of normals with full covariances, fitted by expectation maximization."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

BYTES = 2**27  # of the largest intermediate tensor


class Mixture(NamedTuple):
    """Parameters of a mixture of K normals.

    Args:
        weights: Shape (K,), which sum to 1.
        means: Shape (K, D).
        factors: Cholesky factors of the covariances, shape (K, D, D).
    """

    weights: Tensor
    means: Tensor
    factors: Tensor


def log_densities(x: Tensor, mixture: Mixture) -> Tensor:
    """Log of weight times density of each component, shape (N, K).

    Args:
        x: Rows, shape (N, D).
        mixture: The mixture.
    """
    weights, means, factors = mixture
    dim = x.shape[1]
    unit = torch.eye(dim, dtype=factors.dtype, device=factors.device)
    inverses = torch.linalg.solve_triangular(factors, unit.expand_as(factors), upper=False)
    few = max(1, BYTES // max(1, x.numel() * x.element_size()))
    squares = [
        (torch.einsum("kij,nj->nki", part, x) - (part @ mean.unsqueeze(-1)).squeeze(-1))
        .square()
        .sum(-1)
        for part, mean in zip(inverses.split(few), means.split(few), strict=True)
    ]
    log_volume = factors.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    constant = weights.log() - log_volume - 0.5 * dim * math.log(2 * math.pi)
    return constant - 0.5 * torch.cat(squares, -1)


@torch.no_grad()
def fitted_mixture(
    x: Tensor,
    components: int,
    *,
    steps: int = 200,
    batch_size: int = 10_000,
    ridge: float = 1e-4,
    generator: torch.Generator | None = None,
) -> Mixture:
    r"""Fit a mixture by stepwise EM, whose sufficient statistics are running means over batches.

    .. math:: s \leftarrow (1 - \eta_t) s + \eta_t \hat s_t, \qquad \eta_t = (t + 1)^{-0.7}

    It begins at rows of the data with the covariance of all; a component that loses its rows
    begins again. Source: Cappé and Moulines (2009), On-line expectation-maximization algorithm,
    https://doi.org/10.1111/j.1467-9868.2009.00698.x.

    Args:
        x: Rows, shape (N, D), N above D.
        components: K.
        steps: Batches in all.
        batch_size: Rows of each, all if there are fewer.
        ridge: Added to each covariance's diagonal, in units of the mean variance of the data.
        generator: Source of the starts and of the batches' order.

    Raises:
        ValueError: There are too few rows.
    """
    rows, dim = x.shape
    if not components <= rows > dim:
        raise ValueError(
            f"GaussianMixture.fit: expected more rows than the {dim} columns, and at least one "
            f"for each of {components} components, got {rows}"
        )
    shift = x.mean(0)
    centered = x - shift
    whole = torch.cov(centered.T).reshape(dim, dim)
    whole += ridge * whole.diagonal().mean() * torch.eye(dim, dtype=x.dtype, device=x.device)
    order = _shuffled(rows, generator, x.device)
    starts = centered[order[:components]]
    mixture = Mixture(
        torch.full((components,), 1 / components, dtype=x.dtype, device=x.device),
        starts,
        torch.linalg.cholesky(whole).repeat(components, 1, 1),
    )
    statistics: tuple[Tensor, ...] | None = None
    place, size = 0, min(batch_size, rows)
    for step in range(steps):
        if place + size > rows:
            order, place = _shuffled(rows, generator, x.device), 0
        batch = centered[order[place : place + size]]
        place += size
        found = _statistics(batch, mixture)
        rate = (step + 1) ** -0.7 if size < rows else 1.0
        if statistics is not None:
            pairs = zip(statistics, found, strict=True)
            found = tuple(torch.lerp(old, new, rate) for old, new in pairs)
        statistics = found
        mixture, statistics = _maximized(statistics, whole, ridge, batch)
    return Mixture(mixture.weights, mixture.means + shift, mixture.factors)


def _shuffled(n: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
    own = generator.device if generator is not None else device
    return torch.randperm(n, generator=generator, device=own).to(device)


def _statistics(x: Tensor, mixture: Mixture) -> tuple[Tensor, Tensor, Tensor]:
    """Means over rows of each component's share, of share·x and of share·x·xᵀ."""
    share = log_densities(x, mixture).softmax(1) / len(x)
    second = torch.stack([(x * part[:, None]).T @ x for part in share.T])
    return share.sum(0), share.T @ x, second


def _maximized(
    statistics: tuple[Tensor, ...], whole: Tensor, ridge: float, batch: Tensor
) -> tuple[Mixture, tuple[Tensor, ...]]:
    """The mixture of these statistics; components of few rows begin again at rows of the batch."""
    mass, first, second = statistics
    components, dim = first.shape
    lost = (mass < 0.01 / components).nonzero().flatten()
    for row, k in enumerate(lost.tolist()):
        start = batch[row % len(batch)]
        mass[k] = 1 / components
        first[k] = start / components
        second[k] = (whole + torch.outer(start, start)) / components
    means = first / mass[:, None]
    covariances = second / mass[:, None, None] - means.unsqueeze(2) * means.unsqueeze(1)
    unit = torch.eye(dim, dtype=batch.dtype, device=batch.device)
    covariances += ridge * whole.diagonal().mean() * unit
    return (
        Mixture(mass / mass.sum(), means, torch.linalg.cholesky(covariances)),
        (mass, first, second),
    )
