"""A log-density of one's own, up to a constant: what flows learn without data."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cnf.errors import abbreviated

LogDensity = Callable[..., Tensor]  # x, (M, *event), and the context, (M, C), if any → (M,)


def as_log_density(who: str, target: Any) -> LogDensity:
    """The function that gives log-densities: a `log_prob`, or the target itself.

    Args:
        who: Who asks.
        target: A function, or an object with a `log_prob`.

    Raises:
        TypeError: It is neither.
    """
    function: LogDensity = getattr(target, "log_prob", target)
    if not callable(function):
        got = repr(target) if isinstance(target, str) else type(target).__name__
        raise TypeError(
            f"{who}: expected log_density to be a function of x, or to have a log_prob, got {got}"
        )
    return function


def log_densities(who: str, target: Any, x: Tensor, context: Tensor | None) -> Tensor:
    """The log-densities of rows; raise ValueError unless they are one real number for each.

    Args:
        who: Who asks.
        target: As of `ReverseKL`.
        x: Points, shape (N, *event).
        context: Condition, shape (N, C), or None.
    """
    found: Any = as_log_density(who, target)(x, *([] if context is None else [context]))
    kind = found.dtype if isinstance(found, Tensor) else type(found).__name__
    if not isinstance(found, Tensor) or found.dtype == torch.bool or found.is_complex():
        raise ValueError(
            f"{who}: expected log_density to give a torch.Tensor of real numbers, got {kind}"
        )
    if found.shape != x.shape[:1]:
        raise ValueError(
            f"{who}: expected log_density to give shape ({len(x)},) for x of shape "
            f"{tuple(x.shape)}, one number a row, got shape {tuple(found.shape)}; of numbers for "
            "each coordinate take the sum, .sum(-1)"
        )
    return found


def expect_log_density(who: str, target: Any, x: Tensor, context: Tensor | None) -> None:
    """Raise ValueError unless it is one finite number for each row, with a gradient in x.

    Args:
        who: Who asks.
        target: As of `ReverseKL`.
        x: Points, shape (N, *event).
        context: Condition, shape (N, C), or None.
    """
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        found = log_densities(who, target, x, context)
    bad = (~found.isfinite()).nonzero().flatten().tolist()
    if bad:
        value = found[bad[0]].item()
        why = (
            "KL(q ‖ p) is infinite where p = 0: let the flow end inside of p's support, by "
            "preprocess=… or by a change of variables in log_density"
        )
        raise ValueError(
            f"{who}: log_density is {value} at {len(bad)} of {len(x)} draws of the "
            f"flow ({abbreviated(bad)}), first at {x[bad[0]].detach().flatten()[:8].tolist()}"
            + (f"; {why}" if value == -math.inf else ", and has to be finite wherever flows go")
        )
    if not found.requires_grad:
        raise ValueError(
            f"{who}: log_density has no gradient in x; compute it by torch, from x itself, and "
            "without no_grad, detach or numpy"
        )
