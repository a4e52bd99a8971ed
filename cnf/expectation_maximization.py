"""Mixtures of normals with full covariances, fitted by expectation maximization."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from cnf.random import device_of

BYTES = 2**24  # of an intermediate tensor: more do not fit a processor's cache


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
    components, dim = means.shape
    unit = torch.eye(dim, dtype=factors.dtype, device=factors.device)
    inverses = torch.linalg.solve_triangular(factors, unit.expand_as(factors), upper=False)
    centers = (inverses @ means.unsqueeze(-1)).squeeze(-1)
    few = max(1, BYTES // (components * dim * x.element_size()))
    squares = [
        (rows @ inverses.flatten(0, 1).T).unflatten(1, centers.shape).sub(centers).square().sum(-1)
        for rows in x.split(few)
    ]
    log_volume = factors.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    constant = weights.log() - log_volume - 0.5 * dim * math.log(2 * math.pi)
    return constant - 0.5 * torch.cat(squares)


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
    begins again. In coordinates in which all data are white, a component's log-density is linear
    in the products of pairs of them, so that a step is two products of large matrices.

    Source: Cappé and Moulines (2009), On-line expectation-maximization algorithm,
    https://doi.org/10.1111/j.1467-9868.2009.00698.x.

    Args:
        x: Rows, shape (N, D), N above D.
        components: K.
        steps: Batches in all.
        batch_size: Rows of each, all if there are fewer.
        ridge: Part of the covariance of all data that is added to each covariance.
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
    whole = torch.cov(x.T).reshape(dim, dim)
    variances = whole.diagonal()
    variances = torch.where(variances > 0, variances, 1.0)
    factor = torch.linalg.cholesky(whole + ridge * variances.diag())
    white = torch.linalg.solve_triangular(factor, (x - shift).T, upper=False)
    white = white.T.contiguous()
    order = _shuffled(x, generator)
    weights = x.new_full((components,), 1 / components)
    unit = torch.eye(dim, dtype=x.dtype, device=x.device)
    mixture = Mixture(weights, white[order[:components]], unit.expand(components, -1, -1))
    statistics: Tensor | None = None
    place, size = 0, min(batch_size, rows)
    for step in range(steps):
        if place + size > rows:
            order, place = _shuffled(x, generator), 0
        batch = white[order[place : place + size]]
        place += size
        found = _statistics(batch, mixture)
        rate = (step + 1) ** -0.7 if size < rows else 1.0
        statistics = found if statistics is None else torch.lerp(statistics, found, rate)
        mixture = _maximized(_without_lost(statistics, batch), ridge)
    return Mixture(mixture.weights, mixture.means @ factor.T + shift, factor @ mixture.factors)


def _shuffled(x: Tensor, generator: torch.Generator | None) -> Tensor:
    where = device_of(generator, x)
    return torch.randperm(len(x), generator=generator, device=where).to(x.device)


def _products(x: Tensor) -> Tensor:
    """1, the coordinates and their products, each pair once, shape (1 + D + D(D + 1)/2, N)."""
    columns = x.T.contiguous()
    pairs = (column * columns[i:] for i, column in enumerate(columns))
    return torch.cat([torch.ones_like(columns[:1]), columns, *pairs])


def _matrices(products: Tensor, dim: int) -> Tensor:
    """Symmetric matrices from their upper triangles, (K, D(D + 1)/2) to (K, D, D)."""
    first, second = torch.triu_indices(dim, dim, device=products.device)
    found = products.new_empty(len(products), dim, dim)
    found[:, first, second] = products
    found[:, second, first] = products
    return found


def _coefficients(mixture: Mixture) -> Tensor:
    """Of the `_products` in log of weight times density of each component, shape (K, …)."""
    weights, means, factors = mixture
    dim = means.shape[1]
    precision = torch.cholesky_inverse(factors)
    linear = (precision @ means.unsqueeze(-1)).squeeze(-1)
    log_volume = factors.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    square = (linear * means).sum(-1)
    constant = weights.log() - log_volume - 0.5 * (square + dim * math.log(2 * math.pi))
    first, second = torch.triu_indices(dim, dim, device=means.device)
    pairs = -precision[:, first, second] * torch.where(first == second, 0.5, 1.0).to(means)
    return torch.cat([constant[:, None], linear, pairs], 1)


def _statistics(x: Tensor, mixture: Mixture) -> Tensor:
    """Means over rows of each component's share times the `_products`, shape (K, …)."""
    coefficients = _coefficients(mixture)
    found = torch.zeros_like(coefficients)
    few = max(1, BYTES // (coefficients.shape[1] * x.element_size()))
    for rows in x.split(few):
        products = _products(rows)
        found.addmm_((coefficients @ products).softmax(0), products.T)
    return found / len(x)


def _without_lost(statistics: Tensor, batch: Tensor) -> Tensor:
    """The statistics, where components of few rows begin again at rows of the batch."""
    components = len(statistics)
    lost = (statistics[:, 0] < 0.01 / components).nonzero().flatten()
    starts = batch[torch.arange(len(lost), device=batch.device) % len(batch)]
    again = _products(starts).T
    dim = batch.shape[1]
    first, second = torch.triu_indices(dim, dim, device=batch.device)
    again[:, 1 + dim :] += (first == second).to(batch)  # the covariance of all, which is one
    statistics[lost] = again / components
    return statistics


def _maximized(statistics: Tensor, ridge: float) -> Mixture:
    """The mixture of these statistics."""
    mass = statistics[:, :1]
    dim = (math.isqrt(8 * statistics.shape[1] + 1) - 3) // 2  # (1 + D)(2 + D)/2 products
    means = statistics[:, 1 : 1 + dim] / mass
    second = _matrices(statistics[:, 1 + dim :] / mass, dim)
    unit = torch.eye(dim, dtype=means.dtype, device=means.device)
    covariances = second - means.unsqueeze(2) * means.unsqueeze(1) + ridge * unit
    weights = mass.flatten() / mass.sum()
    return Mixture(weights, means, torch.linalg.cholesky(covariances))
