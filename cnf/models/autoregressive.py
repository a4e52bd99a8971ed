"""Autoregressive flows: each variable is mapped given those before it."""

from collections.abc import Sequence

from cnf.distributions import Base, StandardLogistic
from cnf.flow import Flow
from cnf.models.build import MODELS, Dequantize, Preprocess
from cnf.models.stacks import angles, layered, spline, stacked
from cnf.transforms.autoregressive import Autoregressive
from cnf.transforms.base import Inverse, Transform
from cnf.transforms.elementwise import Transformer


@MODELS.register("maf")
def maf(
    dim: int,
    *,
    context: int = 0,
    hidden: Sequence[int] = (64, 64),
    layers: int = 5,
    activation: str = "relu",
    between: str | None = "reverse",
    preprocess: Preprocess = "standardize",
    context_preprocess: str | None = "standardize",
    dequantization: Dequantize = None,
) -> Flow:
    """Masked autoregressive flow: `log_prob` takes one pass of the conditioners, `sample` D.

    Source: Papamakarios et al. (2017), MAF, https://arxiv.org/abs/1705.07057.

    Args:
        dim: Number of variables D.
        context: Size of the context; 0 for none.
        hidden: Hidden widths of each layer's conditioner, a masked MLP (MADE).
        layers: Number of layers.
        activation: A name in `cnf.nets.ACTIVATIONS`.
        between: Map between layers: "reverse" (reverses the order of the variables), "shuffle" (a
            random permutation), "lu" (a trained linear map) or None.
        preprocess: A name in `cnf.transforms.PREPROCESSING`, a mapping with a "name" and options,
            an instance, or a list of these, applied to the data in this order; fitted at the first
            `cnf.fit`. None for none.
        context_preprocess: "standardize", fitted likewise to the context, or None.
        dequantization: "uniform" or "variational", a mapping with such a "name" and options, or an
            instance, for whole numbers such as pixels; None for real numbers.

    Returns:
        A `Flow` of points of shape (dim,).

    Raises:
        ValueError: A size is below 1, or a name is unknown.
    """
    return autoregressive_flow(
        dim, context=context, hidden=hidden, layers=layers, activation=activation,
        between=between, preprocess=preprocess, context_preprocess=context_preprocess,
        dequantization=dequantization,
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
    preprocess: Preprocess = "standardize",
    context_preprocess: str | None = "standardize",
    dequantization: Dequantize = None,
) -> Flow:
    """Inverse autoregressive flow: `sample` takes one pass of the conditioners, `log_prob` D.

    Source: Kingma et al. (2016), IAF, https://arxiv.org/abs/1606.04934.

    Args:
        dim: Number of variables D.
        context: Size of the context; 0 for none.
        hidden: Hidden widths of each layer's conditioner, a masked MLP (MADE).
        layers: Number of layers.
        activation: A name in `cnf.nets.ACTIVATIONS`.
        between: Map between layers: "reverse" (reverses the order of the variables), "shuffle" (a
            random permutation), "lu" (a trained linear map) or None.
        preprocess: A name in `cnf.transforms.PREPROCESSING`, a mapping with a "name" and options,
            an instance, or a list of these, applied to the data in this order; fitted at the first
            `cnf.fit`. None for none.
        context_preprocess: "standardize", fitted likewise to the context, or None.
        dequantization: "uniform" or "variational", a mapping with such a "name" and options, or an
            instance, for whole numbers such as pixels; None for real numbers.

    Returns:
        A `Flow` of points of shape (dim,).

    Raises:
        ValueError: A size is below 1, or a name is unknown.
    """

    def layer(k: int) -> Transform:
        return Inverse(
            Autoregressive(dim, hidden=hidden, context_dim=context, activation=activation)
        )

    stack = layered(layer, layers, dim, between, halves=False)
    return stacked(stack, dim, preprocess, context_preprocess, dequantization)


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
    preprocess: Preprocess = "standardize",
    context_preprocess: str | None = "standardize",
    dequantization: Dequantize = None,
    period: float | None = None,
) -> Flow:
    """Autoregressive neural spline flow: one pass of the nets for `log_prob`, D for `sample`.

    Source: Durkan et al. (2019), Neural Spline Flows, https://arxiv.org/abs/1906.04032; for angles
    Rezende et al. (2020), https://arxiv.org/abs/2002.02428.

    Args:
        dim: Number of variables D.
        context: Size of the context; 0 for none.
        hidden: Hidden widths of each layer's conditioner, a masked MLP (MADE).
        layers: Number of layers.
        bins: Number of bins of each spline.
        bound: The splines are the identity beyond ±bound, in units of standardized data; 5 if
            None.
        activation: A name in `cnf.nets.ACTIVATIONS`.
        between: Map between layers: "reverse" (reverses the order of the variables), "shuffle" (a
            random permutation), "lu" (a trained linear map) or None.
        preprocess: A name in `cnf.transforms.PREPROCESSING`, a mapping with a "name" and options,
            an instance, or a list of these, applied to the data in this order; fitted at the first
            `cnf.fit`. None for none.
        context_preprocess: "standardize", fitted likewise to the context, or None.
        dequantization: "uniform" or "variational", a mapping with such a "name" and options, or an
            instance, for whole numbers such as pixels; None for real numbers.
        period: Period of the data, if all variables are angles: the splines are circular on
            [-period/2, period/2) and the base is uniform. It requires preprocess=None, no bound
            and no "lu".

    Returns:
        A `Flow` of points of shape (dim,).

    Raises:
        ValueError: A size is below 1, or a name is unknown.
    """
    return autoregressive_flow(
        dim, spline("nsf-ar", bins, bound, period, between, preprocess), context=context,
        hidden=hidden, layers=layers, activation=activation, between=between, period=period,
        base=angles(dim, period), preprocess=preprocess, context_preprocess=context_preprocess,
        dequantization=dequantization,
    )  # fmt: skip


