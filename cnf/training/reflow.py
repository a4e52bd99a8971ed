"""Straighter flows from trained ones: reflow, and distillation to a single step."""

from dataclasses import replace
from typing import Any

import torch

from cnf.errors import expect_counts
from cnf.fields import Piecewise, Predicts, WithScore
from cnf.flow import Flow
from cnf.objectives import Batch, FlowMatching
from cnf.random import stream
from cnf.training.batches import as_context
from cnf.training.config import TrainConfig
from cnf.training.loop import History, fit

CHUNK = 10_000


@torch.no_grad()
def pairs(flow: Flow, n: int, context: Any = None, seed: int = 0) -> Batch:
    """The flow as a coupling: base samples, and the points that its own solver takes them to.

    Args:
        flow: A trained flow.
        n: How many pairs.
        context: Condition of each pair, as `fit` takes it: a tensor, an array, a table or lists,
            shape (n, C), or (n,) for one number each.
        seed: Of the base samples.

    Returns:
        A `Batch` with x, x0 and the context: data for `fit`.

    Raises:
        ValueError: There is not one context for each pair.
    """
    expect_counts("pairs", n=n)
    if context is not None:
        context = as_context("pairs", context, flow.transform.optional_context)
        if context.shape[:-1] != (n,):
            raise ValueError(
                f"pairs: expected a context for each of n={n} pairs, shape ({n}, C), got "
                f"{tuple(context.shape)}; give as many rows as pairs, or n={len(context)}"
            )
        context = context.to(flow.device)
    generator, starts, ends = stream(seed, "pairs of reflow"), [], []
    for first in range(0, n, CHUNK):
        count = min(CHUNK, n - first)
        rows = None if context is None else context[first : first + count]
        starts.append(flow.base.sample((count,), generator))
        ends.append(flow.decode(starts[-1], rows))
    x, x0 = torch.cat(ends), torch.cat(starts)
    if lost := int((~x.flatten(1).isfinite().all(1)).sum()):
        raise ValueError(
            f"pairs: expected the flow's solver to take every base sample to a point, got NaN for "
            f"{lost} of {n}; take one that does, such as flow.with_solver(Solver('dopri5'))"
        )
    return Batch(x, context, x0=x0)


def reflow(
    flow: Flow,
    config: TrainConfig,
    *,
    rounds: int = 1,
    n: int = 100_000,
    context: Any = None,
    objective: FlowMatching | None = None,
    validation: Any = None,
) -> list[History]:
    """Train the flow again on its own pairs: the same law, by straighter paths each round.

    What the flow's solver gets wrong stays in the pairs: solve tightly, see `Flow.with_solver`.
    Source: Liu et al. (2023), Flow Straight and Fast, https://arxiv.org/abs/2209.03003.

    Args:
        flow: A continuous flow trained by flow matching; it goes on with its weights.
        config: Of each round; the k-th draws by seed + k, and writes to folder/round-(k + 1).
        rounds: How many times.
        n: Pairs of each round.
        context: Conditions of the pairs, as of `pairs`, such as rows of the data's.
        objective: `FlowMatching()` if None; its coupling is not used.
        validation: Held-out data, x or (x, context), as of `fit`; a tenth of the pairs if None.

    Returns:
        What each round logged.
    """
    objective = FlowMatching() if objective is None else objective
    histories = []
    for k in range(rounds):
        folder = None if config.folder is None else config.folder / f"round-{k + 1}"
        settings = replace(config, seed=config.seed + k, folder=folder)
        data = pairs(flow, n, context, settings.seed)
        histories.append(fit(flow, objective, data, settings, validation=validation))
    return histories


def distill(
    flow: Flow,
    config: TrainConfig,
    *,
    n: int = 100_000,
    context: Any = None,
    validation: Any = None,
) -> History:
    """Train the flow to take its own pairs in one Euler step; its ODE means nothing afterwards.

    Sample it with `flow.with_solver(Solver("euler", steps=1))`. It succeeds where paths are all
    but straight: after `reflow`.
    Source: Liu et al. (2023), https://arxiv.org/abs/2209.03003, section 2.3.

    Args:
        flow: A continuous flow of one plain velocity.
        config: The run's settings.
        n: Pairs to train on.
        context: Conditions of the pairs, as of `pairs`.
        validation: Held-out data, as of `fit`; there is no validation if None.
    """
    inside = [m for m in flow.modules() if isinstance(m, Predicts | WithScore | Piecewise)]
    if inside:
        raise TypeError(
            "distill: expected one plain velocity, which a single Euler step can follow, got a "
            f"{type(inside[0]).__name__}"
        )
    config = replace(config, validations=0) if validation is None else config
    data = pairs(flow, n, context, config.seed)
    return fit(flow, FlowMatching(times="start"), data, config, validation=validation)
