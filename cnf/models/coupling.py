"""Flows of coupling layers, which transform one half of the variables given the other."""

from collections.abc import Callable, Sequence
from functools import partial

from torch import nn

from cnf.distributions import Base
from cnf.errors import expect_counts
from cnf.flow import Flow
from cnf.models.build import MODELS, Dequantize, Preprocess, assembled
from cnf.models.scales import at_levels, at_scales
from cnf.models.stacks import angles, half, layered, spline, stacked
from cnf.nets import ResidualConvNet
from cnf.transforms.base import Compose, Transform
from cnf.transforms.coupling import Coupling
from cnf.transforms.elementwise import Additive, Affine, Elementwise, Transformer
from cnf.transforms.image import CheckerboardCoupling, ConvCoupling, PerPixel
from cnf.transforms.linear import Permutation
from cnf.transforms.normalization import ActNorm


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
        dim: Number of variables D; 2 or more, or 1 with a context.
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
    dim: int | None = None,
    *,
    context: int = 0,
    hidden: Sequence[int] = (64, 64),
    layers: int | None = None,
    activation: str = "silu",
    between: str | None = None,
    preprocess: Preprocess = "standardize",
    context_preprocess: str | None = "standardize",
    dequantization: Dequantize = None,
    shape: Sequence[int] | None = None,
    scales: int | None = None,
) -> Flow:
    """RealNVP: affine couplings with a bounded log-scale; it starts as the identity.

    For images, at each scale but the last: couplings of pixels that alternate as on a
    checkerboard, a squeeze, couplings of halves of the channels, and half of the channels are
    factored out; at the last one more of the first kind. The conditioners are residual networks of
    convolutions, and each coupling is followed by an `ActNorm` where the paper has batch
    normalization.

    Source: Dinh et al. (2017), RealNVP, https://arxiv.org/abs/1605.08803.

    Args:
        dim: Number of variables D; 2 or more, or 1 with a context.
        context: Size of the context; 0 for none.
        hidden: Hidden widths of each layer's conditioner, an MLP; for images the channels of each
            residual block, all equal.
        layers: Number of layers: 8 for vectors and 3 for images if None. Of images, before and
            after each squeeze, and one more at the last scale.
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
        shape: Shape (C, H, W) of images, instead of dim.
        scales: Number of scales, for images; as many as leave no side below 4 pixels if None (28,
            14 and 7 pixels: 3).

    Returns:
        A `Flow` of points of shape (dim,), or of images of the given shape.

    Raises:
        ValueError: Not exactly one of dim and shape is given, a size is below 1, a name is
            unknown, or height and width cannot be halved so often.
    """
    if shape is not None:
        if between is not None:
            raise ValueError(
                f"realnvp: images have no map between layers, got between={between!r}; leave it "
                "out"
            )
        net = partial(ResidualConvNet, hidden=hidden, activation=activation)
        transform = _realnvp_of_images(
            shape, scales, 3 if layers is None else layers, context, net
        )
        return assembled(transform, tuple(shape), preprocess, context_preprocess, dequantization)
    assert dim is not None
    if scales is not None:
        raise ValueError(f"realnvp: scales are those of an image: expected shape=…, got dim={dim}")
    return coupling_flow(
        dim, context=context, hidden=hidden, layers=8 if layers is None else layers,
        activation=activation, between=between, preprocess=preprocess,
        context_preprocess=context_preprocess, dequantization=dequantization,
    )  # fmt: skip


