"""The registry of named models, and the parts that all of them share."""

from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from inspect import Parameter, isclass, signature
from typing import Any, ParamSpec

from cnf.dequantization import DEQUANTIZATIONS, Dequantization
from cnf.distributions import Base
from cnf.errors import expect_choice, is_count, is_whole
from cnf.flow import Flow
from cnf.registry import Registry, expect_options_of, options_of, spec
from cnf.transforms.base import Compose, Transform
from cnf.transforms.context import StandardizeContext
from cnf.transforms.preprocessing import PREPROCESSING

P = ParamSpec("P")
FORMER = "standardise"  # the name of "standardize" in files of version 0.1
Part = str | Mapping[str, Any] | Transform
Preprocess = Part | Sequence[Part] | None
Dequantize = str | Mapping[str, Any] | Dequantization | None


class Models(Registry):
    """The registry of models, which are functions that return a `Flow`.

    A flow that a registered function builds has its name and arguments in `flow.spec`, from which
    `cnf.load` builds it again.
    """

    def register(  # pyright: ignore
        self, name: str, example: Callable[..., Any] | None = None
    ) -> Callable[[Callable[P, Flow]], Callable[P, Flow]]:
        """Decorator that registers a function, or any other callable, that returns a `Flow`.

        Args:
            name: The name of the model.
            example: A factory of small instances for tests.

        Raises:
            ValueError: The name is registered already, or an argument cannot be given by its name.

        >>> @MODELS.register("mine")
        ... def mine(dim: int, *, width: int = 8) -> Flow:
        ...     return build("realnvp", dim=dim, hidden=(width, width))
        >>> mine(2, width=4).spec
        {'model': 'mine', 'options': {'dim': 2, 'width': 4}}
        """
        put = super().register(name, example)

        def add(builder: Callable[P, Flow]) -> Callable[P, Flow]:
            arguments = signature(builder)
            for parameter in arguments.parameters.values():
                if parameter.kind in (Parameter.POSITIONAL_ONLY, Parameter.VAR_POSITIONAL):
                    raise ValueError(
                        f"{name}: expected arguments that can be given by name, as `build` and "
                        f"`cnf.load` do, got {parameter}; write def …(dim, *, …)"
                    )

            @wraps(builder)
            def built(*args: P.args, **options: P.kwargs) -> Flow:
                expect_options_of(builder, name, options)
                try:
                    given = arguments.bind_partial(*args, **options).arguments
                except TypeError as error:
                    raise TypeError(f"{name}: {error}") from None
                for key, parameter in arguments.parameters.items():
                    if parameter.kind is Parameter.VAR_KEYWORD:
                        given |= given.pop(key, {})
                _expect_sizes(name, given, arguments.parameters)
                flow = builder(*args, **options)
                if not isinstance(flow, Flow):
                    kind = type(flow).__name__
                    raise TypeError(f"{name}: expected a model to return a Flow, got {kind}")
                told = {key: spec(value) for key, value in given.items()}
                flow.spec = {"model": name, "options": told}
                return flow

            put(built)
            return builder if isclass(builder) else built

        return add

    def taking(self, option: str) -> list[str]:
        """Names of the models that have an option: "dim" those of vectors, "shape" of images.

        Args:
            option: Name of an argument, such as "dim", "shape" or "solver".

        >>> MODELS.taking("shape")
        ['cnf', 'ffjord', 'rnode', 'realnvp', 'nsf', 'unet', 'glow']
        """
        return [name for name, builder in self.items() if option in signature(builder).parameters]


MODELS = Models("model")


