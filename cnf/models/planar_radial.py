"""Planar, radial and Sylvester flows, whose inverses are computed by root finding."""

from cnf.flow import Flow
from cnf.models.build import MODELS, Dequantize, Preprocess
from cnf.models.stacks import layered, stacked
from cnf.transforms.planar import Planar, Radial, Sylvester


@MODELS.register("planar")
def planar(
    dim: int,
    *,
    context: int = 0,
    layers: int = 16,
    preprocess: Preprocess = "standardize",
    context_preprocess: str | None = "standardize",
    dequantization: Dequantize = None,
) -> Flow:
    """Planar flow: each layer moves points along one direction, by a function of a projection.

    Source: Rezende & Mohamed (2015), https://arxiv.org/abs/1505.05770.

    Args:
        dim: Number of variables D.
        context: Size of the context, on which the layers' parameters depend linearly; 0 for none.
        layers: Number of layers.
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
    stack = layered(lambda k: Planar(dim, context), layers, dim, None)
    return stacked(stack, dim, preprocess, context_preprocess, dequantization)


@MODELS.register("radial")
def radial(
    dim: int,
    *,
    context: int = 0,
    layers: int = 16,
    preprocess: Preprocess = "standardize",
    context_preprocess: str | None = "standardize",
    dequantization: Dequantize = None,
) -> Flow:
    """Radial flow: each layer contracts or expands space around a point.

    Source: Rezende & Mohamed (2015), https://arxiv.org/abs/1505.05770.

    Args:
        dim: Number of variables D.
        context: Size of the context, on which the layers' parameters depend linearly; 0 for none.
        layers: Number of layers.
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
    stack = layered(lambda k: Radial(dim, context), layers, dim, None)
    return stacked(stack, dim, preprocess, context_preprocess, dequantization)


@MODELS.register("sylvester")
def sylvester(
    dim: int,
    *,
    context: int = 0,
    layers: int = 8,
    rank: int | None = None,
    preprocess: Preprocess = "standardize",
    context_preprocess: str | None = "standardize",
    dequantization: Dequantize = None,
) -> Flow:
    """Sylvester flow: planar layers along several orthogonal directions at once.

    Source: van den Berg et al. (2018), https://arxiv.org/abs/1803.05649.

    Args:
        dim: Number of variables D.
        context: Size of the context, on which the layers' parameters depend linearly; 0 for none.
        layers: Number of layers.
        rank: Number of directions per layer; the smaller of D and 8 if None.
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
    rank = min(dim, 8) if rank is None else rank
    stack = layered(lambda k: Sylvester(dim, rank, context), layers, dim, None)
    return stacked(stack, dim, preprocess, context_preprocess, dequantization)
