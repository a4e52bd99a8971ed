"""Planar, radial and Sylvester flows, whose inverses are computed by root finding."""

from cnf.flow import Flow
from cnf.models.build import MODELS
from cnf.models.stacks import layered, stacked
from cnf.transforms.planar import Planar, Radial, Sylvester


@MODELS.register("planar")
def planar(
    dim: int,
    *,
    context: int = 0,
    layers: int = 16,
    preprocess: str | None = "standardize",
    context_preprocess: str | None = "standardize",
) -> Flow:
    """Planar flow: each layer moves points along one direction, by a function of a projection.

    Source: Rezende & Mohamed (2015), https://arxiv.org/abs/1505.05770.

    Args:
        dim: Number of variables D.
        context: Size of the context, on which the layers' parameters depend linearly; 0 for none.
        layers: Number of layers.
        preprocess: "standardize", fitted at the first `cnf.fit`, or None.
        context_preprocess: The same for the context.

    Returns:
        A `Flow` of points of shape (dim,).

    Raises:
        ValueError: A size is below 1, or a name is unknown.
    """
    stack = layered(lambda k: Planar(dim, context), layers, dim, None)
    return stacked(stack, dim, preprocess, context_preprocess)


@MODELS.register("radial")
def radial(
    dim: int,
    *,
    context: int = 0,
    layers: int = 16,
    preprocess: str | None = "standardize",
    context_preprocess: str | None = "standardize",
) -> Flow:
    """Radial flow: each layer contracts or expands space around a point.

    Source: Rezende & Mohamed (2015), https://arxiv.org/abs/1505.05770.

    Args:
        dim: Number of variables D.
        context: Size of the context, on which the layers' parameters depend linearly; 0 for none.
        layers: Number of layers.
        preprocess: "standardize", fitted at the first `cnf.fit`, or None.
        context_preprocess: The same for the context.

    Returns:
        A `Flow` of points of shape (dim,).

    Raises:
        ValueError: A size is below 1, or a name is unknown.
    """
    stack = layered(lambda k: Radial(dim, context), layers, dim, None)
    return stacked(stack, dim, preprocess, context_preprocess)


@MODELS.register("sylvester")
def sylvester(
    dim: int,
    *,
    context: int = 0,
    layers: int = 8,
    rank: int | None = None,
    preprocess: str | None = "standardize",
    context_preprocess: str | None = "standardize",
) -> Flow:
    """Sylvester flow: planar layers along several orthogonal directions at once.

    Source: van den Berg et al. (2018), https://arxiv.org/abs/1803.05649.

    Args:
        dim: Number of variables D.
        context: Size of the context, on which the layers' parameters depend linearly; 0 for none.
        layers: Number of layers.
        rank: Number of directions per layer; the smaller of D and 8 if None.
        preprocess: "standardize", fitted at the first `cnf.fit`, or None.
        context_preprocess: The same for the context.

    Returns:
        A `Flow` of points of shape (dim,).

    Raises:
        ValueError: A size is below 1, or a name is unknown.
    """
    rank = min(dim, 8) if rank is None else rank
    stack = layered(lambda k: Sylvester(dim, rank, context), layers, dim, None)
    return stacked(stack, dim, preprocess, context_preprocess)