def build(name: str, /, **options: Any) -> Flow:
    """Build a model by name, as configurations do: `build("nsf", dim=2)` is `cnf.models.nsf(2)`.

    >>> build("cnf", dim=2, hidden=(64, 64), context=3).context_dim
    3

    Args:
        name: A name in `MODELS`, such as "nsf-ar" for `nsf_ar`.
        options: The function's arguments: `dim`, `context`, `hidden`, `layers`, `solver`,
            `preprocess`, `context_preprocess`, `dequantization`, …

    Raises:
        ValueError: The name is unknown, or the model does not have an option, or models no images.
    """
    builder = MODELS[name]
    if "shape" in options and "shape" not in options_of(builder):
        known = ", ".join(model for model in MODELS if "shape" in options_of(MODELS[model]))
        raise ValueError(
            f"{name}: models vectors, got images of shape {tuple(options['shape'])}; models of "
            f"images are {known}"
        )
    expect_options_of(builder, name, options)
    return builder(**options)


def assembled(
    transform: Transform,
    event_shape: Sequence[int],
    preprocess: Preprocess,
    context_preprocess: str | None,
    dequantization: Dequantize,
    base: Base | None = None,
) -> Flow:
    """A flow of a transform and a base, with what stands between it and the data by name.

    >>> flow = build("nsf", dim=2, preprocess=["whiten", "radial"])
    >>> flow.preprocess
    Compose(RadialGaussianization(2, not fitted), Whiten(2, not fitted))
    >>> flow.spec["options"]["preprocess"]
    ['whiten', 'radial']

    Args:
        transform: The map from base to data.
        event_shape: Shape of a data point.
        preprocess: A name in `PREPROCESSING`, a mapping with a "name" and options, an instance, a
            list of these in the order in which they are applied to the data, or None. What has
            levels takes those of the dequantization, unless others are given.
        context_preprocess: "standardize" or None; without effect if there is no context.
        dequantization: A name in `DEQUANTIZATIONS`, a mapping with a "name" and options, an
            instance, or None.
        base: Base distribution; N(0, I) if None.

    Raises:
        ValueError: A name or an option is unknown.
    """
    if context_preprocess != FORMER:
        expect_choice("models", "context_preprocess", context_preprocess, ("standardize", None))
    of_context = context_preprocess and transform.context_dim
    sizes = {"event_shape": tuple(event_shape)}
    noise = None
    if dequantization is not None:
        noise = DEQUANTIZATIONS.build(dequantization, "models", sizes)
        sizes["levels"] = noise.levels
    return Flow(
        base,
        transform,
        _preprocessing(preprocess, sizes),
        noise,
        context_preprocess=StandardizeContext(transform.context_dim) if of_context else None,
        event_shape=event_shape,
    )


def _preprocessing(given: Preprocess, sizes: Mapping[str, Any]) -> Transform | None:
    """The transform from what the flow models to (dequantized) data; None if nothing is given."""
    if given is None:
        return None
    listed = given if isinstance(given, Sequence) and not isinstance(given, str) else [given]
    names = ("standardize" if one == FORMER else one for one in listed)
    parts = [PREPROCESSING.build(name, "models", sizes) for name in names]
    return Compose(parts[::-1]) if len(parts) > 1 else next(iter(parts), None)


def _expect_sizes(who: str, given: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    """Raise ValueError unless exactly one of dim and shape is given, and sizes are valid."""
    sizes = [name for name in ("dim", "shape") if name in known]
    if sizes and sum(given.get(name) is not None for name in sizes) != 1:
        wanted = " or ".join({"dim": "dim=…", "shape": "shape=(C, H, W)"}[name] for name in sizes)
        raise ValueError(f"{who}: expected {wanted}, the size of one data point")
    for name, least in (("dim", 1), ("context", 0)):
        size = least if given.get(name) is None else given[name]
        if not is_count(size) or size < least:
            raise ValueError(
                f"{who}: expected {name} to be a whole number >= {least}, got {size!r}"
            )
    if "hidden" in known and is_whole(given.get("hidden")):
        raise ValueError(
            f"{who}: expected hidden to be a list of widths, such as (64, 64), got "
            f"{given['hidden']}"
        )
