"""Building a named model, and what all of them share."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from cnf.distributions import Base
from cnf.dynamics.solver import Solver
from cnf.errors import expect_choice, is_count
from cnf.flow import Flow
from cnf.registry import Registry
from cnf.transforms.base import Transform
from cnf.transforms.context import StandardizeContext
from cnf.transforms.normalisation import Standardise

MODELS = Registry("model")


def build(name: str, **options: Any) -> Flow:
    """Build a named model; the flow remembers how, so that `cnf.load` can build it again.

    >>> build("cnf", dim=2, hidden=(64, 64), context=3).context_dim
    3

    Args:
        name: A name in `MODELS`.
        options: The builder's arguments: `dim`, `context`, `hidden`, `layers`, `solver`,
            `preprocess`, `context_preprocess`, …
    Raises:
        ValueError: An unknown name, or an option that the model does not have.
    """
    builder = MODELS[name]
    known = builder.__code__.co_varnames[: builder.__code__.co_argcount]
    for option in options:
        if option not in known:
            raise ValueError(
                f"models.build({name!r}): unknown option {option!r}; known: {', '.join(known)}"
            )
    if ("dim" in options) == ("shape" in options):
        wanted = "dim=… or shape=(C, H, W)" if "shape" in known else "dim=…"
        raise ValueError(f"models.build({name!r}): expected {wanted}, the size of one data point")
    for name_, least in (("dim", 1), ("context", 0)):
        size = options.get(name_, least)
        if not is_count(size) or size < least:
            raise ValueError(
                f"models.build({name!r}): expected {name_} to be a whole number >= {least}, got "
                f"{size!r}"
            )
    if isinstance(options.get("hidden"), int):
        raise ValueError(
            f"models.build({name!r}): expected hidden to be a list of widths, such as (64, 64), "
            f"got {options['hidden']}"
        )
    flow = builder(**options)
    flow.spec = {"model": name, "options": {key: _plain(value) for key, value in options.items()}}
    return flow


def assembled(
    transform: Transform,
    event_shape: Sequence[int],
    preprocess: str | None,
    context_preprocess: str | None,
    base: Base | None = None,
) -> Flow:
    """The flow of a model's parts: data and context are standardised, or (None) as they are."""
    for argument, name in (("preprocess", preprocess), ("context_preprocess", context_preprocess)):
        expect_choice("models", argument, name, ("standardise", None))
    of_context = context_preprocess and transform.context_dim
    return Flow(
        base,
        transform,
        Standardise(event_shape) if preprocess else None,
        context_preprocess=StandardizeContext(transform.context_dim) if of_context else None,
        event_shape=event_shape,
    )


def _plain(value: Any) -> Any:
    """A value as JSON holds it."""
    if isinstance(value, Solver):
        return asdict(value)
    return list(value) if isinstance(value, list | tuple) else value