@MODELS.register("nsf")
def nsf(
    dim: int | None = None,
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
    shape: Sequence[int] | None = None,
    levels: int | None = None,
) -> Flow:
    """Neural spline flow: couplings by rational-quadratic splines; it starts as the identity.

    For images it is Glow with these splines, and residual networks of convolutions for their
    conditioners: steps of actnorm, a 1×1 convolution and a coupling at each level.

    Source: Durkan et al. (2019), Neural Spline Flows, https://arxiv.org/abs/1906.04032; for angles
    Rezende et al. (2020), https://arxiv.org/abs/2002.02428.

    Args:
        dim: Number of variables D; 2 or more, or 1 with a context.
        context: Size of the context; 0 for none.
        hidden: Hidden widths of each layer's conditioner, an MLP; for images the channels of each
            residual block, all equal.
        layers: Number of layers (per level, for images).
        bins: Number of bins of each spline.
        bound: The splines are the identity beyond ±bound, in units of standardized data; 5 if
            None.
        activation: A name in `cnf.nets.ACTIVATIONS`.
        between: Map between layers, whose masks alternate between the halves: None, "shuffle" (a
            random permutation before every pair of layers, so that the halves are random) or "lu"
            (a trained linear map, for images the 1×1 convolution, which they always have).
        preprocess: A name in `cnf.transforms.PREPROCESSING`, a mapping with a "name" and options,
            an instance, or a list of these, applied to the data in this order; fitted at the first
            `cnf.fit`. None for none.
        context_preprocess: "standardize", fitted likewise to the context, or None.
        dequantization: "uniform" or "variational", a mapping with such a "name" and options, or an
            instance, for whole numbers such as pixels; None for real numbers.
        period: Period of the data, if all variables are angles: the splines are circular on
            [-period/2, period/2) and the base is uniform. It requires preprocess=None, no bound
            and no "lu".
        shape: Shape (C, H, W) of images, instead of dim; H and W are multiples of 2^levels.
        levels: Number of levels, for images; 2 if None.

    Returns:
        A `Flow` of points of shape (dim,), or of images of the given shape.

    Raises:
        ValueError: Not exactly one of dim and shape is given, a size is below 1, a name is
            unknown, or a size does not fit.
    """
    if shape is not None:
        if between != "lu" or period is not None:
            raise ValueError(
                "nsf: images have a 1×1 convolution before each coupling and are no angles: "
                f"expected between='lu' and no period, got {between!r} and {period}"
            )
        splines = spline("nsf", bins, bound, None, between, preprocess)
        net = partial(ResidualConvNet, hidden=hidden, activation=activation)
        transform = at_levels(
            "nsf", shape, levels, layers,
            partial(ConvCoupling, transformer=splines, context_dim=context, conditioner=net),
            partial(ConvCoupling, context_dim=context, conditioner=net),
        )  # fmt: skip
        return assembled(transform, tuple(shape), preprocess, context_preprocess, dequantization)
    assert dim is not None
    if levels is not None:
        raise ValueError(f"nsf: levels are those of an image: expected shape=…, got dim={dim}")
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
        dim: Number of variables D; 2 or more, or 1 with a context.
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


def _realnvp_of_images(
    shape: Sequence[int],
    scales: int | None,
    layers: int,
    context: int,
    net: Callable[[int, int], nn.Module],
) -> Transform:
    """RealNVP at several scales.

    Args:
        shape: Shape of an image, (C, H, W).
        scales: Number of scales, or None.
        layers: Number of couplings before and after each squeeze.
        context: Size of the context.
        net: Makes a conditioner, from the numbers of input and output channels.
    """
    expect_counts("realnvp", layers=layers)

    def of_pixels(shape: Sequence[int], count: int) -> Transform:
        steps: list[Transform] = []
        for k in range(count):
            odd = k % 2 == 1
            coupling = CheckerboardCoupling(shape[0], odd, context_dim=context, conditioner=net)
            steps += [coupling, ActNorm(shape)]
        return Compose(steps)

    def of_channels(shape: Sequence[int]) -> Transform:
        channels, half = shape[0], shape[0] // 2
        exchanged = [*range(half, channels), *range(half)]
        steps: list[Transform] = []
        for _ in range(layers):
            coupling = ConvCoupling(channels, half, context_dim=context, conditioner=net)
            steps += [coupling, PerPixel(Permutation(channels, exchanged)), ActNorm(shape)]
        return Compose(steps)

    return at_scales(
        "realnvp", shape, scales,
        before=partial(of_pixels, count=layers),
        after=of_channels,
        last=partial(of_pixels, count=layers + 1),
    )  # fmt: skip
