"""Autoregressive flows: each variable is mapped given those before it."""

from collections.abc import Sequence

from cnf.distributions import Base
from cnf.flow import Flow
from cnf.models.build import MODELS
from cnf.models.stacks import angles, layered, spline, stacked
from cnf.transforms.autoregressive import Autoregressive
from cnf.transforms.base import Inverse, Transform
from cnf.transforms.elementwise import ElementwiseMap


@MODELS.register("maf")
def maf(
    dim: int,
    *,
    context: int = 0,
    hidden: Sequence[int] = (64, 64),
    layers: int = 5,
    activation: str = "relu",
    between: str | None = "reverse",
    preprocess: str | None = "standardize",
    context_preprocess: str | None = "standardize",
) -> Flow:
    """Masked autoregressive flow: `log_prob` takes one pass of the nets, `sample` D passes.

    Source: Papamakarios et al. (2017), MAF, https://arxiv.org/abs/1705.07057.

    Args:
        dim: D, the number of variables.
        context: Size of the context; 0 for none.
        hidden: Widths of each layer's masked net (MADE).
        layers: Number of layers.
        activation: A name in `cnf.nets.ACTIVATIONS`.
        between: What stands between layers: "reverse" (the other order of the variables),
            "shuffle" (a random order before every layer), "lu" (a trained linear map) or None.
        preprocess: "standardize", fitted at the first `cnf.fit`, or None.
        context_preprocess: The same for the context.

    Returns:
        A `Flow` of points of shape (dim,).

    Raises:
        ValueError: A size below 1, or a name that is not known.
    """
    return autoregressive_flow(
        dim, context=context, hidden=hidden, layers=layers, activation=activation,
        between=between, preprocess=preprocess, context_preprocess=context_preprocess,
    )  # fmt: skip


@MODELS.register("iaf")
def iaf(
    dim: int,
    *,
    context: int = 0,
    hidden: Sequence[int] = (64, 64),
    layers: int = 5,
    activation: str = "relu",
    between: str | None = "reverse",
    preprocess: str | None = "standardize",
    context_preprocess: str | None = "standardize",
) -> Flow:
    """Inverse autoregressive flow: `sample` takes one pass of the nets, `log_prob` D passes.

    Source: Kingma et al. (2016), IAF, https://arxiv.org/abs/1606.04934.

    Args:
        dim: D, the number of variables.
        context: Size of the context; 0 for none.
        hidden: Widths of each layer's masked net (MADE).
        layers: Number of layers.
        activation: A name in `cnf.nets.ACTIVATIONS`.
        between: What stands between layers: "reverse" (the other order of the variables),
            "shuffle" (a random order before every layer), "lu" (a trained linear map) or None.
        preprocess: "standardize", fitted at the first `cnf.fit`, or None.
        context_preprocess: The same for the context.

    Returns:
        A `Flow` of points of shape (dim,).

    Raises:
        ValueError: A size below 1, or a name that is not known.
    """

    def layer(k: int) -> Transform:
        return Inverse(
            Autoregressive(dim, hidden=hidden, context_dim=context, activation=activation)
        )

    stack = layered(layer, layers, dim, between, halves=False)
    return stacked(stack, dim, preprocess, context_preprocess)


@MODELS.register("nsf-ar")
def nsf_ar(
    dim: int,
    *,
    context: int = 0,
    hidden: Sequence[int] = (64, 64),
    layers: int = 4,
    bins: int = 8,
    bound: float | None = None,
    activation: str = "relu",
    between: str | None = "lu",
    preprocess: str | None = "standardize",
    context_preprocess: str | None = "standardize",
    period: float | None = None,
) -> Flow:
    """Autoregressive neural spline flow: `log_prob` takes one pass of the nets, `sample` D passes.

    Source: Durkan et al. (2019), Neural Spline Flows, https://arxiv.org/abs/1906.04032; for angles
    Rezende et al. (2020), https://arxiv.org/abs/2002.02428.

    Args:
        dim: D, the number of variables.
        context: Size of the context; 0 for none.
        hidden: Widths of each layer's masked net (MADE).
        layers: Number of layers.
        bins: Bins of each spline.
        bound: The splines end at ±bound, in units of the standardized data; 5 if None.
        activation: A name in `cnf.nets.ACTIVATIONS`.
        between: What stands between layers: "reverse" (the other order of the variables),
            "shuffle" (a random order before every layer), "lu" (a trained linear map) or None.
        preprocess: "standardize", fitted at the first `cnf.fit`, or None.
        context_preprocess: The same for the context.
        period: Of the data, where all of them are angles: circular splines on
            [-period/2, period/2) and a uniform base; wants preprocess=None and no "lu".

    Returns:
        A `Flow` of points of shape (dim,).

    Raises:
        ValueError: A size below 1, or a name that is not known.
    """
    return autoregressive_flow(
        dim, spline("nsf-ar", bins, bound, period, between, preprocess), context=context,
        hidden=hidden, layers=layers, activation=activation, between=between, period=period,
        base=angles(dim, period), preprocess=preprocess, context_preprocess=context_preprocess,
    )  # fmt: skip


def autoregressive_flow(
    dim: int,
    transformer: ElementwiseMap | None = None,
    *,
    context: int = 0,
    hidden: Sequence[int] = (64, 64),
    layers: int = 5,
    activation: str = "relu",
    between: str | None = "reverse",
    period: float | None = None,
    base: Base | None = None,
    preprocess: str | None = "standardize",
    context_preprocess: str | None = "standardize",
) -> Flow:
    """Autoregressive layers of any elementwise map; loading needs `cnf.load(path, into=…)`.

    >>> from cnf.transforms import RationalQuadratic
    >>> autoregressive_flow(2, RationalQuadratic(bins=4), layers=2).event_shape
    (2,)

    Args:
        dim: D, the number of variables.
        transformer: The map of each variable, whose parameters the nets give; affine if None.
        context: Size of the context; 0 for none.
        hidden: Widths of each layer's masked net (MADE).
        layers: Number of layers.
        activation: A name in `cnf.nets.ACTIVATIONS`.
        between: What stands between layers: "reverse" (the other order of the variables),
            "shuffle" (a random order before every layer), "lu" (a trained linear map) or None.
        period: Of the data, where they are angles, which the nets see as sines and cosines.
        base: What is mapped to the data; N(0, I) if None.
        preprocess: "standardize", fitted at the first `cnf.fit`, or None.
        context_preprocess: The same for the context.

    Returns:
        A `Flow` of points of shape (dim,).

    Raises:
        ValueError: A size below 1, or a name that is not known.
    """

    def layer(k: int) -> Transform:
        return Autoregressive(
            dim, transformer, hidden=hidden, context_dim=context, activation=activation,
            period=period,
        )  # fmt: skip

    stack = layered(layer, layers, dim, between, halves=False)
    return stacked(stack, dim, preprocess, context_preprocess, base)
