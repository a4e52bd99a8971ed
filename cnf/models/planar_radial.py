"""Planar, radial and Sylvester flows: each layer adds one bend, whose inverse is a root."""

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
    """Planar flow: each layer bends space along one direction.

    Source: Rezende & Mohamed (2015), https://arxiv.org/abs/1505.05770.

    Args:
        dim: D, the number of variables.
        context: Size of the context, in which the layers' parameters are linear; 0 for none.
        layers: Number of layers.
        preprocess: "standardize", fitted at the first `cnf.fit`, or None.
        context_preprocess: The same for the context.

    Returns:
        A `Flow` of points of shape (dim,).

    Raises:
        ValueError: A size below 1, or a name that is not known.
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
    """Radial flow: each layer moves space towards a point or away from it.

    Source: Rezende & Mohamed (2015), https://arxiv.org/abs/1505.05770.

    Args:
        dim: D, the number of variables.
        context: Size of the context, in which the layers' parameters are linear; 0 for none.
        layers: Number of layers.
        preprocess: "standardize", fitted at the first `cnf.fit`, or None.
        context_preprocess: The same for the context.

    Returns:
        A `Flow` of points of shape (dim,).

    Raises:
        ValueError: A size below 1, or a name that is not known.
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
    """Sylvester flow: each layer bends space along several orthogonal directions.

    Source: van den Berg et al. (2018), https://arxiv.org/abs/1803.05649.

    Args:
        dim: D, the number of variables.
        context: Size of the context, in which the layers' parameters are linear; 0 for none.
        layers: Number of layers.
        rank: Directions of a layer; all of D, but 8 at most, if None.
        preprocess: "standardize", fitted at the first `cnf.fit`, or None.
        context_preprocess: The same for the context.

    Returns:
        A `Flow` of points of shape (dim,).

    Raises:
        ValueError: A size below 1, or a name that is not known.
    """
    rank = min(dim, 8) if rank is None else rank
    stack = layered(lambda k: Sylvester(dim, rank, context), layers, dim, None)
    return stacked(stack, dim, preprocess, context_preprocess)
