"""Flows of coupling layers: one half of the variables is mapped, given the other half."""

from collections.abc import Sequence

from cnf.distributions import Base
from cnf.flow import Flow
from cnf.models.build import MODELS
from cnf.models.stacks import angles, half, layered, spline, stacked
from cnf.transforms.base import Transform
from cnf.transforms.coupling import Coupling
from cnf.transforms.elementwise import Additive, Affine, Elementwise, ElementwiseMap


@MODELS.register("nice")
def nice(
    dim: int,
    *,
    context: int = 0,
    hidden: Sequence[int] = (128, 128),
    layers: int = 8,
    activation: str = "relu",
    preprocess: str | None = "standardize",
    context_preprocess: str | None = "standardize",
) -> Flow:
    """NICE: additive couplings, which keep volume, and one diagonal scaling.

    Source: Dinh et al. (2014), NICE, https://arxiv.org/abs/1410.8516.

    Args:
        dim: D, the number of variables; 2 or more.
        context: Size of the context; 0 for none.
        hidden: Widths of each layer's net.
        layers: Number of layers.
        activation: A name in `cnf.nets.ACTIVATIONS`.
        preprocess: "standardize", fitted at the first `cnf.fit`, or None.
        context_preprocess: The same for the context.

    Returns:
        A `Flow` of points of shape (dim,).

    Raises:
        ValueError: A size below 1, or a name that is not known.
    """

    def layer(k: int) -> Transform:
        coupling = Coupling(
            dim, half(dim, k), Additive(), hidden=hidden, context_dim=context,
            activation=activation,
        )  # fmt: skip
        # Not at the identity: data with mirror symmetry give a shift no gradient to leave zero by.
        coupling.net.layers[-1].reset_parameters()  # pyright: ignore
        return coupling

    scaling = Elementwise(dim, Affine(), context_dim=context)
    stack = [*layered(layer, layers, dim, None), scaling]
    return stacked(stack, dim, preprocess, context_preprocess)


@MODELS.register("realnvp")
def realnvp(
    dim: int,
    *,
    context: int = 0,
    hidden: Sequence[int] = (64, 64),
    layers: int = 8,
    activation: str = "silu",
    between: str | None = None,
    preprocess: str | None = "standardize",
    context_preprocess: str | None = "standardize",
) -> Flow:
    """RealNVP: affine couplings with a bounded log-scale; it starts as the identity.

    Source: Dinh et al. (2017), RealNVP, https://arxiv.org/abs/1605.08803.

    Args:
        dim: D, the number of variables; 2 or more.
        context: Size of the context; 0 for none.
        hidden: Widths of each layer's net.
        layers: Number of layers.
        activation: A name in `cnf.nets.ACTIVATIONS`.
        between: What mixes the variables between layers, which keep one half and then the other:
            None, "shuffle" (a random permutation before every second layer, so that the masks are
            random) or "lu" (a trained linear map).
        preprocess: "standardize", fitted at the first `cnf.fit`, or None.
        context_preprocess: The same for the context.

    Returns:
        A `Flow` of points of shape (dim,).

    Raises:
        ValueError: A size below 1, or a name that is not known.
    """
    return coupling_flow(
        dim, context=context, hidden=hidden, layers=layers, activation=activation,
        between=between, preprocess=preprocess, context_preprocess=context_preprocess,
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
    preprocess: str | None = "standardize",
    context_preprocess: str | None = "standardize",
    period: float | None = None,
) -> Flow:
    """Neural spline flow: couplings by rational-quadratic splines; it starts as the identity.

    Source: Durkan et al. (2019), Neural Spline Flows, https://arxiv.org/abs/1906.04032; for angles
    Rezende et al. (2020), https://arxiv.org/abs/2002.02428.

    Args:
        dim: D, the number of variables; 2 or more.
        context: Size of the context; 0 for none.
        hidden: Widths of each layer's net.
        layers: Number of layers.
        bins: Bins of each spline.
        bound: The splines end at ±bound, in units of the standardized data; 5 if None.
        activation: A name in `cnf.nets.ACTIVATIONS`.
        between: What mixes the variables between layers, which keep one half and then the other:
            None, "shuffle" (a random permutation before every second layer, so that the masks are
            random) or "lu" (a trained linear map).
        preprocess: "standardize", fitted at the first `cnf.fit`, or None.
        context_preprocess: The same for the context.
        period: Of the data, where all of them are angles: circular splines on
            [-period/2, period/2) and a uniform base; wants preprocess=None and no "lu".

    Returns:
        A `Flow` of points of shape (dim,).

    Raises:
        ValueError: A size below 1, or a name that is not known.
    """
    return coupling_flow(
        dim, spline("nsf", bins, bound, period, between, preprocess), context=context,
        hidden=hidden, layers=layers, activation=activation, between=between, period=period,
        base=angles(dim, period), preprocess=preprocess, context_preprocess=context_preprocess,
    )  # fmt: skip


def coupling_flow(
    dim: int,
    transformer: ElementwiseMap | None = None,
    *,
    context: int = 0,
    hidden: Sequence[int] = (64, 64),
    layers: int = 8,
    activation: str = "silu",
    between: str | None = None,
    period: float | None = None,
    base: Base | None = None,
    preprocess: str | None = "standardize",
    context_preprocess: str | None = "standardize",
) -> Flow:
    """Couplings by any elementwise map; `cnf.save` needs `cnf.load(path, into=…)` for it.

    >>> from cnf.transforms import RationalQuadratic
    >>> coupling_flow(2, RationalQuadratic(bins=4), layers=2).event_shape
    (2,)

    Args:
        dim: D, the number of variables; 2 or more.
        transformer: The map of each variable, whose parameters the nets give; affine if None.
        context: Size of the context; 0 for none.
        hidden: Widths of each layer's net.
        layers: Number of layers.
        activation: A name in `cnf.nets.ACTIVATIONS`.
        between: What mixes the variables between layers, which keep one half and then the other:
            None, "shuffle" (a random permutation before every second layer, so that the masks are
            random) or "lu" (a trained linear map).
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
        kept = half(dim, k)
        return Coupling(
            dim, kept, transformer, hidden=hidden, context_dim=context, activation=activation,
            period=period,
        )  # fmt: skip

    stack = layered(layer, layers, dim, between)
    return stacked(stack, dim, preprocess, context_preprocess, base)
