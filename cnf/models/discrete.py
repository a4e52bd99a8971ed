"""The discrete models: layers of bijections that need no solver."""

from collections.abc import Sequence

from cnf.distributions import UniformAngles
from cnf.flow import Flow
from cnf.models.build import MODELS
from cnf.models.stacks import half, layered, stacked
from cnf.transforms.autoregressive import Autoregressive
from cnf.transforms.base import Inverse, Transform
from cnf.transforms.coupling import Coupling
from cnf.transforms.elementwise import Additive, Affine, Elementwise, ElementwiseMap, Inverted
from cnf.transforms.planar import Planar, Radial, Sylvester
from cnf.transforms.splines import CircularSpline, RationalQuadratic


@MODELS.register("nice")
def nice(
    dim: int,
    context: int = 0,
    hidden: Sequence[int] = (128, 128),
    layers: int = 8,
    activation: str = "relu",
    preprocess: str | None = "standardise",
    context_preprocess: str | None = "standardise",
) -> Flow:
    """NICE: additive couplings, which keep volume, and one diagonal scaling.

    Source: Dinh et al. (2014), https://arxiv.org/abs/1410.8516.

    Args:
        dim: D.
        context: Size of the context; 0 for none.
        hidden: Widths of each layer's net.
        layers: How many.
        activation: A name in `cnf.nets.ACTIVATIONS`.
        preprocess: "standardise" or None.
        context_preprocess: "standardise" or None.
    """

    def layer(k: int) -> Transform:
        coupling = Coupling(dim, half(dim, k), Additive(), None, hidden, context, activation)
        # Not at the identity: data with mirror symmetry give a shift no gradient to leave zero by.
        coupling.net.layers[-1].reset_parameters()  # pyright: ignore
        return coupling

    scaling = Elementwise(dim, Affine(), context_dim=context)
    stack = [*layered(layer, layers, dim, None), scaling]
    return stacked(stack, dim, preprocess, context_preprocess)


@MODELS.register("realnvp")
def realnvp(
    dim: int,
    context: int = 0,
    hidden: Sequence[int] = (64, 64),
    layers: int = 8,
    activation: str = "silu",
    between: str | None = None,
    preprocess: str | None = "standardise",
    context_preprocess: str | None = "standardise",
) -> Flow:
    """RealNVP: affine couplings with a bounded log-scale; starts as identity.

    Source: Dinh et al. (2017), https://arxiv.org/abs/1605.08803.

    Args: as for `nice`, and
        between: What mixes the variables between layers, which keep one half and then the other:
            None, "shuffle" (a random permutation before every second layer, so that the masks are
            random) or "lu" (a trained linear map).
    """

    def layer(k: int) -> Transform:
        return Coupling(dim, half(dim, k), None, None, hidden, context, activation)

    stack = layered(layer, layers, dim, between)
    return stacked(stack, dim, preprocess, context_preprocess)


@MODELS.register("nsf")
def nsf(
    dim: int,
    context: int = 0,
    hidden: Sequence[int] = (64, 64),
    layers: int = 6,
    bins: int = 8,
    bound: float | None = None,
    activation: str = "relu",
    between: str | None = "lu",
    preprocess: str | None = "standardise",
    context_preprocess: str | None = "standardise",
    period: float | None = None,
) -> Flow:
    """Neural spline flow: couplings by rational-quadratic splines; starts as identity.

    Source: Durkan et al. (2019), https://arxiv.org/abs/1906.04032.

    Args: as for `realnvp`, and
        bins: Of each spline.
        bound: Where the splines end, in units of the standardised data; at 5 if None.
        period: Of the data, where all of them are angles: circular splines on
            [-period/2, period/2) and a uniform base; wants preprocess=None and no "lu".
    """

    spline = _spline("nsf", bins, bound, period, between, preprocess)

    def layer(k: int) -> Transform:
        return Coupling(dim, half(dim, k), spline, None, hidden, context, activation, period)

    base = None if period is None else UniformAngles(dim, period)
    stack = layered(layer, layers, dim, between)
    return stacked(stack, dim, preprocess, context_preprocess, base)


@MODELS.register("nsf-ar")
def nsf_ar(
    dim: int,
    context: int = 0,
    hidden: Sequence[int] = (64, 64),
    layers: int = 4,
    bins: int = 8,
    bound: float | None = None,
    activation: str = "relu",
    between: str | None = "lu",
    preprocess: str | None = "standardise",
    context_preprocess: str | None = "standardise",
    period: float | None = None,
) -> Flow:
    """Autoregressive neural spline flow: the density takes one pass, a sample one per variable.

    Source: Durkan et al. (2019), https://arxiv.org/abs/1906.04032.

    Args: as for `nsf`.
    """

    spline = _spline("nsf-ar", bins, bound, period, between, preprocess)

    def layer(k: int) -> Transform:
        return Autoregressive(dim, spline, None, hidden, context, activation, period)

    base = None if period is None else UniformAngles(dim, period)
    stack = layered(layer, layers, dim, between, halves=False)
    return stacked(stack, dim, preprocess, context_preprocess, base)