@MODELS.register("made")
def made(
    dim: int,
    *,
    context: int = 0,
    hidden: Sequence[int] = (64, 64),
    layers: int = 1,
    components: int = 8,
    activation: str = "silu",
    between: str | None = "reverse",
    divisive: float | None = None,
    residual: bool = False,
    preprocess: Preprocess = "standardize",
    context_preprocess: str | None = "standardize",
    dequantization: Dequantize = None,
) -> Flow:
    """Masked autoregressive density: each variable is a mixture of logistics given those before.

    The base is logistic, so that with one layer the conditional densities are those mixtures
    themselves. `log_prob` takes one pass of each layer's net, `sample` D.

    Source: Germain et al. (2015), MADE, https://arxiv.org/abs/1502.03509; with mixtures
    Papamakarios et al. (2017), MADE MoG, https://arxiv.org/abs/1705.07057; of logistics Salimans
    et al. (2017), PixelCNN++, https://arxiv.org/abs/1701.05517.

    Args:
        dim: Number of variables D.
        context: Size of the context; 0 for none.
        hidden: Widths of the hidden layers.
        layers: Number of layers; 1 is the mixtures themselves.
        components: Components of each mixture.
        activation: A name in `cnf.nets.ACTIVATIONS`.
        between: Map between layers: "reverse" (reverses the order of the variables), "shuffle" (a
            random permutation), "lu" (a trained linear map) or None.
        divisive: The constant ε of divisive normalization, well below the variables' variance of
            1; None for none. Mixtures and the net's inputs are then relative to the size of the
            variables before, see `cnf.transforms.Autoregressive`. It is meant for data whose
            amplitude varies between rows, such as patches of pictures, with preprocess="whiten".
        residual: Whether a hidden layer that is as wide as the one before it adds its output to
            its input.
        preprocess: A name in `cnf.transforms.PREPROCESSING`, a mapping with a "name" and options,
            an instance, or a list of these, applied to the data in this order; fitted at the first
            `cnf.fit`. None for none.
        context_preprocess: "standardize", fitted likewise to the context, or None.
        dequantization: "uniform" or "variational", a mapping with such a "name" and options, or an
            instance, for whole numbers such as pixels; None for real numbers.

    Returns:
        A `Flow` of points of shape (dim,).

    Raises:
        ValueError: A size is below 1, or a name is unknown.
    """
    return autoregressive_flow(
        dim, {"name": "logistic-mixture", "components": components}, context=context,
        hidden=hidden, layers=layers, activation=activation, between=between, divisive=divisive,
        residual=residual, base=StandardLogistic((dim,)), preprocess=preprocess,
        context_preprocess=context_preprocess, dequantization=dequantization,
    )  # fmt: skip


def autoregressive_flow(
    dim: int,
    transformer: Transformer = None,
    *,
    context: int = 0,
    hidden: Sequence[int] = (64, 64),
    layers: int = 5,
    activation: str = "relu",
    between: str | None = "reverse",
    period: float | None = None,
    divisive: float | None = None,
    residual: bool = False,
    base: Base | None = None,
    preprocess: Preprocess = "standardize",
    context_preprocess: str | None = "standardize",
    dequantization: Dequantize = None,
) -> Flow:
    """Autoregressive flow with any elementwise map as its transformer.

    A transformer is not part of the saved specification: load with `cnf.load(path, into=…)`.

    >>> from cnf.transforms import RationalQuadratic
    >>> autoregressive_flow(2, RationalQuadratic(bins=4), layers=2).event_shape
    (2,)

    Args:
        dim: Number of variables D.
        transformer: Map of each variable, with parameters from the conditioner: a name in `MAPS`,
            {"name": …, **options} or an instance; affine if None.
        context: Size of the context; 0 for none.
        hidden: Hidden widths of each layer's conditioner, a masked MLP (MADE).
        layers: Number of layers.
        activation: A name in `cnf.nets.ACTIVATIONS`.
        between: Map between layers: "reverse" (reverses the order of the variables), "shuffle" (a
            random permutation), "lu" (a trained linear map) or None.
        period: Period of the data, if they are angles; the conditioners see sines and cosines.
        divisive: The constant ε of divisive normalization, see `cnf.transforms.Autoregressive`;
            None for none.
        residual: Whether a hidden layer that is as wide as the one before it adds its output to
            its input.
        base: Base distribution; N(0, I) if None.
        preprocess: A name in `cnf.transforms.PREPROCESSING`, a mapping with a "name" and options,
            an instance, or a list of these, applied to the data in this order; fitted at the first
            `cnf.fit`. None for none.
        context_preprocess: "standardize", fitted likewise to the context, or None.
        dequantization: "uniform" or "variational", a mapping with such a "name" and options, or an
            instance, for whole numbers such as pixels; None for real numbers.

    Returns:
        A `Flow` of points of shape (dim,).

    Raises:
        ValueError: A size is below 1, or a name is unknown.
    """

    def layer(k: int) -> Transform:
        return Autoregressive(
            dim, transformer, hidden=hidden, context_dim=context, activation=activation,
            period=period, divisive=divisive, residual=residual,
        )  # fmt: skip

    stack = layered(layer, layers, dim, between, halves=False)
    return stacked(stack, dim, preprocess, context_preprocess, dequantization, base)
