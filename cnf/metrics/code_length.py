"""Bits per dimension: the code length of whole numbers, such as pixels, under a flow."""

import math

import torch
from torch import Generator, Tensor

from cnf.dynamics.divergence import Divergence
from cnf.errors import expect_counts, expect_tensor
from cnf.flow import Flow, evaluating
from cnf.metrics.estimate import Estimate
from cnf.metrics.metric import Score, Trial, metric
from cnf.objectives.base import as_flow


def bits_per_dim(
    flow: Flow,
    x: Tensor,
    context: Tensor | None = None,
    *,
    draws: int = 1,
    chunk: int = 100,
    divergence: str | Divergence | None = None,
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
        divergence: As of `Flow.log_prob`: exact if None, and of a large image a continuous flow
            takes an estimate, `Hutchinson(probes=8)`. That is right with one draw; of several the
            noise of the estimate makes the result too low.
        generator: Source of the draws; torch's default generator if None.

    Returns:
        The mean and its standard error over the pictures.

    Raises:
        TypeError: The flow has no dequantization: a density has no bits.
        ValueError: x holds other numbers than the dequantization's levels.
    """
    if as_flow("bits_per_dim", flow).dequantization is None:
        raise TypeError(
            "bits_per_dim: expected a flow of whole numbers, got one without dequantization, "
            "whose density has no code length; build it with dequantization='uniform'"
        )
    _expect_pictures("bits_per_dim", flow, x, context)
    expect_counts("bits_per_dim", draws=draws, chunk=chunk)
    bound = log_prob_of_draws(
        flow, x, context, draws=draws, chunk=chunk, divergence=divergence, generator=generator
    )
    return Estimate.of(bound / bits_in_nats(flow))


@torch.no_grad()
def log_prob_of_draws(
    flow: Flow,
    x: Tensor,
    context: Tensor | None = None,
    *,
    draws: int = 1,
    chunk: int = 100,
    divergence: str | Divergence | None = None,
    generator: Generator | None = None,
) -> Tensor:
    """The lower bound of log P(x) from K draws of the noise, in nats, float64, shape (N,).

    Args:
        flow: A flow with a dequantization.
        x: Whole numbers, shape (N, *event).
        context: Condition, shape (N, C), or None.
        draws: K, noise drawn for each picture.
        chunk: Pictures evaluated at once.
        divergence: As of `Flow.log_prob`; the noise of an estimate makes the bound of several
            draws too high.
        generator: Source of the draws; torch's default generator if None.

    Raises:
        TypeError: The flow is none.
        ValueError: x or the context is no tensor with a row for each picture.
    """
    _expect_pictures("log_prob_of_draws", flow, x, context)
    expect_counts("log_prob_of_draws", draws=draws, chunk=chunk)
    found = []
    with evaluating(flow):
        for start in range(0, len(x), chunk):
            rows = x[start : start + chunk].to(flow.device)
            given = None if context is None else context[start : start + chunk].to(flow.device)
            weights = [
                flow.log_prob(rows, given, divergence=divergence, generator=generator)
                for _ in range(draws)
            ]
            found.append(torch.stack(weights).double().logsumexp(0).cpu() - math.log(draws))
    return torch.cat(found)


def _expect_pictures(who: str, flow: Flow, x: Tensor, context: Tensor | None) -> None:
    """Raise ValueError unless there are pictures, and as many contexts, where there are any."""
    event = as_flow(who, flow).event_shape
    expect_tensor(who, "x", x)
    if x.shape[1:] != event or not len(x):
        wanted = ", ".join(["N", *map(str, event)])
        raise ValueError(f"{who}: expected x of shape ({wanted}), got {tuple(x.shape)}")
    if context is None:
        return
    expect_tensor(who, "context", context)
    if context.dim() != 2 or len(context) != len(x):
        raise ValueError(
            f"{who}: expected a context of shape ({len(x)}, C), one row for each picture, got "
            f"{tuple(context.shape)}; write context.expand({len(x)}, -1) if it is that of all"
        )


def bits_in_nats(flow: Flow) -> float:
    """What a log-density in nats is divided by to give bits per dimension: -D log 2.

    Args:
        flow: The flow, of D dimensions.
    """
    return -math.prod(flow.event_shape) * math.log(2)


@metric(
    "flow",
    Score(
        "bits_per_dim", "Bits/dim", "Code length of held-out pictures, an upper bound",
        terminal="bits\n/dim", margin=0.0,
    ),
)  # fmt: skip
def _bits_per_dim(trial: Trial) -> Estimate | float | None:
    if trial.test.x.is_floating_point():
        return None
    if trial.flow.dequantization is None:
        return math.nan
    return Estimate.of(trial.log_q / bits_in_nats(trial.flow), trial.test.weight)
