"""The evidence of a density that is known up to a factor, by importance sampling with a flow."""

import math
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor

from cnf.errors import expect_counts, warn
from cnf.flow import Flow, evaluating
from cnf.objectives.base import as_flow
from cnf.objectives.target import log_densities

CHUNK = 10_000  # draws at once
DOMINANT = 0.1  # share of all weight that one draw may have


class LogEvidence(NamedTuple):
    """An estimate of log Z = log ∫ p(x) dx.

    Attributes:
        value: In nats, of the shape of the context's batch, () without a context.
        error: Its standard error, by the variance of the weights, of that shape.
        ess: The effective sample size of the draws, (Σw)² / Σw², of that shape.
        elbo: The mean of log p(x) - log q(x), below log Z by KL(q ‖ p), of that shape.
    """

    value: Tensor
    error: Tensor
    ess: Tensor
    elbo: Tensor


@torch.no_grad()
def log_evidence(
    flow: Flow,
    log_density: Any,
    draws: int = 10_000,
    context: Tensor | None = None,
    *,
    generator: Generator | None = None,
) -> LogEvidence:
    """The log of the integral of a density, by draws of the flow with the weights p(x) / q(x).

    No error tells of mass where the flow never draws: log Z is then too low, with a large ESS
    as well. Compare other models, and flows trained from other seeds or by `ImportanceWeighted`.

    >>> import cnf
    >>> flow = cnf.models.build("realnvp", dim=2)
    >>> half = lambda x: flow.log_prob(x) - torch.tensor(2.0).log()
    >>> print(f"{log_evidence(flow, half, 100).value:.4f}")
    -0.6931

    Args:
        flow: What draws; one for each context if it is conditional.
        log_density: log p(x), or log p(x, context), up to the factor: as of `ReverseKL`.
        draws: How many, for each context.
        context: Condition, shape (*batch, C), or None.
        generator: Source of the draws.

    Raises:
        TypeError: The flow is none, is dequantized, or the log-density cannot be called.
        ValueError: A weight is NaN or infinite, or all are 0; or the log-density is not one number
            for each draw.
    """
    expect_counts("log_evidence", draws=draws)
    as_flow("log_evidence", flow).expect_density_of_samples("log_evidence")
    flow.inner_context("log_evidence", context, None)  # raises for one that does not fit
    chunk = CHUNK if context is None else max(1, CHUNK // max(1, context[..., 0].numel()))
    parts = []
    with evaluating(flow):
        for start in range(0, draws, chunk):
            n = min(chunk, draws - start)
            x, log_q = flow.sample_and_log_prob(n, context, generator=generator)
            own = None if context is None else context.expand(*log_q.shape, -1).flatten(0, -2)
            rows = x.reshape(-1, *flow.event_shape)
            log_p = log_densities("log_evidence", log_density, rows, own)
            parts.append((log_p.reshape(log_q.shape) - log_q).double())
    return _evidence(torch.cat(parts))


def _evidence(log_w: Tensor) -> LogEvidence:
    """The estimate from log-weights, shape (draws, *batch)."""
    n = len(log_w)
    lost = int((log_w.isnan() | (log_w == math.inf)).sum())
    if lost:
        raise ValueError(
            f"log_evidence: expected log p(x) - log q(x) below infinity, got NaN or infinity at "
            f"{lost} of {log_w.numel()} draws; look at log_density and flow.log_prob there"
        )
    log_sum = log_w.logsumexp(0)
    if (log_sum == -math.inf).any():
        raise ValueError(
            "log_evidence: expected some draws of the flow to have a positive density, got none; "
            "train the flow on it, by ReverseKL(log_density)"
        )
    shares = (log_w - log_sum).exp()
    if (shares.amax(0) > DOMINANT).any():
        warn(
            f"log_evidence: one of {n} draws has {shares.max():.0%} of all weight, and the error "
            "cannot be trusted: the flow is too narrow where p has mass; train it for longer, or "
            "by ImportanceWeighted, or take more draws"
        )
    ess = 1 / shares.square().sum(0)
    error = (1 / ess - 1 / n).clamp(min=0).sqrt()
    error = error * math.sqrt(n / (n - 1)) if n > 1 else torch.full_like(error, math.nan)
    return LogEvidence(log_sum - math.log(n), error, ess, log_w.mean(0))
