"""Backprop that keeps a segment's ends and recomputes what lies between them."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from cnf.precision import current_autocast

Tensors = tuple[Tensor, ...]


def checkpointed(
    run: Callable[[Tensors], Tensors], state: Tensors, params: Sequence[Tensor]
) -> Tensors:
    """run(state), whose graph is built in the backward pass; derivatives of any order.

    Not `torch.utils.checkpoint`: its hooks see the products that Hutchinson's estimate takes
    inside `run`, and recompute the segment for each of them.

    Args:
        run: From the state to the state, the same each time it is called.
        state: The state at the segment's start.
        params: Every tensor, besides the state, that `run` must send a gradient to.
    """
    return _Segment.apply(run, len(state), *state, *params)  # pyright: ignore


class _Segment(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, run: Callable[[Tensors], Tensors], parts: int, *tensors: Tensor) -> Any:
        ctx.run, ctx.parts = run, parts
        ctx.autocast = current_autocast(tensors[0])
        ctx.save_for_backward(*tensors)
        return run(tensors[:parts])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        run, parts, autocast = ctx.run, ctx.parts, ctx.autocast
        state, params = ctx.saved_tensors[:parts], ctx.saved_tensors[parts:]
        needed = ctx.needs_input_grad[2:]

        def pull(given: Tensors) -> Tensors:
            graph = torch.is_grad_enabled()
            start = given[:parts]
            with torch.enable_grad(), autocast:
                if not graph:
                    start = tuple(part.detach().requires_grad_() for part in start)
                end = run(start)
            ends = [k for k, part in enumerate(end) if part.requires_grad]
            asked = [x for x, need in zip((*start, *params), needed, strict=True) if need]
            return torch.autograd.grad(
                [end[k] for k in ends], asked, [given[parts + k] for k in ends],
                create_graph=graph, materialize_grads=True,
            )  # fmt: skip

        # Itself a segment: that gives the second derivative.
        found = iter(checkpointed(pull, (*state, *cotangents), params))
        return (None, None, *(next(found) if need else None for need in needed))
