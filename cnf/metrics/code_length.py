"""Bits per dimension: the code length of whole numbers, such as pixels, under a flow."""

import math

import torch
from torch import Generator, Tensor

from cnf.errors import expect_counts
from cnf.flow import Flow, evaluating
from cnf.metrics.estimate import Estimate


@torch.no_grad()
def bits_per_dim(
    flow: Flow,
    x: Tensor,
    context: Tensor | None = None,
    *,
    draws: int = 1,
    chunk: int = 100,
    generator: Generator | None = None,
) -> Estimate:
    r"""Bits per dimension of held-out pictures, an upper bound that counts every term.

    .. math:: -\frac{1}{D \log 2} \log \frac1K \sum_{k=1}^K \frac{p(y_k)}{q(y_k|x)},
        \qquad y_k \sim q(\cdot|x)

    With one draw its mean is the variational bound; it falls to -log₂ P(x)/D as K grows. The
    density p is that of pixels in their own units, so that preprocessing and the number of levels
    are part of it. Source: Burda et al. (2016), https://arxiv.org/abs/1509.00519.

    Args:
        flow: A flow with a dequantization.
        x: Whole numbers, shape (N, *event).
        context: Condition, shape (N, C), or None.
        draws: K, noise drawn for each picture.
        chunk: Pictures evaluated at once.
        generator: Source of the draws; torch's default generator if None.

    Returns:
        The mean and its standard error over the pictures.

    Raises:
        TypeError: The flow has no dequantization: a density has no bits.
        ValueError: x holds other numbers than the dequantization's levels.
    """
    if flow.dequantization is None:
        raise TypeError(
            "bits_per_dim: expected a flow of whole numbers, got one without dequantization, "
            "whose density has no code length; build it with dequantization='uniform'"
        )
    expect_counts("bits_per_dim", draws=draws, chunk=chunk)
    found = []
    with evaluating(flow):
        for start in range(0, len(x), chunk):
            rows = x[start : start + chunk].to(flow.device)
            given = None if context is None else context[start : start + chunk].to(flow.device)
            weights = [flow.log_prob(rows, given, generator=generator) for _ in range(draws)]
            found.append(torch.stack(weights).double().logsumexp(0).cpu() - math.log(draws))
    return Estimate.of(-torch.cat(found) / (math.prod(flow.event_shape) * math.log(2)))