@MODELS.register("maf")
def maf(
    dim: int,
    context: int = 0,
    hidden: Sequence[int] = (64, 64),
    layers: int = 5,
    activation: str = "relu",
    between: str | None = "reverse",
    preprocess: str | None = "standardise",
    context_preprocess: str | None = "standardise",
) -> Flow:
    """Masked autoregressive flow: the density takes one pass, a sample one per variable.

    Source: Papamakarios et al. (2017), https://arxiv.org/abs/1705.07057.

    Args: as for `realnvp`, and
        between: Also "reverse", the other order of the variables; "shuffle" before every layer.
    """

    def layer(k: int) -> Transform:
        return Autoregressive(dim, None, None, hidden, context, activation)

    stack = layered(layer, layers, dim, between, halves=False)
    return stacked(stack, dim, preprocess, context_preprocess)


@MODELS.register("iaf")
def iaf(
    dim: int,
    context: int = 0,
    hidden: Sequence[int] = (64, 64),
    layers: int = 5,
    activation: str = "relu",
    between: str | None = "reverse",
    preprocess: str | None = "standardise",
    context_preprocess: str | None = "standardise",
) -> Flow:
    """Inverse autoregressive flow: a sample takes one pass, the density one per variable.

    Source: Kingma et al. (2016), https://arxiv.org/abs/1606.04934.

    Args: as for `maf`.
    """

    def layer(k: int) -> Transform:
        return Inverse(Autoregressive(dim, None, None, hidden, context, activation))

    stack = layered(layer, layers, dim, between, halves=False)
    return stacked(stack, dim, preprocess, context_preprocess)


@MODELS.register("planar")
def planar(
    dim: int,
    context: int = 0,
    layers: int = 16,
    preprocess: str | None = "standardise",
    context_preprocess: str | None = "standardise",
) -> Flow:
    """Planar flow: each layer bends space along one direction.

    Source: Rezende & Mohamed (2015), https://arxiv.org/abs/1505.05770.

    Args:
        dim: D.
        context: Size of the context, in which the parameters are linear; 0 for none.
        layers: How many.
        preprocess: "standardise" or None.
        context_preprocess: "standardise" or None.
    """
    stack = layered(lambda k: Planar(dim, context), layers, dim, None)
    return stacked(stack, dim, preprocess, context_preprocess)


@MODELS.register("radial")
def radial(
    dim: int,
    context: int = 0,
    layers: int = 16,
    preprocess: str | None = "standardise",
    context_preprocess: str | None = "standardise",
) -> Flow:
    """Radial flow: each layer moves space towards a point or away from it.

    Source: Rezende & Mohamed (2015), https://arxiv.org/abs/1505.05770.

    Args: as for `planar`.
    """
    stack = layered(lambda k: Radial(dim, context), layers, dim, None)
    return stacked(stack, dim, preprocess, context_preprocess)


@MODELS.register("sylvester")
def sylvester(
    dim: int,
    context: int = 0,
    layers: int = 8,
    rank: int | None = None,
    preprocess: str | None = "standardise",
    context_preprocess: str | None = "standardise",
) -> Flow:
    """Sylvester flow: each layer bends space along several orthogonal directions.

    Source: van den Berg et al. (2018), https://arxiv.org/abs/1803.05649.

    Args: as for `planar`, and
        rank: Directions of a layer; all of D, at most 8, if None.
    """
    rank = min(dim, 8) if rank is None else rank
    stack = layered(lambda k: Sylvester(dim, rank, context), layers, dim, None)
    return stacked(stack, dim, preprocess, context_preprocess)


def _spline(
    who: str,
    bins: int,
    bound: float | None,
    period: float | None,
    between: str | None,
    preprocess: str | None,
) -> ElementwiseMap:
    """Data to base, the way that training goes, by the spline's formula; the other by its root."""
    if period is None:
        return Inverted(RationalQuadratic(bins, 5.0 if bound is None else bound))
    if between == "lu" or (preprocess, bound) != (None, None):
        raise ValueError(
            f"{who}: angles have no linear map, are not standardised and end at half a period; "
            "with period=… give preprocess=None, no bound and between=None or 'shuffle', got "
            f"{preprocess!r}, {bound} and {between!r}"
        )
    return Inverted(CircularSpline(bins, period / 2))
