"""The named models: presets of the same parts, with the same argument names."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from cnf.dynamics.solver import Solver, as_solver
from cnf.errors import expect_choice
from cnf.fields.mlp import MLPField
from cnf.flow import Flow
from cnf.registry import Registry
from cnf.transforms.base import Compose, Transform
from cnf.transforms.continuous import Continuous
from cnf.transforms.coupling import Coupling
from cnf.transforms.elementwise import Standardise

MODELS = Registry("model")


def build(name: str, **options: Any) -> Flow:
    """Build a named model; the flow remembers how, so that `cnf.load` can build it again.

    >>> build("cnf", dim=2, hidden=(64, 64), context=3).context_dim
    3

    Args:
        name: A name in `MODELS`.
        options: The builder's arguments: `dim`, `context`, `hidden`, `layers`, `solver`,
            `preprocess`, …
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
    if "dim" not in options:
        raise ValueError(f"models.build({name!r}): expected dim=…, the size of one data point")
    for name_, least in (("dim", 1), ("context", 0)):
        if options.get(name_, least) < least:
            raise ValueError(
                f"models.build({name!r}): expected {name_} >= {least}, got {options[name_]}"
            )
    flow = builder(**options)
    flow.spec = {"model": name, "options": {key: _plain(value) for key, value in options.items()}}
    return flow


@MODELS.register("cnf")
def cnf(
    dim: int,
    context: int = 0,
    hidden: Sequence[int] = (64, 64, 64, 64),
    activation: str = "silu",
    frequencies: int = 4,
    solver: Solver | Mapping[str, Any] | None = None,
    preprocess: str | None = "standardise",
) -> Flow:
    """Continuous normalizing flow with a time-conditioned MLP and its exact closed-form trace.

    Args:
        dim: D.
        context: Size of the context; 0 for none.
        hidden: Widths of the field's hidden layers.
        activation: A name in `cnf.nets.ACTIVATIONS`.
        frequencies: Fourier features of time in the field.
        solver: A `Solver`, or its arguments; dopri5 at 1e-5 with the adjoint by default.
        preprocess: "standardise" or None.
    """
    field = MLPField(dim, hidden, context, activation, frequencies)
    transform = Continuous(field, as_solver(solver))
    return Flow(None, transform, _as_preprocess(preprocess, dim), event_shape=(dim,))


@MODELS.register("ffjord")
def ffjord(
    dim: int,
    context: int = 0,
    hidden: Sequence[int] = (64, 64, 64),
    activation: str = "tanh",
    solver: Solver | Mapping[str, Any] | None = None,
    preprocess: str | None = None,
) -> Flow:
    """FFJORD's toy set-up: 64-64-64 tanh, plain time, dopri5 at 1e-5 with the adjoint.

    The paper trains with Hutchinson's estimate, `MaximumLikelihood(divergence="hutchinson")`, and
    evaluates exactly; the field here is an MLP with time joined to the input.
    Source: Grathwohl et al. (2019), FFJORD, https://arxiv.org/abs/1810.01367.

    Args: as for `cnf`.
    """
    field = MLPField(dim, hidden, context, activation, frequencies=0)
    transform = Continuous(field, as_solver(solver))
    return Flow(None, transform, _as_preprocess(preprocess, dim), event_shape=(dim,))


@MODELS.register("realnvp")
def realnvp(
    dim: int,
    context: int = 0,
    hidden: Sequence[int] = (64, 64),
    layers: int = 8,
    activation: str = "silu",
    preprocess: str | None = "standardise",
) -> Flow:
    """RealNVP: affine couplings, bounded log-scale, alternating masks; starts as identity.

    Source: Dinh et al. (2017), https://arxiv.org/abs/1605.08803.

    Args:
        dim: D.
        context: Size of the context; 0 for none.
        hidden: Widths of each coupling's net.
        layers: How many couplings.
        activation: A name in `cnf.nets.ACTIVATIONS`.
        preprocess: "standardise" or None.
    """
    if layers < 1:
        raise ValueError(f"realnvp: expected layers >= 1, got {layers}")
    transform = Compose(
        [
            Coupling(
                dim,
                range(layer % 2, dim, 2),
                None,
                hidden=hidden,
                context_dim=context,
                activation=activation,
            )
            for layer in range(layers)
        ]
    )
    return Flow(None, transform, _as_preprocess(preprocess, dim), event_shape=(dim,))


def _as_preprocess(name: str | None, dim: int) -> Transform | None:
    expect_choice("models", "preprocess", name, ("standardise", None))
    return None if name is None else Standardise((dim,))


def _plain(value: Any) -> Any:
    """A value as JSON holds it."""
    if isinstance(value, Solver):
        return asdict(value)
    return list(value) if isinstance(value, list | tuple) else value
