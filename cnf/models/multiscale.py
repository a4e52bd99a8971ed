"""Glow, for vectors and for images at several scales."""

from collections.abc import Sequence

from cnf.errors import expect_counts
from cnf.flow import Flow
from cnf.models.build import MODELS, Dequantize, Preprocess, assembled
from cnf.models.scales import at_levels
from cnf.models.stacks import half, stacked
from cnf.transforms.base import Transform
from cnf.transforms.coupling import Coupling
from cnf.transforms.image import ConvCoupling
from cnf.transforms.linear import LU
from cnf.transforms.normalization import ActNorm


@MODELS.register("glow")
def glow(
    dim: int | None = None,
    *,
    context: int = 0,
    hidden: Sequence[int] = (64, 64),
    layers: int = 8,
    levels: int | None = None,
    activation: str = "relu",
    preprocess: Preprocess = "standardize",
    context_preprocess: str | None = "standardize",
    dequantization: Dequantize = None,
    shape: Sequence[int] | None = None,
) -> Flow:
    """Glow: steps of actnorm, a linear map initialized as a rotation, and an affine coupling.

    For images the linear map is a 1×1 convolution. Each level squeezes the image, applies `layers`
    steps and factors out half of the channels, which are modeled given the other half; that half
    goes on to the next level.

    Source: Kingma & Dhariwal (2018), https://arxiv.org/abs/1807.03039.

    Args:
        dim: Number of variables D; 2 or more, or 1 with a context.
        context: Size of the context; 0 for none.
        hidden: Hidden widths of each coupling's conditioner (channels, for images).
        layers: Number of steps (per level, for images).
        levels: Number of levels, for images; 2 if None.
        activation: A name in `cnf.nets.ACTIVATIONS`.
        preprocess: A name in `cnf.transforms.PREPROCESSING`, a mapping with a "name" and options,
            an instance, or a list of these, applied to the data in this order; fitted at the first
            `cnf.fit`. None for none.
        context_preprocess: "standardize", fitted likewise to the context, or None.
        dequantization: "uniform" or "variational", a mapping with such a "name" and options, or an
            instance, for whole numbers such as pixels; None for real numbers.
        shape: Shape (C, H, W) of images, instead of dim; H and W are multiples of 2^levels.

    Returns:
        A `Flow` of points of shape (dim,), or of images of the given shape.

    Raises:
        ValueError: Not exactly one of dim and shape is given, or a size does not fit.
    """
    expect_counts("glow", layers=layers)
    net = {"hidden": hidden, "context_dim": context, "activation": activation}
    if shape is None:
        assert dim is not None
        if levels is not None:
            raise ValueError("glow: levels are those of an image: expected shape=…, got dim=…")
        steps: list[Transform] = []
        for k in range(layers):
            coupling = Coupling(dim, half(dim, k), **net)
            steps += [coupling, LU(dim, rotated=True), ActNorm((dim,))]
        return stacked(steps, dim, preprocess, context_preprocess, dequantization)

    def coupling(channels: int, kept: int) -> Transform:
        return ConvCoupling(channels, kept, **net)

    transform = at_levels("glow", shape, levels, layers, coupling, coupling)
    return assembled(transform, tuple(shape), preprocess, context_preprocess, dequantization)
