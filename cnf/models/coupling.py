"""Flows of coupling layers, which transform one half of the variables given the other."""

from collections.abc import Sequence

from cnf.distributions import Base
from cnf.flow import Flow
from cnf.models.build import MODELS, Dequantize, Preprocess
from cnf.models.stacks import angles, half, layered, spline, stacked
from cnf.transforms.base import Transform
from cnf.transforms.coupling import Coupling
from cnf.transforms.elementwise import Additive, Affine, Elementwise, Transformer


@MODELS.register("nice")
def nice(
    dim: int,
    *,
    context: int = 0,
    hidden: Sequence[int] = (128, 128),
    layers: int = 8,
    activation: str = "relu",
    preprocess: Preprocess = "standardize",
    context_preprocess: str | None = "standardize",
    dequantization: Dequantize = None,
) -> Flow:
    """NICE: additive coupling layers, which preserve volume, and a diagonal scaling.

    Source: Dinh et al. (2014), NICE, https://arxiv.org/abs/1410.8516.

    Args:
        dim: Number of variables D; 2 or more.
        context: Size of the context; 0 for none.
        hidden: Hidden widths of each layer's conditioner, an MLP.
        layers: Number of layers.
        activation: A name in `cnf.nets.ACTIVATIONS`.
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
        coupling = Coupling(
            dim, half(dim, k), Additive(), hidden=hidden, context_dim=context,
            activation=activation,
        )  # fmt: skip
        # Not initialized to the identity, where data with mirror symmetry give shifts no gradient.
        coupling.net.layers[-1].reset_parameters()  # pyright: ignore
        return coupling

    scaling = Elementwise(dim, Affine(), context_dim=context)
    stack = [*layered(layer, layers, dim, None), scaling]
    return stacked(stack, dim, preprocess, context_preprocess, dequantization)


@MODELS.register("realnvp")
def realnvp(
    dim: int,
    *,
    context: int = 0,
    hidden: Sequence[int] = (64, 64),
    layers: int = 8,
    activation: str = "silu",
    between: str | None = None,
    preprocess: Preprocess = "standardize",
    context_preprocess: str | None = "standardize",
    dequantization: Dequantize = None,
) -> Flow:
    """RealNVP: affine couplings with a bounded log-scale; it starts as the identity.

    Source: Dinh et al. (2017), RealNVP, https://arxiv.org/abs/1605.08803.

    Args:
        dim: Number of variables D; 2 or more.
        context: Size of the context; 0 for none.
        hidden: Hidden widths of each layer's conditioner, an MLP.
        layers: Number of layers.
        activation: A name in `cnf.nets.ACTIVATIONS`.
        between: Map between layers, whose masks alternate between the halves: None, "shuffle" (a
            random permutation before every pair of layers, so that the halves are random) or "lu"
            (a trained linear map).
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
    return coupling_flow(
        dim, context=context, hidden=hidden, layers=layers, activation=activation,
        between=between, preprocess=preprocess, context_preprocess=context_preprocess,
        dequantization=dequantization,
    )  # fmt: skip


@MODELS.register("nsf")
def nsf(
    dim: int,
    *,
    context: int = 0,
    hidden: Sequence[int] = (64, 64),
    layers: int = 6,
    bins: int = 8,
    bound: float | None = None,
    activation: str = "relu",
    between: str | None = "lu",
    preprocess: Preprocess = "standardize",
    context_preprocess: str | None = "standardize",
    dequantization: Dequantize = None,
    period: float | None = None,
) -> Flow:
    """Neural spline flow: couplings by rational-quadratic splines; it starts as the identity.

    Source: Durkan et al. (2019), Neural Spline Flows, https://arxiv.org/abs/1906.04032; for angles
    Rezende et al. (2020), https://arxiv.org/abs/2002.02428.

    Args:
        dim: Number of variables D; 2 or more.
        context: Size of the context; 0 for none.
        hidden: Hidden widths of each layer's conditioner, an MLP.
        layers: Number of layers.
        bins: Number of bins of each spline.
        bound: The splines are the identity beyond ±bound, in units of standardized data; 5 if
            None.
        activation: A name in `cnf.nets.ACTIVATIONS`.
        between: Map between layers, whose masks alternate between the halves: None, "shuffle" (a
            random permutation before every pair of layers, so that the halves are random) or "lu"
            (a trained linear map).
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
    return coupling_flow(
        dim, spline("nsf", bins, bound, period, between, preprocess), context=context,
        hidden=hidden, layers=layers, activation=activation, between=between, period=period,
        base=angles(dim, period), preprocess=preprocess, context_preprocess=context_preprocess,
        dequantization=dequantization,
    )  # fmt: skip


def coupling_flow(
    dim: int,
    transformer: Transformer = None,
    *,
    context: int = 0,
    hidden: Sequence[int] = (64, 64),
    layers: int = 8,
    activation: str = "silu",
    between: str | None = None,
    period: float | None = None,
    base: Base | None = None,
    preprocess: Preprocess = "standardize",
    context_preprocess: str | None = "standardize",
    dequantization: Dequantize = None,
) -> Flow:
    """Coupling flow with any elementwise map as its transformer.

    A transformer is not part of the saved specification: load with `cnf.load(path, into=…)`.

    >>> from cnf.transforms import RationalQuadratic
    >>> coupling_flow(2, RationalQuadratic(bins=4), layers=2).event_shape
    (2,)

    Args:
        dim: Number of variables D; 2 or more.
        transformer: Map of each variable, with parameters from the conditioner: a name in `MAPS`,
            {"name": …, **options} or an instance; affine if None.
        context: Size of the context; 0 for none.
        hidden: Hidden widths of each layer's conditioner, an MLP.
        layers: Number of layers.
        activation: A name in `cnf.nets.ACTIVATIONS`.
        between: Map between layers, whose masks alternate between the halves: None, "shuffle" (a
            random permutation before every pair of layers, so that the halves are random) or "lu"
            (a trained linear map).
        period: Period of the data, if they are angles; the conditioners see sines and cosines.
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
        return Coupling(
            dim, half(dim, k), transformer, hidden=hidden, context_dim=context,
            activation=activation, period=period,
        )  # fmt: skip

    stack = layered(layer, layers, dim, between)
    return stacked(stack, dim, preprocess, context_preprocess, dequantization, base)
