"""Evaluation of large batches in chunks, if gradients are disabled."""

import math
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from cnf.dynamics import numerical
from cnf.transforms.base import Transform
from cnf.transforms.continuous import is_continuous
from cnf.transforms.recompute import Direction

BYTES = 2**28  # working memory of a chunk, as estimated below
COPIES = 8  # number of tensors of the widest layer's size that exist at once


def by_chunks(
    transform: Transform, direction: Direction, value: Tensor, context: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Compute direction(value, context) in chunks of a few thousand rows.

    A batch is split only if gradients are disabled. In an adaptive ODE solve, the rows of a chunk
    share the step sizes.

    Args:
        transform: The transform, which determines the size of a chunk.
        direction: One of its directions, possibly with other settings.
        value: Points, shape (*batch, *event).
        context: Condition, shape (*batch, C), or None.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return direction(value, context)
    if transform.training and not transform.recomputable:  # uses statistics of the whole batch
        return direction(value, context)
    rows = rows_at_once(transform, value)
    with numerical.warning_of_folds():
        return _chunked(direction, value, context, transform.event_dims, rows)


_widest: WeakKeyDictionary[Transform, tuple[int, int]] = WeakKeyDictionary()


def rows_at_once(transform: Transform, value: Tensor) -> int:
    """Number of rows whose activations take `BYTES`, estimated from the shapes of the weights."""
    event = value.shape[value.dim() - transform.event_dims :]
    size, places = math.prod(event), math.prod(event[1:])
    if transform not in _widest:  # reading each weight's shape takes as long as a small batch
        _widest[transform] = _widest_layers(transform)
    dense, convolution = _widest[transform]
    tangents = size if is_continuous(transform) and places == 1 else 1  # of the exact divergence
    row = COPIES * max(size, dense, convolution * places) * tangents * value.element_size()
    return max(1, BYTES // row)


def _widest_layers(transform: Transform) -> tuple[int, int]:
    """Widths of the widest dense layer and of the widest convolution; 0 if there is none."""
    shapes = [weight.shape for weight in transform.parameters() if weight.dim()]
    dense, convolutions = ([s[0] for s in shapes if (len(s) == 4) == is4] for is4 in (False, True))
    return max(dense, default=0), max(convolutions, default=0)


def _chunked(
    direction: Direction, value: Tensor, context: Tensor | None, event_dims: int, rows: int
) -> tuple[Tensor, Tensor]:
    batch = value.shape[: value.dim() - event_dims]
    if math.prod(batch) <= rows:
        return direction(value, context)
    each = rows // math.prod(batch[1:])
    if each:
        contexts = [None] * len(value) if context is None else context.split(each)
        parts = [direction(v, c) for v, c in zip(value.split(each), contexts, strict=False)]
        join = torch.cat
    else:
        contexts = [None] * len(value) if context is None else context
        pairs = zip(value, contexts, strict=True)
        parts = [_chunked(direction, v, c, event_dims, rows) for v, c in pairs]
        join = torch.stack
    values, ladjs = zip(*parts, strict=True)
    return join(values), join(ladjs)
